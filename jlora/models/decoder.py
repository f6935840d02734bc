"""A decoder-only transformer of the Llama family, in Flax Linen, with scanned layers.

One definition serves Llama, Mistral, Qwen2, SmolLM2 and kin; `DecoderConfig` says what differs.
Parameters of all layers are stacked on a leading axis; kernels are `[d_in, d_out]`:

    embed_tokens/embedding                      [vocab d]
    layers/self_attn/{q,k,v,o}_proj/kernel      [layers d_in d_out], with bias [layers d_out] if any
    layers/mlp/{gate,up,down}_proj/kernel       [layers d_in d_out]
    layers/{input,post_attention}_layernorm/scale   [layers d]
    norm/scale                                  [d]
    lm_head/kernel                              [d vocab], unless tied to the embedding
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jlora.models import remat, rotary
from jlora.models.attention import cached_attention, causal_attention
from jlora.models.rotary import RopeScaling

__all__ = ["Cache", "Decoder", "DecoderConfig", "RopeScaling", "init_cache", "param_shapes"]

_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder and how it computes.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLP.
      num_layers: decoder layers.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of one head.
      max_positions: tokens the model was made for; kept for files, not enforced.
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None or how they are stretched.
      tie_embeddings: whether the head is the embedding's transpose.
      qkv_bias: whether q, k and v projections add a bias.
      o_bias: whether the attention's output projection adds a bias.
      mlp_bias: whether the MLP's projections add a bias.
      dtype: of activations and products; statistics, softmax and logits are float32.
      remat: what the backward pass computes again, a name in `remat.POLICIES` or "keep:...".
      unroll: layers in one iteration of the loop over them. With all of them there is no loop: the
        program is faster, because nothing is copied into stacks, and compiles for longer.
      family: the architecture's name in files: "llama", "mistral" or "qwen2".
      bos_token_id: kept for files.
      eos_token_ids: kept for files.
      pad_token_id: kept for files.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    family: str = "llama"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                      "unroll"):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
        remat.check(self.remat)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "valid", "index"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far. All rows of a batch fill the same slots.

    Attributes:
      keys: `[layers batch kv_heads slots head_dim]`, rotated.
      values: like `keys`.
      valid: `Bool[batch slots]`, False in slots that are empty or hold padding.
      index: `Int32[]`, the next free slot.
    """

    keys: jax.Array
    values: jax.Array
    valid: jax.Array
    index: jax.Array


def param_shapes(config: DecoderConfig) -> dict[str, Any]:
    """The parameter tree as float32 `ShapeDtypeStruct`s; nothing is computed."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


def init_cache(config: DecoderConfig, batch_size: int, length: int, dtype: Any = None) -> Cache:
    """An empty cache.

    Args:
      config: of the decoder.
      batch_size: rows.
      length: slots, for prompts (padding included) and new tokens together.
      dtype: of keys and values, `config.dtype` by default.
    """
    shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_dim)
    dtype = jnp.dtype(dtype or config.dtype)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch_size, length), bool),
        index=jnp.zeros((), jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class _Context:
    """What every layer shares: rotary angles, who sees whom, and where new keys go."""

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array | None = None
    mask: jax.Array | None = None
    index: jax.Array | None = None


jax.tree_util.register_dataclass(
    _Context, data_fields=["cos", "sin", "segment_ids", "mask", "index"], meta_fields=[]
)

# The residual stream; with a cache also all its keys and values and the number of the layer.
_Carry: TypeAlias = tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array] | None]


class Linear(nn.Module):
    """`x @ kernel`, plus a bias if asked."""

    features: int
    use_bias: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the last axis of `x` to `features`."""
        kernel = self.param("kernel", _normal, (x.shape[-1], self.features))
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return checkpoint_name(y, self.name or "")


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32, and scales."""

    epsilon: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x`; the result has the compute dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return _rms_norm(x, scale.astype(self.dtype), self.epsilon)


# Elementwise, so computing it again is cheaper than keeping its float32 intermediates.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return y.astype(scale.dtype) * scale


@functools.partial(jax.checkpoint, prevent_cse=False)
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


class Embedding(nn.Module):
    """A table of token vectors, also used as the head of a tied model."""

    config: DecoderConfig

    def setup(self):
        """Declares the table."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = self.param("embedding", _normal, shape)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The vectors of tokens; NaN for a token that is not in the vocabulary."""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.config.dtype)

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
        kernel = self.param("kernel", _normal, shape).astype(self.config.dtype)
        return jnp.matmul(x, kernel, preferred_element_type=dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: Any, context: _Context) -> tuple[jax.Array, Any]:
        """Attends; with a cache, puts the new keys and values into it first."""
        c = self.config
        linear = functools.partial(Linear, dtype=c.dtype)
        kv_features = c.num_kv_heads * c.head_dim
        q = linear(c.num_heads * c.head_dim, c.qkv_bias, name="q_proj")(x)
        k = linear(kv_features, c.qkv_bias, name="k_proj")(x)
        v = linear(kv_features, c.qkv_bias, name="v_proj")(x)
        q, k, v = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in (q, k, v))
        q, k = (rotary.rotate(y, context.cos, context.sin) for y in (q, k))
        if cache is None:
            out = causal_attention(q, k, v, segment_ids=context.segment_ids)
        else:
            assert context.mask is not None
            cache, k, v = _update(cache, k, v, context.index)
            out = cached_attention(q, k.astype(q.dtype), v.astype(q.dtype), context.mask)
        out = out.reshape(*x.shape[:2], -1)
        return linear(c.hidden_size, c.o_bias, name="o_proj")(out), cache


class MLP(nn.Module):
    """The gated feed-forward block."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`down(silu(gate(x)) * up(x))`."""
        c = self.config
        linear = functools.partial(Linear, use_bias=c.mlp_bias, dtype=c.dtype)
        gate = linear(c.intermediate_size, name="gate_proj")(x)
        up = linear(c.intermediate_size, name="up_proj")(x)
        return linear(c.hidden_size, name="down_proj")(_swiglu(gate, up))


class Layer(nn.Module):
    """One decoder layer, in the form that `nn.scan` wants: carry to (carry, nothing)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry: _Carry, context: _Context) -> tuple[_Carry, None]:
        """Adds attention and MLP to the residual stream."""
        x, cache = carry
        x = checkpoint_name(x, remat.LAYER_INPUT)
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, self.config.dtype)
        attention = Attention(self.config, name="self_attn")
        out, cache = attention(norm(name="input_layernorm")(x), cache, context)
        x = x + out
        mlp = MLP(self.config, name="mlp")
        x = x + mlp(norm(name="post_attention_layernorm")(x))
        return (x, cache), None


class Decoder(nn.Module):
    """The whole model: tokens to logits, or to hidden states and from there to logits.

    >>> logits = Decoder(config).apply({"params": params}, tokens)
    """

    config: DecoderConfig

    def setup(self):
        """Declares the parts."""
        c = self.config
        self.embed_tokens = Embedding(c)
        self.layers = nn.scan(
            _scanned_layer(c.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (flax says int)
            length=c.num_layers,
            unroll=min(c.unroll, c.num_layers),
        )(c)
        self.norm = RMSNorm(c.rms_norm_eps, c.dtype)
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
        return top(x, dtype)

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
            context = _Context(*self._angles(positions), segment_ids=segment_ids)
            return self.norm(self._through_layers(self.embed_tokens(tokens), context))

        if padding_mask is None:
            padding_mask = jnp.ones(tokens.shape, bool)
        if positions is None:
            seen = cache.valid.sum(axis=-1, keepdims=True, dtype=jnp.int32)
            positions = seen + jnp.maximum(_count(padding_mask) - 1, 0)
        valid = jax.lax.dynamic_update_slice(cache.valid, padding_mask, (0, cache.index))
        slots = jnp.arange(valid.shape[1])
        causal = slots <= cache.index + jnp.arange(tokens.shape[1])[:, None]  # [length slots]
        cos, sin = self._angles(positions)
        context = _Context(cos, sin, mask=causal & valid[:, None], index=cache.index)
        layers = (cache.keys, cache.values, jnp.zeros((), jnp.int32))
        (x, layers), _ = self.layers((self.embed_tokens(tokens), layers), context)
        index = cache.index + tokens.shape[1]
        return self.norm(x), Cache(layers[0], layers[1], valid, index)

    def _through_layers(self, x: jax.Array, context: _Context) -> jax.Array:
        c = self.config
        if c.unroll < c.num_layers or c.remat == "none" or self.is_initializing():
            return self.layers((x, None), context)[0][0]

        # A loop of Python, where nn.scan would cut all layers out of the stack beforehand: here it
        # is part of what is computed again, and no slice lives until the backward pass.
        def run(index: int, stack: Any, x: jax.Array, context: _Context) -> jax.Array:
            params = jax.tree.map(lambda w: jax.lax.index_in_dim(w, index, keepdims=False), stack)
            return Layer(c, parent=None).apply({"params": params}, (x, None), context)[0][0]

        stack = self.variables["params"]["layers"]
        for index in range(c.num_layers):
            x = remat.wrap(functools.partial(run, index), c.remat)(stack, x, context)
        return x

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        return rotary.angles(positions, c.head_dim, c.rope_theta, c.rope_scaling)


def _scanned_layer(name: str) -> type[nn.Module]:
    if name == "none":
        return Layer
    return nn.remat(Layer, policy=remat.policy(name), prevent_cse=False)


def _update(
    cache: tuple[jax.Array, jax.Array, jax.Array], k: jax.Array, v: jax.Array, index: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """Writes this layer's new keys and values; returns the cache and this layer's part of it."""
    keys, values, layer = cache

    def put(whole: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.swapaxes(new, 1, 2).astype(whole.dtype)[
            None
        ]  # [1 batch kv_heads length head_dim]
        return jax.lax.dynamic_update_slice(whole, new, (layer, 0, 0, index, 0))

    keys, values = put(keys, k), put(values, v)
    k, v = (jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False) for whole in (keys, values))
    return (keys, values, layer + 1), k, v


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
