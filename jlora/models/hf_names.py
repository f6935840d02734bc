"""What tensors of a Hugging Face folder are called, and which part of a parameter each one is."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Index", "hf_name", "is_transposed", "oriented", "parts", "tensor_shape"]

Index: TypeAlias = tuple[Any, ...]

# How files call the parts of a mixture of experts: the block, and an expert's gate, up and down.
_EXPERTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3"), "w2"),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj"), "down_proj"),
}


def hf_name(path: str) -> str:
    """The tensor name of a parameter, with `{}` for the number of its layer if it has one.

    >>> hf_name("layers/self_attn/q_proj/kernel")
    'model.layers.{}.self_attn.q_proj.weight'
    """
    *modules, leaf = path.split("/")
    suffix = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}.get(
        leaf
    )
    if not modules or suffix is None:
        raise KeyError(f"No Hugging Face name for the parameter {path!r}.")
    if modules[0] == "layers":
        modules[:1] = ["model", "layers", "{}"]
    elif modules[0] != "lm_head":
        modules[:0] = ["model"]
    if "experts" in modules:  # those are parameters there, of three dimensions, not modules
        return ".".join(modules)
    return ".".join([*modules, suffix])


def is_transposed(path: str) -> bool:
    """Whether the tensor in the file is the transpose of the parameter (of each of its layers)."""
    return path.endswith("/kernel")


def parts(
    path: str, shape: Sequence[int], family: str, *, stacked_experts: bool = False
) -> dict[str, Index]:
    """The tensors that a parameter is made of, and where in it each one goes.

    Files of a mixture of experts have a tensor for each expert's gate, up and down projection;
    `stacked_experts` stands for the newer layout, in which the experts of a layer are one tensor.
    """
    template = hf_name(path)
    if "{}" not in template:
        return {template: ()}
    layers = range(shape[0])
    if stacked_experts or family not in _EXPERTS or not path.startswith("layers/mlp/"):
        return {template.format(layer): (layer,) for layer in layers}
    block, halves, down = _EXPERTS[family]
    template = template.replace(".mlp.", f".{block}.")
    if "/experts/" not in path:
        return {template.format(layer): (layer,) for layer in layers}
    names = halves if "/gate_up_proj/" in path else (down,)
    width = shape[-1] // len(names)
    module = template.rpartition(".")[0]
    return {
        f"{module.format(layer)}.{expert}.{name}.weight": (
            layer,
            expert,
            slice(None),
            slice(i * width, (i + 1) * width),
        )
        for layer in layers
        for expert in range(shape[1])
        for i, name in enumerate(names)
    }


def tensor_shape(path: str, shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """The shape of the tensor that goes to a part of a parameter."""
    return oriented(np.broadcast_to(0, shape)[index], path).shape


def oriented(array: np.ndarray, path: str) -> np.ndarray:
    """From the layout of parameters to that of tensors, and back."""
    return array.swapaxes(-1, -2) if is_transposed(path) else array
