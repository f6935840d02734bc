"""Prefill, decode and sample with a key-value cache: given a forward function, knows no model.

A row's prompt without its last token is prefilled; that token then starts the decode loop, one
token a step. So the logits of a whole prompt, often the largest array of a run, are never used and
XLA drops the head's product from the prefill.

Prompts are padded on the left to a width taken from a short list, so that prompts of many lengths
share few compilations. Compiled programs are kept per `forward` and `init_cache`: pass the same
function objects again, and parameters stay arguments of the program, never constants in it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.multihost import to_host

__all__ = ["generate", "nucleus", "sample", "stream"]

Forward = Callable[..., tuple[jax.Array, Any]]
InitCache = Callable[[int, int], Any]

_NAN = -1  # what `sample` draws from logits that hold a NaN: no token has this id


def generate(
    forward: Forward,
    init_cache: InitCache,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    key: jax.Array,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> list[list[int]]:
    """Continues every prompt of a batch, in one compiled loop that ends when all rows have.

    A row's text depends on its prompt, its place in the batch and `key`, not on its neighbours,
    up to the rounding that padding and the batch's size bring to the logits.

    Args:
      forward: `forward(params, tokens, *, positions, padding_mask, cache) -> (logits, cache)`;
        `tokens`, `positions` and `padding_mask` are `[batch, length]`, and the cache remembers
        which of its entries are padding. With adapters in place, `jlora.adapt` of such a function.
      init_cache: `init_cache(batch_size, length)` gives an empty cache of `length` tokens.
      params: as `forward` takes them: plain, merged, quantised or with adapters.
      prompts: token ids, of any lengths of at least 1.
      max_new_tokens: tokens a row may grow by.
      key: row `i` draws its `t`-th token with `fold_in(fold_in(key, i), t)`.
      temperature: 0 takes the likeliest token; else logits are divided by it.
      top_p: samples from the smallest set of tokens with at least this probability.
      eos_ids: tokens that end a row.
      pad_id: fills the padding; any valid id, since it is masked.

    Returns:
      The new tokens of each row, without the one that ended it: a row of fewer than
      `max_new_tokens` tokens met one of `eos_ids`.

    Raises:
      ValueError: on an argument out of its range.
      FloatingPointError: if the model's logits hold a NaN.
    """
    _check(prompts, max_new_tokens, temperature, top_p)
    if len(prompts) == 0:
        return []
    tokens, lengths = _left_pad(prompts, pad_id)
    room = _bucket(max_new_tokens)
    new = _run(
        params,
        tokens,
        lengths,
        key,
        np.asarray(eos_ids, np.int32),
        np.int32(max_new_tokens),
        np.float32(temperature),
        np.float32(top_p),
        np.int32(pad_id),
        forward=forward,
        init_cache=init_cache,
        room=room,
        sampled=temperature > 0,
        filtered=temperature > 0 and top_p < 1,
    )
    stops = {int(token) for token in eos_ids}
    return [_until_stop(row[:max_new_tokens], stops) for row in to_host(new).tolist()]


def stream(
    forward: Forward,
    init_cache: InitCache,
    params: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    key: jax.Array,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> Iterator[int]:
    """Yields the tokens that `generate` would give for one prompt, each as soon as it is there.

    Args are those of `generate`. Arguments are checked now, not at the first token. The cache is
    donated from step to step, so it exists once.
    """
    _check([prompt], max_new_tokens, temperature, top_p)
    tokens, lengths = _left_pad([prompt], pad_id)
    step = functools.partial(
        _step, forward=forward, sampled=temperature > 0, filtered=temperature > 0 and top_p < 1
    )
    stops = {int(token) for token in eos_ids}

    def steps() -> Iterator[int]:
        length = tokens.shape[1] - 1 + _bucket(max_new_tokens)
        cache = _prefill_jit(
            params, tokens, lengths, forward=forward, init_cache=init_cache, length=length
        )
        token = tokens[:, -1]
        for index in range(max_new_tokens):
            token, cache = step(
                params,
                cache,
                token,
                lengths,
                np.int32(index),
                key,
                np.float32(temperature),
                np.float32(top_p),
            )
            value = int(token[0])
            _refuse_nan(value)
            if value in stops:
                return
            yield value

    return steps()


def sample(
    keys: jax.Array,
    logits: jax.Array,
    *,
    temperature: jax.Array | float,
    top_p: jax.Array | float = 1.0,
) -> jax.Array:
    """Draws one token a row from `softmax(logits / temperature)`, cut to its nucleus.

    Args:
      keys: `Key[batch]`, one a row.
      logits: `Float[batch vocab]`.
      temperature: above 0.
      top_p: in (0, 1]; a Python 1.0 leaves the cut out.

    Returns:
      `Int[batch]`; -1 for a row whose logits hold a NaN.
    """
    logits = logits.astype(jnp.float32)
    spread = logits - jnp.max(
        logits, axis=-1, keepdims=True
    )  # a tiny temperature gives -inf, not NaN
    scaled = spread / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    if not (isinstance(top_p, float) and top_p == 1.0):
        scaled = jnp.where(nucleus(scaled, top_p), scaled, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return jnp.where(jnp.isnan(logits).any(-1), _NAN, drawn)


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Marks the likeliest tokens that together reach the probability `top_p` (arXiv:1904.09751).

    It is the smallest such set: without its least likely token the mass is below `top_p`. Of tokens
    of one probability those of the lower id come first. The likeliest token is always in.

    Args:
      logits: `Float[*batch vocab]`.
      top_p: in (0, 1].

    Returns:
      `Bool[*batch vocab]`.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    mass_before = jnp.cumsum(ranked, axis=-1) - ranked
    kept = (mass_before < top_p).at[..., 0].set(True)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)


@functools.partial(
    jax.jit, static_argnames=("forward", "init_cache", "room", "sampled", "filtered")
)
def _run(
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    eos_ids: jax.Array,
    limit: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    pad_id: jax.Array,
    *,
    forward: Forward,
    init_cache: InitCache,
    room: int,
    sampled: bool,
    filtered: bool,
) -> jax.Array:
    """The whole of `generate` on the device: `Int[batch room]`, columns from `limit` on unused."""
    batch, width = tokens.shape
    cache = _prefill(params, tokens, lengths, forward, init_cache, width - 1 + room)

    def going(state: tuple) -> jax.Array:
        index, _, done, _, _ = state
        return (index < limit) & ~jnp.all(done)

    def body(state: tuple) -> tuple:
        index, token, done, new, cache = state
        drawn, cache = _advance(
            params,
            cache,
            token,
            lengths,
            index,
            key,
            temperature,
            top_p,
            forward=forward,
            sampled=sampled,
            filtered=filtered,
        )
        token = jnp.where(done, pad_id, drawn)
        new = new.at[:, index].set(jnp.where(done, new[:, index], drawn))
        done |= (drawn[:, None] == eos_ids).any(-1) | (drawn == _NAN)
        return index + 1, token, done, new, cache

    new = jnp.zeros((batch, room), jnp.int32)
    done = jnp.zeros(batch, bool)
    state = (jnp.int32(0), tokens[:, -1], done, new, cache)
    return jax.lax.while_loop(going, body, state)[3]


def _prefill(
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    forward: Forward,
    init_cache: InitCache,
    length: int,
) -> Any:
    """A cache of `length` tokens that holds every prompt but its last token."""
    batch, width = tokens.shape
    positions = jnp.arange(width - 1) - (width - lengths[:, None])
    _, cache = forward(
        params,
        tokens[:, :-1],
        positions=jnp.maximum(positions, 0),
        padding_mask=positions >= 0,
        cache=init_cache(batch, length),
    )
    return cache


def _advance(
    params: Any,
    cache: Any,
    token: jax.Array,
    lengths: jax.Array,
    index: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    forward: Forward,
    sampled: bool,
    filtered: bool,
) -> tuple[jax.Array, Any]:
    """Feeds one token a row, draws the `index`-th new one: (`Int[batch]`, cache)."""
    logits, cache = forward(
        params,
        token[:, None],
        positions=(lengths - 1 + index)[:, None],
        padding_mask=jnp.ones((token.shape[0], 1), bool),
        cache=cache,
    )
    logits = logits[:, -1]
    if not sampled:
        drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jnp.where(jnp.isnan(logits).any(-1), _NAN, drawn), cache

    def row_key(row: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, row), index)

    keys = jax.vmap(row_key)(jnp.arange(token.shape[0]))
    drawn = sample(keys, logits, temperature=temperature, top_p=top_p if filtered else 1.0)
    return drawn, cache


_prefill_jit = jax.jit(_prefill, static_argnames=("forward", "init_cache", "length"))
_step = jax.jit(
    _advance, static_argnames=("forward", "sampled", "filtered"), donate_argnames="cache"
)


def _check(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"Prompt {row} of {len(prompts)} is empty; a prompt needs at least one token, "
                "for instance the tokenizer's BOS."
            )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be 0 (the likeliest token) or a number above it, got {temperature}."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {top_p}.")


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as `Int[batch width]` with the padding on the left, and their lengths."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.full((len(prompts), _bucket(int(lengths.max()) - 1) + 1), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[-len(prompt) :] = prompt
    return tokens, lengths


def _bucket(length: int) -> int:
    """The next power of two from 16 to 512, then the next multiple of 512."""
    if length > 512:
        return -(-length // 512) * 512
    return max(16, 1 << (length - 1).bit_length()) if length > 0 else 16


def _until_stop(row: list[int], stops: set[int]) -> list[int]:
    for index, token in enumerate(row):
        _refuse_nan(token)
        if token in stops:
            return row[:index]
    return row


def _refuse_nan(token: int) -> None:
    if token == _NAN:
        raise FloatingPointError(
            "The model's logits hold a NaN, so no token can be drawn: a prompt has a token outside "
            "the vocabulary, or the weights or the adapter are broken (a diverged run?)."
        )
