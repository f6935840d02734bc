"""LoRA for any JAX function: a transform of parameter trees.

Importing this package loads jax and nothing heavier; `jlora.models`, `jlora.peft` and the other
modules load on first use of the name.
"""

import importlib
from typing import Any

from jlora import dora as _dora  # noqa: F401  registers a variant
from jlora import variants
from jlora import vera as _vera  # noqa: F401
from jlora.interpret import adapt
from jlora.lora import LoraArray, LoraConfig, init, labels, merge_params, split
from jlora.merging import merge_error
from jlora.quant import dequantize, quantize
from jlora.summary import summary
from jlora.tree import combine
from jlora.usage import explain, find_weights

__all__ = [
    "LoraArray",
    "LoraConfig",
    "adapt",
    "combine",
    "dequantize",
    "explain",
    "find_weights",
    "init",
    "labels",
    "lora_fa",
    "lora_plus",
    "merge_error",
    "merge_params",
    "optimizer",
    "quantize",
    "split",
    "summary",
    "variants",
]

__version__ = "0.1.0"

_HOMES = {
    "lora_fa": "optim",
    "lora_plus": "optim",
    "optimizer": "optim",
}  # these names import more than jax
_MODULES = (
    "arithmetic",
    "chat",
    "checkpoint",
    "config",
    "data",
    "docstrings",
    "fingerprint",
    "generate",
    "gptq",
    "losses",
    "measured",
    "models",
    "objective",
    "optim",
    "peft",
    "quant",
    "report",
    "sharding",
    "tokens",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jlora.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"jlora.{name}")
    raise AttributeError(f"module 'jlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])
