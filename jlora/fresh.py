"""What a run begins with: mesh, `LoraConfig`, and fresh adapters that are the same each time."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jlora
from jlora import config, devices
from jlora.base import Base, adapt_base, load_base
from jlora.fingerprint import fingerprint
from jlora.leaf import is_array_leaf

__all__ = ["adapt_run", "lora_config", "make_mesh", "read_originals", "start_digest"]


def lora_config(run: config.RunConfig, base: Base | None = None) -> jlora.LoraConfig:
    """The `LoraConfig` of a run; given the base, with the rows of its new tokens."""
    fields = run.lora.model_dump()
    if base is not None and base.new_tokens:
        tables = ["embed_tokens"] + ["lm_head"] * (not base.model.config.tie_embeddings)
        if named := set(tables) & {*fields["rows"], *fields["train"], *fields["targets"]}:
            raise ValueError(
                f"model.new_tokens trains rows of {', '.join(tables)}: leave {sorted(named)} out "
                "of lora.rows, lora.train and lora.targets."
            )
        fields["rows"] |= dict.fromkeys(tables, base.new_tokens)
        if len(tables) > 1:
            exclude = fields["exclude"]
            fields["exclude"] = (*([exclude] if isinstance(exclude, str) else exclude), "lm_head")
    return jlora.LoraConfig(**fields)


def make_mesh(run: config.RunConfig, on: Sequence[Any]) -> Mesh | None:
    """The mesh that a run makes of devices; None for the default device.

    Raises:
      ValueError: if its sizes do not fit the devices, or the rows of a batch do not fit it.
    """
    mesh = devices.make_mesh(None if run.mesh is None else run.mesh.model_dump(), on)
    rows = {"train.batch_size": run.train.batch_size, "eval.batch_size": run.eval.batch_size}
    devices.check_rows(mesh, rows)
    return mesh


def adapt_run(run: config.RunConfig, base: Base) -> Base:
    """Puts a run's fresh adapters into its base: each time the same, which nothing else keeps.

    Raises:
      ValueError: if `lora.init` needs original weights and there are none.
    """
    lora = lora_config(run, base)
    return adapt_base(base, lora, jax.random.key(run.seed), originals=read_originals(run, base))


def read_originals(run: config.RunConfig, base: Base) -> Any:
    """The weights before quantising, where `lora.init` starts from them; else None."""
    if run.lora.init == "default" or run.model.quantize is None:
        return None
    dense = load_base(run.model.path, dtype=run.model.dtype, vocabulary=base.vocabulary).params
    if any(map(is_array_leaf, jlora.lora.leaves_by_path(dense).values())):
        raise ValueError(
            f"lora.init={run.lora.init!r} starts from the weights before they were quantised, and "
            f"{run.model.path} holds them in 4 bits only. Take the original model, or leave "
            "lora.init out."
        )
    return dense


def start_digest(params: Any) -> dict[str, str]:
    """Of a base that an initialiser changed and of the factors, to the bit."""
    bits = {
        f"{path}.{name}": jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        for path, leaf in jlora.lora.leaves_by_path(params).items()
        if isinstance(leaf, jlora.LoraArray)
        for name, x in leaf.present().items()
    }
    return fingerprint(params) | fingerprint(bits)
