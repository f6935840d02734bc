"""The parts that attention, MLP and experts are made of, in Flax Linen."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.models.decoder_config import DecoderConfig

__all__ = ["MLP", "Linear", "Place", "RMSNorm", "gated", "gatherer", "keep", "normal"]

# Holds activations to their place on a mesh, by kind: "stream" `[batch length d]` between layers,
# "inputs" the same as projections take them, "heads" `[batch length heads head_dim]`, "units"
# `[batch length units]`, "logits" `[batch ... vocab]`. And kernels `[... d_in d_out]` as products
# take them: "columns" where heads or units come out, "rows" where they go in.
Place: TypeAlias = Callable[[jax.Array, str], jax.Array]

normal = nn.initializers.normal(0.02)


def keep(x: jax.Array, kind: str) -> jax.Array:
    """The `Place` of a program that leaves it to the compiler."""
    return x


def gatherer(config: DecoderConfig, place: Place, kind: str) -> Callable[[jax.Array], jax.Array]:
    """What a layer does with a kernel before the product: it puts its parts together.

    So the parts are sent as they are stored, in four bits if they are. Not where all that the
    backward pass reads is kept, which would be the kernels of all layers put together.
    """
    if config.remat == "none":
        return lambda kernel: kernel
    return lambda kernel: place(kernel, kind)


class Linear(nn.Module):
    """`x @ kernel`, plus a bias if asked."""

    features: int
    use_bias: bool
    dtype: str
    gather: Callable[[jax.Array], jax.Array] = lambda kernel: kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the last axis of `x` to `features`."""
        kernel = self.gather(self.param("kernel", normal, (x.shape[-1], self.features)))
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return checkpoint_name(y, self.name or "")


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32, and scales."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x`; the result has the compute dtype."""
        c = self.config
        start = nn.initializers.zeros if c.zero_centered_norms else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        if c.zero_centered_norms:
            return _rms_norm(x, 1 + scale.astype(jnp.float32), c.rms_norm_eps).astype(c.dtype)
        return _rms_norm(x, scale.astype(c.dtype), c.rms_norm_eps)


class MLP(nn.Module):
    """The gated feed-forward block."""

    config: DecoderConfig
    place: Place = keep

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`down(activation(gate(x)) * up(x))`."""
        c = self.config
        linear = functools.partial(
            Linear,
            use_bias=c.mlp_bias,
            dtype=c.dtype,
            gather=gatherer(c, self.place, "columns"),
        )
        if c.fused_projections:
            both = linear(2 * c.intermediate_size, name="gate_up_proj")(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = linear(c.intermediate_size, name="gate_proj")(x)
            up = linear(c.intermediate_size, name="up_proj")(x)
        gate, up = self.place(gate, "units"), self.place(up, "units")
        down = linear(c.hidden_size, gather=gatherer(c, self.place, "rows"), name="down_proj")
        return down(gated(gate, up, c.activation))


# Elementwise, so computing it again is cheaper than keeping its float32 intermediates.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return y.astype(scale.dtype) * scale


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """`activation(gate) * up`."""
    if activation == "gelu_tanh":
        return jax.nn.gelu(gate, approximate=True) * up
    return jax.nn.silu(gate) * up
