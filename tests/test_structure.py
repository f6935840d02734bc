"""The picture of DESIGN.md: who imports whom, and what `import jlora` costs."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jlora"

# The order of dependency and of reading. A module imports only from modules above it.
# fmt: off
ORDER = [
    "tree", "leaf", "calls", "interpret", "usage", "lowrank", "products", "joined",
    "lora_config", "targets", "nf4", "packed", "packed_rules", "packed_products", "quant",
    "rows", "lora", "dora", "vera", "merging", "summary", "variants", "factors", "watched",
    "measured", "gptq", "alignment", "extraction", "arithmetic", "optim", "sharding",
    "models.remat",
    "models.splash", "models.attention", "models.rotary", "models.decoder_config",
    "models.cache", "models.layers", "models.moe", "models.decoder", "models.slices",
    "models.weights", "models.bnb", "models.hf_families", "models.hf_rope", "models.hf_config",
    "models.hf_names", "models.hf", "models.gguf_tokenizer", "models.gguf",
    "models.packed_cache", "models.hub", "models", "fingerprint", "peft_names", "peft_folder",
    "peft_read", "peft_vera", "peft", "multihost", "checkpoint", "chat", "tokens", "packing",
    "data", "docstrings", "losses", "train", "objective", "generate", "hardware", "shapes",
    "bench", "base", "dialogue", "config_checks", "config", "report", "process", "devices",
    "starts", "calibrated", "fresh", "run",
    "saved", "hlo", "topology", "gpus", "plan", "plan_report", "suggest", "arguments", "cli",
]
# fmt: on

# Outside packages that have one home each, and where that is.
HOMES = {
    "flax": {"models.layers", "models.moe", "models.decoder", "models"},
    "optax": {"optim", "losses", "train"},
    "orbax": {"checkpoint"},
    "safetensors": {"models.hf", "models.packed_cache", "peft_folder"},
    "tokenizers": {"chat", "tokens"},
    "jinja2": {"chat"},
    "gguf": {"models.gguf"},
    "huggingface_hub": {"models.hub"},
    "yaml": {"config"},
    "pydantic": {"config"},
    "matplotlib": {"report"},
    "rich": {"report", "run", "plan_report", "cli"},
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path):
    """Full names of all that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            base = node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_imports(path):
    for name in imports_of(path):
        if name.startswith("jlora."):
            name = name.removeprefix("jlora.")
            if name in MODULES:
                yield name


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_only_from_modules_above_it(name):
    assert name in ORDER, f"{name} has no place in the order of modules"
    for other in own_imports(MODULES[name]):
        if other != name and not name.startswith(f"{other}."):
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"


@pytest.mark.parametrize("package", HOMES)
def test_an_outside_package_has_one_home(package):
    users = {
        name
        for name, path in MODULES.items()
        if any(i.split(".")[0] == package for i in imports_of(path))
    }
    assert users <= HOMES[package]


def test_models_know_nothing_of_lora():
    """The decoder knows nothing of jlora; what reads files may quantise what it reads."""
    readers = {f"models.{name}" for name in ("weights", "bnb", "hf", "gguf", "packed_cache")}
    for name in MODULES:
        if name.split(".")[0] == "models":
            others = {other for other in own_imports(MODULES[name]) if "models" not in other}
            allowed = {"quant", "nf4"} if name in {*readers, "models"} else set()
            assert others <= allowed, name


@pytest.mark.parametrize("path", MODULES.values(), ids=list(MODULES))
def test_a_file_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 520


def test_importing_jlora_loads_nothing_heavier_than_jax():
    heavy = ["flax", "optax", "orbax", "transformers", "torch", "matplotlib", "tokenizers", "gguf"]
    code = f"import jlora, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
