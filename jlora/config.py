"""One YAML file is one run: its keys, their checks, and `key=value` overrides.

Every key has its type, range and default here; an unknown key is an error that shows near names.
Paths are relative to the directory the command runs in, and absolute in the resolved file that a
run keeps, so that the run folder can be used from anywhere.
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import pydantic_core
import yaml

from jlora import config_checks

__all__ = ["RunConfig", "differences", "load", "save"]

_Fraction = Annotated[float, pydantic.Field(ge=0, lt=1)]
_Count = Annotated[int, pydantic.Field(ge=1)]
_Positive = Annotated[float, pydantic.Field(gt=0)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def _parts(size: int) -> int:
    if size < 1 and size != -1:
        expected = "at least 1, or -1 for what the other axes leave"
        raise pydantic_core.PydanticCustomError("parts", "{text}", {"text": expected})
    return size


_Parts = Annotated[int, pydantic.AfterValidator(_parts)]


def _remat(name: str) -> str:
    from jlora.models import remat  # with jax, which a wrong key need not wait for

    try:
        remat.check(name)
    except ValueError as error:
        expected = str(error).partition("must be ")[2].partition(", got ")[0]
        raise pydantic_core.PydanticCustomError("remat", "{text}", {"text": expected}) from None
    return name


class ModelConfig(_Section):
    """The base model.

    Attributes:
      path: a Hugging Face folder, a `.gguf` file, or a name on the hub.
      dtype: of the frozen weights and of the computation; auto is bfloat16 on GPU and TPU and
        float32 on CPU.
      remat: what the backward pass computes again to save memory. From most memory to least: none;
        dots (all but the projections); attention (all but attention's results); full (all); and
        offload (all, and layers' inputs wait in the host's memory). Or `keep:` and names of what
        to keep, such as keep:attention,q_proj,k_proj,v_proj.
      unroll: layers in one iteration of the loop over them. As many as there are or more make a
        faster program without a loop, which takes longer to compile.
      quantize: QLoRA: keeps the frozen weights of linear layers in nf4 (4.13 bits a parameter),
        int8 or float8, and computes in `dtype`; null for none.
      quantize_embeddings: a format for the embedding and an untied head too, of which int8 is
        nearly exact; null for none.
      calibrate: of the run's first batches, whose inputs the layers' NF4 weights are rounded to
        (GPTQ, arXiv:2210.17323); null rounds each element to its nearest code.
      cache: whether to keep the quantised weights on disk, for a faster next start.
      new_tokens: texts to add to the tokenizer; only their rows of the embedding train, and of an
        untied head.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    remat: Annotated[str, pydantic.AfterValidator(_remat)] = "none"
    unroll: _Count = 1
    quantize: Literal["nf4", "int8", "float8"] | None = None
    quantize_embeddings: Literal["nf4", "int8", "float8"] | None = None
    calibrate: _Count | None = None
    cache: bool = False
    new_tokens: tuple[str, ...] = ()

    @property
    def formats(self) -> Any:
        """What `jlora.models.load` takes as `quantize`."""
        if self.quantize_embeddings is None:
            return self.quantize
        return {"layers": self.quantize, "embeddings": self.quantize_embeddings}


class DataConfig(_Section):
    """Training and held-out examples.

    Attributes:
      train: a JSONL or text file, or `builtin:docstrings`, made from Python's standard library.
      validation: a file; or a fraction (below 1.0) or a number of the training rows to hold out;
        null for the built-in data's own, and otherwise for none.
      format: of the rows; auto looks at the first.
      text_field: the key of plain-text rows.
      completions_only: whether only the answers count in the loss.
      length: tokens in a row of a batch.
      too_long: what to do with an example longer than that: error, drop or truncate.
      pack: whether short examples share a row; they never attend to each other.
    """

    train: str
    validation: int | float | str | None = None
    format: Literal["auto", "messages", "completion", "alpaca", "text"] = "auto"
    text_field: str = "text"
    completions_only: bool = True
    length: Annotated[int, pydantic.Field(ge=2)] = 1024
    too_long: Literal["error", "drop", "truncate"] = "error"
    pack: bool = True


_INITS = r"default|olora|(pissa(_niter_\d+)?)|(loftq(_iter_[1-9]\d*)?)|eva|lora_ga|qera(_diagonal)?"


def _init(name: str) -> str:
    if not re.fullmatch(_INITS, name):
        text = (
            "default, pissa, pissa_niter_16, olora, loftq, loftq_iter_5, eva, lora_ga, qera or "
            "qera_diagonal"
        )
        raise pydantic_core.PydanticCustomError("init", "{text}", {"text": text})
    return name


class LoraSection(_Section):
    """What to adapt and how it starts; the fields of `jlora.LoraConfig`, and one more.

    Attributes:
      init_batches: of the training rows, that eva, lora_ga and qera are
        measured on.
    """

    rank: _Count = 16
    alpha: _Positive = 32.0
    targets: tuple[str, ...] | str = ("all-linear",)
    exclude: tuple[str, ...] | str = ()
    rank_pattern: dict[str, _Count] = {}
    alpha_pattern: dict[str, _Positive] = {}
    dropout: _Fraction = 0.0
    rank_stabilized: bool = False
    train: tuple[str, ...] | str = ()
    rows: dict[str, tuple[Annotated[int, pydantic.Field(ge=0)], ...]] = {}
    dtype: Literal["float32", "bfloat16"] = "float32"
    variant: Literal["lora", "dora", "vera"] = "lora"
    init: Annotated[str, pydantic.AfterValidator(_init)] = "default"
    init_batches: _Count = 8


class OptimConfig(_Section):
    """AdamW and its schedule.

    Attributes:
      learning_rate: the peak.
      schedule: how it falls after the warm-up.
      warmup_steps: steps of linear rise.
      final_fraction: of the peak, at the last step.
      weight_decay: per step, times the learning rate.
      beta1: of AdamW's first moment.
      beta2: of its second.
      clip_norm: the largest gradient norm over all trained weights together; null for no limit.
    """

    learning_rate: _Positive = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, pydantic.Field(ge=0)] = 0
    final_fraction: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.0
    beta1: _Fraction = 0.9
    beta2: _Fraction = 0.999
    clip_norm: _Positive | None = 1.0


class TrainConfig(_Section):
    """How long, and how much a step.

    Attributes:
      steps: optimizer steps; or give `epochs`.
      epochs: passes over the training rows, may be a fraction.
      batch_size: rows of a batch that is on the devices at a time, over all of a mesh.
      accumulation: such batches summed for one step.
      profile: traces the three steps after this one for TensorBoard or Perfetto, into `profile/`.
      head_chunk_tokens: tokens that go through the model's head together; each has a float32 logit
        for every word of the vocabulary. By default 128 on a CPU and 1024 elsewhere.
    """

    steps: _Count | None = None
    epochs: _Positive | None = None
    batch_size: _Count = 8
    accumulation: _Count = 1
    profile: _Count | None = None
    head_chunk_tokens: _Count | None = None


class EvalConfig(_Section):
    """Looking at held-out rows, always before the first step and after the last.

    Attributes:
      every: also each so many steps.
      batches: the most batches to evaluate; null for all held-out rows.
      batch_size: rows at a time; null for that of training.
      patience: stops after so many evaluations without a lower loss and takes the best adapter;
        null trains to the end.
      samples: held-out prompts answered before and after, in samples.md.
      sample_tokens: the most tokens of an answer.
    """

    every: _Count | None = None
    batches: _Count | None = None
    batch_size: _Count | None = None
    patience: _Count | None = None
    samples: Annotated[int, pydantic.Field(ge=0)] = 6
    sample_tokens: _Count = 64


class CheckpointConfig(_Section):
    """When to save.

    Attributes:
      every: steps between checkpoints.
      keep: how many of the newest stay, the best one besides.
    """

    every: _Count = 50
    keep: _Count = 3


class MeshConfig(_Section):
    """How all devices, of all processes, are laid out; one size may be -1, for what is left.

    Attributes:
      data: copies of the model; each takes its part of a batch's rows.
      fsdp: parts of every weight, gathered when needed; each takes its part of the rows as well.
      tensor: parts of heads and hidden units, computed each in its place.
    """

    data: _Parts = 1
    fsdp: _Parts = -1
    tensor: _Parts = 1


class RunConfig(_Section):
    """A whole run.

    Attributes:
      name: of the run's folder below `output`.
      output: the folder of runs.
      seed: of the adapters' start, the order of the data, the held-out rows and dropout.
      mesh: the devices to use; null for one, or with several processes for `fsdp` over all.
      model: the base.
      data: what to train on.
      lora: what to adapt.
      optim: how to step.
      train: how long.
      eval: when to look.
      checkpoint: when to save.
    """

    name: Annotated[str, pydantic.Field(pattern=r"^[\w][\w.-]*$")]
    output: str = "runs"
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    mesh: MeshConfig | None = None
    model: ModelConfig
    data: DataConfig
    lora: LoraSection = LoraSection()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def folder(self) -> Path:
        """Where everything of this run is."""
        return Path(self.output) / self.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML file and applies `key=value` overrides, such as `train.steps=20`.

    Values of overrides are YAML too: `lora.targets=[q_proj,v_proj]`, `eval.every=null`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for broken YAML, or listing every key that is unknown, missing or has a wrong
        value, with what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    raw = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected keys and values, such as 'name: first', got {raw!r}.")
    for override in overrides:
        _override(raw, override)
    try:
        # Through JSON, whose strict mode takes a list for a tuple but no string for a number.
        config = RunConfig.model_validate_json(json.dumps(raw, default=str))
    except pydantic.ValidationError as error:
        raise ValueError("\n  ".join([f"{path}:", *_explain(error.errors())])) from None
    config_checks.check(config, path)
    return _with_absolute_paths(config)


def save(path: str | Path, config: RunConfig) -> None:
    """Writes every key, defaults included, as YAML that `load` reads back."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The keys whose values differ and change what a run computes, as "key: was ..., now ..."."""
    before, after = what_counts(old), what_counts(new)
    return [
        f"{key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def what_counts(config: RunConfig) -> dict[str, Any]:
    """The values that change what a run computes, by their whole key, as JSON has them."""
    return {
        key: value
        for key, value in _flatten(config.model_dump(mode="json"))
        if key.split(".")[0] not in ("checkpoint", "mesh", "output")
        and key not in ("model.cache", "train.profile")
    }


# YAML


class _Loader(yaml.SafeLoader):
    """YAML with floats such as 1e-4 (YAML 1.2), and without doubled keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(problem=f"key {key!r} twice, line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{source}{where}: not valid YAML: {problem}.") from None


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key:
        raise ValueError(f"An override reads key=value, such as train.steps=20, got {text!r}.")
    *sections, last = key.split(".")
    # A pattern may hold dots: below these two the rest of the key is one name.
    if sections[:2] in (["lora", "rank_pattern"], ["lora", "alpha_pattern"]):
        sections, last = sections[:2], key.split(".", 2)[2]
    place = raw
    for section in sections:
        inner = place.get(section)
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{text}: {section!r} is a value, it has no keys below it.")
        place = inner
    place[last] = _parse(value, text) if value.strip() else ""


# Messages


def _explain(errors: Sequence[Any]) -> list[str]:
    """One line a key; a key of several allowed types has an error for each of them."""
    expected: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    lines = []
    for error in errors:
        key = ".".join(str(part) for part in error["loc"] if not _is_union_member(part))
        if error["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}.{_near(key)}")
        elif error["type"] == "missing":
            lines.append(f"the key {key!r} is missing.")
        else:
            expected.setdefault(key, []).append(_expected(error))
            given.setdefault(key, error["input"])
    for key, kinds in expected.items():
        shown = json.dumps(given[key], default=str)
        shown = shown if len(shown) < 80 else shown[:77] + "..."
        lines.append(f"{key}: got {shown}, expected {' or '.join(dict.fromkeys(kinds))}.")
    return lines


def _expected(error: Any) -> str:
    match error["type"]:
        case "model_type" | "model_attributes_type":
            return "a section with keys below it"
        case "string_pattern_mismatch":
            return "letters, digits, '_', '-' and '.', to name a folder"
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "string_type":
            return "a text"
        case "bool_type":
            return "true or false"
        case "tuple_type":
            return "a list"
        case "dict_type":
            return "a mapping"
    return error["msg"].removeprefix("Input should be ")


def _is_union_member(part: Any) -> bool:
    return isinstance(part, str) and (part in ("int", "float", "str") or "[" in part)


def _near(key: str) -> str:
    known = list(_known_keys(RunConfig))
    section, _, last = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    near = [beside[name] for name in difflib.get_close_matches(last, beside, cutoff=0.6)]
    if near or elsewhere:
        return f" Did you mean {' or '.join([*near, *elsewhere])}?"
    where = f"Keys of {section!r}" if section else "Keys"
    return f" {where}: {', '.join(beside)}." if beside else ""


def _known_keys(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
                yield from _known_keys(kind, f"{prefix}{name}.")


def _flatten(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    def absolute(value: Any) -> Any:
        is_path = isinstance(value, str) and not value.startswith("builtin:")
        return str(Path(value).expanduser().absolute()) if is_path else value

    model = config.model
    # A name that no file here has is a name on the hub.
    if Path(model.path).expanduser().exists() or model.path.startswith((".", "/", "~")):
        model = model.model_copy(update={"path": absolute(model.path)})
    data = config.data.model_copy(
        update={name: absolute(getattr(config.data, name)) for name in ("train", "validation")}
    )
    return config.model_copy(
        update={"model": model, "data": data, "output": absolute(config.output)}
    )
