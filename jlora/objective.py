"""The loss that a decoder with adapters trains on: where a model, LoRA and `train` meet."""

import functools
from typing import Any

import jax

import jlora
from jlora import losses, train

__all__ = ["make_loss"]


def make_loss(
    model: Any,
    params: Any,
    lora: jlora.LoraConfig,
    *,
    chunk_tokens: int | None = None,
    row_parts: int = 1,
) -> train.LossFn:
    """The loss of a micro-batch, for `train.make_train_step`.

    Args:
      model: a `Decoder`.
      params: its weights with adapters, or their shapes; tells whether the head trains.
      lora: of the adapters.
      chunk_tokens: tokens that go through the head together; each has `vocab_size` float32 logits
        and as many gradients. By default 128 on a CPU and 1024 elsewhere.
      row_parts: devices of a mesh that share a batch's rows, each with so many tokens.

    Returns:
      `loss_fn(params, batch, key) -> (loss_sum, token_count)`. A batch has `tokens`, `targets` and
      `loss_mask`, and may have `positions` and `segment_ids`, all `[batch length]`.
    """
    trained = jlora.split(params, lora)[0]
    top = "embed_tokens" if model.config.tie_embeddings else "lm_head"
    head_is_frozen = not jax.tree.leaves(trained[top])
    if chunk_tokens is None:
        # Small chunks skip more of the head; an accelerator wants larger products.
        chunk_tokens = 128 if jax.default_backend() == "cpu" else 1024

    def compute(params: Any, top_params: Any, batch: dict[str, jax.Array]) -> Any:
        hidden = model.apply(
            {"params": params},
            batch["tokens"],
            positions=batch.get("positions"),
            segment_ids=batch.get("segment_ids"),
            method="hidden",
        )
        head = functools.partial(model.apply, {"params": top_params}, method="head")
        return losses.head_cross_entropy(
            head,
            hidden,
            batch["targets"],
            batch["loss_mask"],
            chunk_tokens=chunk_tokens * row_parts,
            head_is_frozen=head_is_frozen,
            narrow_head=functools.partial(head, dtype=hidden.dtype),
        )

    def loss_fn(params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Any:
        dropout_key = key if lora.dropout else None
        top_params = {top: params[top]}
        if head_is_frozen:  # a stored one is restored once, not for each chunk
            top_params = jlora.dequantize(top_params)
        return jlora.adapt(compute, dropout_key=dropout_key)(params, top_params, batch)

    return loss_fn
