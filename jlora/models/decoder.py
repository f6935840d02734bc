"""A decoder-only transformer in Flax Linen, with scanned layers.

One definition serves Llama, Mistral, Qwen, Gemma, Phi, Mixtral and kin; `DecoderConfig` says what
differs. Parameters of all layers are stacked on a leading axis; kernels are `[d_in, d_out]`:

    embed_tokens/embedding                      [vocab d]
    layers/self_attn/{q,k,v,o}_proj/kernel      [layers d_in d_out], with bias [layers d_out] if any
    layers/self_attn/{q,k}_norm/scale           [layers head_dim], if any
    layers/mlp/{gate,up,down}_proj/kernel       [layers d_in d_out]
    layers/{input,post_attention}_layernorm/scale   [layers d]
    layers/{pre,post}_feedforward_layernorm/scale   [layers d], if any
    norm/scale                                  [d]
    lm_head/kernel                              [d vocab], unless tied to the embedding

Fused projections are `self_attn/qkv_proj` and `mlp/gate_up_proj`. A mixture of experts has

    layers/mlp/gate/kernel                      [layers d experts], the router
    layers/mlp/experts/{gate_up,down}_proj/kernel   [layers experts d_in d_out]
"""

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.models import cache as kv_cache
from jlora.models import remat, rotary
from jlora.models.attention import cached_attention, causal_attention
from jlora.models.cache import Cache, init_cache
from jlora.models.decoder_config import DecoderConfig, Experts
from jlora.models.layers import MLP, Linear, Place, RMSNorm, gatherer, keep, normal
from jlora.models.moe import MoE
from jlora.models.rotary import RopeScaling

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Experts",
    "RopeScaling",
    "init_cache",
    "param_shapes",
]


def param_shapes(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree as float32 `ShapeDtypeStruct`s; nothing is computed."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


# Cosine and sine.
_Angles: TypeAlias = tuple[jax.Array, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["angles", "local_angles", "segment_ids", "mask", "local_mask", "index"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Context:
    """What every layer shares: rotary angles, who sees whom, and where new keys go.

    What is called local is for the layers that slide.
    """

    angles: _Angles
    local_angles: _Angles
    segment_ids: jax.Array | None = None
    mask: jax.Array | None = None
    local_mask: jax.Array | None = None
    index: jax.Array | None = None


# The residual stream; with a cache also all its keys and values and the number of the layer.
_Carry: TypeAlias = tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array] | None]
# Whether a layer slides: known when the program is built, or not if layers of a loop differ.
_Slides: TypeAlias = bool | jax.Array


class Embedding(nn.Module):
    """A table of token vectors, also used as the head of a tied model."""

    config: DecoderConfig

    def setup(self):
        """Declares the table."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = self.param("embedding", normal, shape)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The vectors of tokens; NaN for a token that is not in the vocabulary."""
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)
        if self.config.scale_embeddings:
            # Rounded to the compute dtype first, as these models were trained.
            x = x * jnp.asarray(math.sqrt(self.config.hidden_size), x.dtype)
        return x

    def attend(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Products with every token's vector."""
        table = self.embedding.astype(self.config.dtype)
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=dtype)


class Head(nn.Module):
    """The output projection of an untied model."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        """Logits."""
        shape = (self.config.hidden_size, self.config.vocab_size)
        kernel = self.param("kernel", normal, shape).astype(self.config.dtype)
        return jnp.matmul(x, kernel, preferred_element_type=dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig
    place: Place = keep

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Any, context: _Context, slides: _Slides
    ) -> tuple[jax.Array, Any]:
        """Attends; with a cache, puts the new keys and values into it first."""
        c = self.config
        q, k, v = self._project(x)
        if c.qk_norm:
            q, k = RMSNorm(c, name="q_norm")(q), RMSNorm(c, name="k_norm")(k)
        cos, sin = _choose(slides, context.local_angles, context.angles)
        q, k = (rotary.rotate(y, cos, sin) for y in (q, k))
        if cache is None:
            out = self._attend(q, k, v, context.segment_ids, slides)
        else:
            cache, k, v = kv_cache.update(cache, k, v, context.index)
            mask = _choose(slides, context.local_mask, context.mask)
            out = cached_attention(
                q, k.astype(q.dtype), v.astype(q.dtype), mask, **self._score_options()
            )
        out = self.place(out.reshape(*x.shape[:2], -1), "units")
        rows = gatherer(c, self.place, "rows")
        return Linear(c.hidden_size, c.o_bias, c.dtype, rows, name="o_proj")(out), cache

    def _project(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values, `[batch length heads head_dim]`."""
        c = self.config
        columns = gatherer(c, self.place, "columns")
        linear = functools.partial(Linear, use_bias=c.qkv_bias, dtype=c.dtype, gather=columns)
        q_features, kv_features = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if c.fused_projections:
            qkv = linear(q_features + 2 * kv_features, name="qkv_proj")(x)
            parts = jnp.split(qkv, (q_features, q_features + kv_features), axis=-1)
        else:
            parts = [
                linear(q_features, name="q_proj")(x),
                linear(kv_features, name="k_proj")(x),
                linear(kv_features, name="v_proj")(x),
            ]
        heads = [y.reshape(*y.shape[:2], -1, c.head_dim) for y in parts]
        return [self.place(y, "heads") for y in heads]

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        segment_ids: jax.Array | None,
        slides: _Slides,
    ) -> jax.Array:
        def attend(window: int | None, *args: Any) -> jax.Array:
            q, k, v, segment_ids = args
            return causal_attention(
                *(q, k, v),
                segment_ids=segment_ids,
                window=window,
                mesh=getattr(self.place, "mesh", None),
                **self._score_options(),
            )

        window = self.config.sliding_window
        full, local = functools.partial(attend, None), functools.partial(attend, window)
        if window is None or window >= q.shape[1]:
            slides = False
        if isinstance(slides, bool):
            return (local if slides else full)(q, k, v, segment_ids)
        # A branch, not a mask made from `slides`: in each the window is static, so blocks of keys
        # outside it are left out and cuDNN can be chosen. And not a loop over groups of layers that
        # repeat (Gemma 3: five that slide, one that does not): parameters would no longer be one
        # stack over layers, and 26 or 62 layers are no whole number of groups.
        return jax.lax.cond(slides, local, full, q, k, v, segment_ids)

    def _score_options(self) -> dict[str, Any]:
        c = self.config
        scale = (c.head_dim if c.query_scalar is None else c.query_scalar) ** -0.5
        return {"scale": scale, "softcap": c.attention_softcap}


class Layer(nn.Module):
    """One decoder layer, in the form that `nn.scan` wants: carry to (carry, nothing)."""

    config: DecoderConfig
    place: Place = keep

    @nn.compact
    def __call__(
        self, carry: _Carry, context: _Context, slides: _Slides | None = None
    ) -> tuple[_Carry, None]:
        """Adds attention and MLP to the residual stream.

        Args:
          carry: the residual stream and the cache.
          context: of all layers.
          slides: whether this layer does; by default as all do.
        """
        x, cache = carry
        x = checkpoint_name(x, remat.LAYER_INPUT)
        c = self.config
        if slides is None:
            slides = c.sliding_window is not None
        norm = functools.partial(RMSNorm, c)
        after_attention, before_mlp, after_mlp = (
            ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
            if c.post_norms
            else (None, "post_attention_layernorm", None)
        )
        attention = Attention(c, self.place, name="self_attn")
        h = self.place(norm(name="input_layernorm")(x), "inputs")
        out, cache = attention(h, cache, context, slides)
        out = self.place(out, "stream")
        x = x + (norm(name=after_attention)(out) if after_attention else out)
        mlp = (MLP if c.experts is None else MoE)(c, self.place, name="mlp")
        out = self.place(mlp(self.place(norm(name=before_mlp)(x), "inputs")), "stream")
        x = x + (norm(name=after_mlp)(out) if after_mlp else out)
        return (self.place(x, "stream"), cache), None


class Decoder(nn.Module):
    """The whole model: tokens to logits, or to hidden states and from there to logits.

    >>> logits = Decoder(config).apply({"params": params}, tokens)

    Attributes:
      config: what it computes.
      place: where activations lie on a mesh, such as `jlora.sharding.Activations(mesh)`. Its
        attribute `mesh`, if it has one, is what a TPU's attention kernels run on.
    """

    config: DecoderConfig
    place: Place = keep

    def setup(self):
        """Declares the parts."""
        c = self.config
        self.embed_tokens = Embedding(c)
        self.layers = nn.scan(
            _scanned_layer(c.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] (flax says int)
            length=c.num_layers,
            unroll=min(c.unroll, c.num_layers),
        )(c, self.place)
        self.norm = RMSNorm(c)
        if not c.tie_embeddings:
            self.lm_head = Head(c)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        padding_mask: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits of the token after each token.

        Args:
          tokens: `Int32[batch length]`.
          positions: `Int32[batch length]`; by default each segment counts its real tokens from 0,
            and with a cache goes on from the real tokens in it.
          segment_ids: `Int32[batch length]`, 0 for padding; attention stays inside a segment.
          padding_mask: `Bool[batch length]`, True for real tokens; padding may be on either side.
          cache: from `init_cache` or a call before; the tokens are those that come next. It must
            have free slots for them: that is not checked.

        Returns:
          `Float32[batch length vocab]`; with a cache, that and the new cache.
        """
        x = self.hidden(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            padding_mask=padding_mask,
            cache=cache,
        )
        if cache is None:
            return self.head(x)
        return self.head(x[0]), x[1]

    def head(self, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """Logits of hidden states: `[... d]` to `[... vocab]`, of `dtype`, summed in float32."""
        top = self.embed_tokens.attend if self.config.tie_embeddings else self.lm_head
        cap = self.config.logit_softcap
        logits = self.place(top(x, dtype if cap is None else jnp.float32), "logits")
        return logits if cap is None else (cap * jnp.tanh(logits / cap)).astype(dtype)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        padding_mask: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The normalised states that `head` takes, `[batch length d]`; arguments as of a call."""
        _check_shapes(tokens, positions, segment_ids, padding_mask, cache)
        if cache is None:
            if padding_mask is not None:
                ids = 1 if segment_ids is None else segment_ids
                segment_ids = jnp.where(padding_mask, ids, 0)
            if positions is None:
                positions = _positions(tokens, segment_ids)
            last = rotary.last_positions(positions, segment_ids)
            context = _Context(*self._angles(positions, last), segment_ids=segment_ids)
            x = self.place(self.embed_tokens(tokens), "stream")
            return self.place(self.norm(self._through_layers((x, None), context)[0]), "inputs")

        if padding_mask is None:
            padding_mask = jnp.ones(tokens.shape, bool)
        if positions is None:
            seen = cache.valid.sum(axis=-1, keepdims=True, dtype=jnp.int32)
            positions = seen + jnp.maximum(_count(padding_mask) - 1, 0)
        valid = jax.lax.dynamic_update_slice(cache.valid, padding_mask, (0, cache.index))
        length, slots = tokens.shape[1], valid.shape[1]
        mask, local_mask = kv_cache.masks(valid, cache.index, length, self.config.sliding_window)
        # Keys in the cache are rotated already, so the frequencies of all calls must be the same:
        # those for the longest text that fits.
        angles = self._angles(positions, slots - 1)
        context = _Context(*angles, mask=mask, local_mask=local_mask, index=cache.index)
        layers = (cache.keys, cache.values, jnp.zeros((), jnp.int32))
        x, layers = self._through_layers((self.embed_tokens(tokens), layers), context)
        return self.norm(x), Cache(layers[0], layers[1], valid, cache.index + length)

    def _through_layers(self, carry: _Carry, context: _Context) -> Any:
        c = self.config
        looped = c.unroll < c.num_layers or c.remat == "none" or self.is_initializing()
        if looped or carry[1] is not None:
            slides = jnp.asarray(c.sliding_layers) if c.sliding_layers else None
            return self.layers(carry, context, slides)[0]

        # A loop of Python, where nn.scan would cut all layers out of the stack beforehand: here it
        # is part of what is computed again, and no slice lives until the backward pass.
        def run(index: int, stack: Any, carry: _Carry, context: _Context) -> _Carry:
            params = jax.tree.map(lambda w: jax.lax.index_in_dim(w, index, keepdims=False), stack)
            layer = Layer(c, self.place, parent=None)
            return layer.apply({"params": params}, carry, context, c.slides[index])[0]

        stack = self.variables["params"]["layers"]
        for index in range(c.num_layers):
            carry = remat.wrap(functools.partial(run, index), c.remat)(stack, carry, context)
        return carry

    def _angles(self, positions: jax.Array, last: jax.Array | int) -> tuple[_Angles, _Angles]:
        """Of full layers and of sliding ones; for `last` see `rotary.angles`."""
        c = self.config
        angles = rotary.angles(positions, c.rotary_dim, c.rope_theta, c.rope_scaling, last)
        if c.local_rope_theta is None:
            return angles, angles
        return angles, rotary.angles(positions, c.rotary_dim, c.local_rope_theta)


def _scanned_layer(name: str) -> type[nn.Module]:
    if name == "none":
        return Layer
    return nn.remat(Layer, policy=remat.policy(name), prevent_cse=False)


def _choose(slides: _Slides, local: Any, full: Any) -> Any:
    if local is full:
        return full
    if isinstance(slides, bool):
        return local if slides else full
    return jax.tree.map(lambda a, b: jnp.where(slides, a, b), local, full)


def _count(real: jax.Array) -> jax.Array:
    return jnp.cumsum(real, axis=-1, dtype=jnp.int32)


def _positions(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Positions that start from 0 in every run of equal segment ids."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if segment_ids is None:
        return index
    first = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def _check_shapes(
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    padding_mask: jax.Array | None,
    cache: Cache | None,
) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be integers [batch, length], got {tokens.dtype} {tokens.shape}."
        )
    given = {"positions": positions, "segment_ids": segment_ids, "padding_mask": padding_mask}
    for name, value in given.items():
        if value is not None and value.shape != tokens.shape:
            raise ValueError(
                f"{name} must have the shape of tokens, {tokens.shape}, got {value.shape}."
            )
    if padding_mask is not None and padding_mask.dtype != bool:
        raise ValueError(f"padding_mask must be boolean, got {padding_mask.dtype}.")
    if cache is None:
        return
    if segment_ids is not None:
        raise ValueError("segment_ids are for training on packed rows; pass a cache or these.")
    batch, slots = cache.valid.shape
    if batch != tokens.shape[0] or slots < tokens.shape[1]:
        raise ValueError(
            f"The cache has {batch} rows of {slots} slots; tokens of shape {tokens.shape} do not "
            "fit. Make it with init_cache(config, batch_size, length)."
        )
