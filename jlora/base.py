"""A base model with its tokenizer: loaded by folder, file or name, ready to train or to speak."""

import dataclasses
import functools
import os
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jlora
from jlora import chat, models, sharding, tokens, tree
from jlora.leaf import is_array_leaf
from jlora.models import decoder
from jlora.models.weights import Formats

__all__ = [
    "Base",
    "Vocabulary",
    "adapt_base",
    "cache_folder",
    "check_start",
    "load_base",
    "load_vocabulary",
    "program_folder",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer with the tokens that were added to it.

    Attributes:
      tokenizer: to encode and decode with.
      files: what that was read from, name to text, with what was added.
      new_tokens: ids of the tokens that were added.
      size: tokens that a model needs rows for, if it has fewer.
    """

    tokenizer: chat.Tokenizer
    files: Mapping[str, str]
    new_tokens: tuple[int, ...] = ()
    size: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """A base model.

    Attributes:
      name: as given to `load_base`.
      model: a `Decoder`.
      params: its weights; with adapters in place after `adapt_base`.
      vocabulary: its tokens.
      mesh: that the weights lie on; None for the default device.
    """

    name: str
    model: Any
    params: Any
    vocabulary: Vocabulary
    mesh: Mesh | None = None

    @property
    def tokenizer(self) -> chat.Tokenizer:
        """The tokenizer, with what was added."""
        return self.vocabulary.tokenizer

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that were added."""
        return self.vocabulary.new_tokens

    def apply(self, params: Any, tokens: jax.Array, **kwargs: Any) -> Any:
        """The model's logits; knows nothing of adapters and of quantised weights."""
        return self.model.apply({"params": params}, tokens, **kwargs)

    @functools.cached_property
    def forward(self) -> Callable[..., Any]:
        """`apply` on a tree with adapters or quantised weights."""
        return jlora.adapt(self.apply)

    @functools.cached_property
    def init_cache(self) -> Callable[[int, int], Any]:
        """An empty cache of (batch_size, length)."""
        return functools.partial(decoder.init_cache, self.model.config)


def cache_folder() -> Path:
    """Where the user's machine keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jlora"


def program_folder() -> Path:
    """Where compiled programs are kept; one for another kind of processor may not run on this."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}" if lines else platform.machine()
    return cache_folder() / f"programs-{kind}"


def load_vocabulary(
    name: str, new_tokens: Sequence[str] = (), *, folder: str | os.PathLike[str] | None = None
) -> Vocabulary:
    """The tokens of a model, without its weights.

    Args:
      name: as in `load_base`.
      new_tokens: to add.
      folder: if it holds a tokenizer.json, that is taken, and the model gets room for what it has
        more than the model's: adapters with new tokens bring one.
    """
    files, ids = tokens.add(models.tokenizer_files(name), new_tokens)
    tokenizer, size = chat.Tokenizer.from_files(files), max(ids, default=-1) + 1
    if folder is not None and (Path(folder) / "tokenizer.json").is_file():
        files = models.tokenizer_files(folder)
        before, tokenizer = tokenizer, chat.Tokenizer.from_files(files)
        size = tokenizer.vocab_size if tokenizer.vocab_size > before.vocab_size else size
    return Vocabulary(tokenizer, files, ids, size)


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    remat: str = "none",
    unroll: int = 1,
    quantize: Formats = None,
    cache: bool = False,
    weights: bool = True,
    vocabulary: Vocabulary | None = None,
    mesh: Mesh | None = None,
) -> Base:
    """Loads a model and its tokenizer.

    Args:
      name: a Hugging Face folder, a `.gguf` file or a name that `models.resolve` knows.
      dtype: of the weights and the computation; "auto" is bfloat16 on GPU and TPU and float32 on
        CPU, which has no fast bfloat16.
      remat: as in `DecoderConfig`.
      unroll: likewise.
      quantize: as in `models.load`.
      cache: whether to keep quantised weights in the user's cache folder for the next start.
      weights: False gives `ShapeDtypeStruct`s, to look at a model larger than this machine's
        memory.
      vocabulary: from `load_vocabulary`, if it is there already; the model gets room for it.
      mesh: to spread the weights over by `sharding.DECODER_RULES`, and the activations.
    """
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if weights:
        folder = cache_folder() / "packed" if cache else None
        place = None if mesh is None else sharding.placement(mesh, sharding.DECODER_RULES)
        model, params = models.load(
            name, dtype=dtype, quantize=quantize, sharding=place, cache=folder
        )
    else:
        model, params = models.shapes(name, dtype=dtype, quantize=quantize)
    options = {} if mesh is None else {"place": sharding.Activations(mesh)}
    model = type(model)(dataclasses.replace(model.config, remat=remat, unroll=unroll), **options)
    vocabulary = vocabulary or load_vocabulary(name)
    model, params = tokens.grow(model, params, vocabulary.size)
    return Base(name, model, params, vocabulary, mesh)


def check_start(lora: jlora.LoraConfig, mesh: Mesh | None) -> None:
    """Refuses a start that `adapt_base` does not know on a mesh.

    Raises:
      NotImplementedError: for a `lora.init` that changes the base, or `lora.rows`, on a mesh.
    """
    if mesh is not None and (lora.init != "default" or lora.rows):
        raise NotImplementedError(
            "On a mesh of devices a run begins with lora.init=default and trains no single rows "
            "(model.new_tokens, lora.rows). Leave these out, or leave out mesh to use one device."
        )


def adapt_base(
    base: Base, lora: jlora.LoraConfig, key: jax.Array, *, originals: Any = None
) -> Base:
    """Puts fresh adapters into the weights, on a mesh each beside its weight.

    On a mesh, those that `check_start` lets pass.

    Args:
      base: without adapters.
      lora: the config.
      key: of the adapters' start.
      originals: for a `lora.init` over quantised weights, those before quantising.
    """
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    init = functools.partial(jlora.init, config=lora, fn=base.apply, args=(example,))
    leaves = jax.tree.leaves(base.params)
    if base.mesh is None or isinstance(leaves[0], jax.ShapeDtypeStruct):
        return dataclasses.replace(base, params=init(key, base.params, base=originals))
    adapted = jax.eval_shape(init, key, base.params)
    where = sharding.shardings(adapted, base.mesh, sharding.DECODER_RULES)

    def without_weight(path: str, leaf: Any) -> Any:
        if isinstance(leaf, jlora.LoraArray):
            return dataclasses.replace(leaf, w=hole(leaf.w))
        return leaf if lora.trains_whole(path) else hole(leaf)

    def hole(leaf: Any) -> Any:  # None in the places of a quantised leaf's arrays
        return jax.tree.map(lambda _: None, leaf)

    def without_adapter(path: str, leaf: Any, weight: Any) -> Any:
        if isinstance(leaf, jlora.LoraArray):
            return dataclasses.replace(leaf, w=weight, **dict.fromkeys(leaf.arrays))
        return hole(weight) if lora.trains_whole(path) else weight

    def added(params: Any) -> Any:
        return tree.map_with_path(without_weight, params, is_leaf=is_array_leaf)

    # Weights go in and do not come out, or the program would copy them.
    make = jax.jit(lambda key, params: added(init(key, params)), out_shardings=added(where))
    weights = tree.map_with_path(without_adapter, adapted, base.params, is_leaf=is_array_leaf)
    return dataclasses.replace(base, params=tree.combine(make(key, base.params), weights))
