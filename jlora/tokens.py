"""New tokens: added to a tokenizer's files, with room made for them in a model.

>>> files, ids = jlora.tokens.add(jlora.models.tokenizer_files(name), ["<tool>", "</tool>"])
>>> model, params = jlora.tokens.grow(*jlora.models.load(name), max(ids) + 1)
>>> config = jlora.LoraConfig(targets=("q_proj", "v_proj"), rows={"embed_tokens": ids})
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers

from jlora.chat import tokenizer_json
from jlora.quant import QuantArray, format_of, pack_weight

__all__ = ["add", "grow"]


def add(
    files: Mapping[str, str], new_tokens: Sequence[str]
) -> tuple[dict[str, str], tuple[int, ...]]:
    """Adds tokens to a tokenizer, each one id wherever a text spells it.

    Args:
      files: of the tokenizer, name to text, `tokenizer.json` among them.
      new_tokens: texts; one that the tokenizer has already keeps its id.

    Returns:
      The files with a new `tokenizer.json`, and the ids of the tokens, in their order.

    Raises:
      ValueError: if a token is empty or given twice, or `tokenizer.json` is absent or broken.
    """
    if not all(new_tokens) or len(set(new_tokens)) < len(new_tokens):
        raise ValueError(f"New tokens must be different texts, none empty, got {[*new_tokens]}.")
    if not new_tokens:
        return dict(files), ()
    text = tokenizer_json(files)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises the bare class
        raise ValueError(f"tokenizer.json cannot be read: {error}") from error
    plain = [tokenizers.AddedToken(text, normalized=False) for text in new_tokens]
    backend.add_tokens(plain)
    vocab = backend.get_vocab()
    ids = tuple(vocab[text] for text in new_tokens)
    return {**files, "tokenizer.json": backend.to_str()}, ids


def grow(model: Any, params: Any, vocab_size: int) -> tuple[Any, Any]:
    """Gives a decoder rows for at least so many tokens; a larger table stays as it is.

    New rows are the mean of the old ones, in the embedding and in the head of an untied model, so
    that a new token begins as an average one.

    Args:
      model: a `Decoder`.
      params: its weights, plain or quantised, without adapters; or `ShapeDtypeStruct`s.
      vocab_size: tokens, e.g. the largest id and one.

    Returns:
      The model with its new `vocab_size`, and the weights.
    """
    more = vocab_size - model.config.vocab_size
    if more <= 0:
        return model, params

    def widen(table: Any, axis: int) -> Any:
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(table)):
            return jax.eval_shape(functools.partial(_widen, more=more, axis=axis), table)
        return _widen(table, more, axis)

    grown = {**params, "embed_tokens": {"embedding": widen(params["embed_tokens"]["embedding"], 0)}}
    if not model.config.tie_embeddings:
        grown["lm_head"] = {"kernel": widen(params["lm_head"]["kernel"], 1)}
    return type(model)(dataclasses.replace(model.config, vocab_size=vocab_size)), grown


def _widen(table: Any, more: int, axis: int) -> Any:
    dense = table.materialise() if isinstance(table, QuantArray) else table
    mean = dense.astype(jnp.float32).mean(axis, keepdims=True).astype(table.dtype)
    new = jnp.repeat(mean, more, axis)
    if not isinstance(table, QuantArray):
        return jnp.concatenate([table, new], axis)
    if table.axes[axis] != "out":  # then blocks run over the ends of old and new
        raise NotImplementedError(
            f"The vocabulary is axis {axis} of a table packed with axes {table.axes}: its blocks "
            "would hold old and new tokens. Grow the model first and quantise it afterwards."
        )
    # Row by row a token. The scales of blocks stay apart, or those of old tokens would change.
    packed = pack_weight(new, table.axes, format_of(table), double_quantize=False)
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new]), table.divisible(), packed)
