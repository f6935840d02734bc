"""A mixture of experts: each token goes through the few MLPs that a router picks for it.

The rows of a batch are sorted by expert, so that each projection is one ragged product: no expert
has a capacity, no token is dropped, and the work is that of the picked experts alone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.models.decoder_config import DecoderConfig
from jlora.models.layers import Linear, Place, gated, keep, normal

__all__ = ["MoE"]


class MoE(nn.Module):
    """A router, `gate`, and the experts. Their rows, sorted, are left to the compiler's `place`."""

    config: DecoderConfig
    place: Place = keep

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The sum of each token's experts, weighted by the router's probabilities."""
        c = self.config
        assert c.experts is not None
        count, per_token = c.experts.count, c.experts.per_token
        tokens = x.reshape(-1, x.shape[-1])
        scores = Linear(count, use_bias=False, dtype=c.dtype, name="gate")(tokens)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        weights, picks = jax.lax.top_k(weights, per_token)  # [tokens per_token]
        if c.experts.renormalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)

        picks = picks.reshape(-1)
        order = jnp.argsort(picks)
        sizes = jnp.bincount(picks, length=count).astype(jnp.int32)
        out = ExpertMLPs(c, name="experts")(tokens[order // per_token], sizes)
        # Back by a gather, not a scatter-add: the sum then has one order on every device.
        out = out[jnp.argsort(order)].reshape(*weights.shape, -1)
        out = jnp.einsum("tkd,tk->td", out.astype(jnp.float32), weights)
        return out.astype(c.dtype).reshape(x.shape)


class ExpertMLPs(nn.Module):
    """The MLPs of all experts, on rows sorted by expert."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Maps `[rows d]`, of which the first `sizes[0]` belong to the first expert, and so on."""
        c = self.config
        both = ExpertLinear(2 * c.intermediate_size, c.dtype, name="gate_up_proj")(rows, sizes)
        hidden = gated(*jnp.split(both, 2, axis=-1), c.activation)
        return ExpertLinear(c.hidden_size, c.dtype, name="down_proj")(hidden, sizes)


class ExpertLinear(nn.Module):
    """One matrix an expert."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """The product of each row with its expert's matrix."""
        shape = (sizes.shape[0], rows.shape[-1], self.features)
        kernel = self.param("kernel", normal, shape).astype(self.dtype)
        return checkpoint_name(jax.lax.ragged_dot(rows, kernel, sizes), self.name or "")
