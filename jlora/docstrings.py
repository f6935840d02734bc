"""A small data set from Python's own standard library: function source to docstring summary.

Made on the user's machine, so that there is nothing to download: several thousand pairs, the same
for the same version of Python. Held-out rows come from other modules than the training rows.
"""

import ast
import collections
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Pair", "collect", "split", "write_dataset"]

_FORMAT = 1  # part of the cache key; raise it with any change to what is written

PROMPT = "Write the first line of this function's docstring.\n```python\n{source}\n```"

# Together these keep a row, prompt and answer included, under 256 tokens of SmolLM2.
_MAX_SOURCE = 600  # characters
_MAX_WORDS = 140  # words and symbols
_MIN_SUMMARY, _MAX_SUMMARY = 16, 100  # characters
_MAX_PER_MODULE = 150  # tkinter alone would be a tenth of the data
_VALIDATION_SHARE = 0.05

_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"),
    *("site-packages", "dist-packages", "lib-dynload", "_bundled", "_vendor", "__pycache__"),
}
_JUNK = re.compile(
    r"""
    ^[^A-Z]                             # a lower-case word, an option, an example, a symbol
    | ->|>>>|::|https?:|\bTODO\b|\bXXX\b|\bRFC\b|%s
    | ^\w+\(                            # a signature
    | ^(See|Same|Like|As|Ditto|Helper|Internal|Private|Deprecated|Undocumented|Dummy)\b
    | ^(Called|Constructor|Method|Function|Abstract|Implement|Override|Overridden)\b
    | ^(Just|Equivalent|This)\b
    """,
    re.VERBOSE,
)
_FIRST_SENTENCE = re.compile(r"(.+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?])(?=\s|$)")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A function and what its docstring begins with.

    Attributes:
      source: the function without its docstring.
      summary: the docstring's first sentence on one line, with a full stop.
      module: the file, relative to the standard library's folder.
      name: the function's name.
    """

    source: str
    summary: str
    module: str
    name: str


def collect(library: str | Path | None = None) -> list[Pair]:
    """Collects the pairs of a folder of Python files, in the order of their paths.

    Args:
      library: by default the standard library of the running Python.

    Returns:
      The pairs, no two with the same summary or the same source but for case, digits, punctuation
      and the function's name.

    Raises:
      FileNotFoundError: if the folder holds no usable source, as in some frozen distributions.
    """
    library = Path(library or sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    pairs: list[Pair] = []
    for module in _modules(library):
        kept = 0
        for pair, keys in _pairs_of(library / module, module):
            if kept < _MAX_PER_MODULE and seen.isdisjoint(keys):
                seen |= keys
                pairs.append(pair)
                kept += 1
    if not pairs:
        raise FileNotFoundError(
            f"No functions with docstrings under {library}: this Python comes without the source "
            "of its standard library. Give a data set of your own."
        )
    return pairs


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Splits into training and validation by module, in the order of a hash of the module's path.

    About a twentieth is held out, from modules with a few pairs each, so that it speaks of many.
    """
    sizes = collections.Counter(pair.module for pair in pairs)
    wanted = math.ceil(_VALIDATION_SHARE * len(pairs))
    held_out: set[str] = set()
    for module in sorted(sizes, key=lambda module: hashlib.sha256(module.encode()).digest()):
        if sizes[module] <= max(1, wanted // 8) and wanted > 0:
            held_out.add(module)
            wanted -= sizes[module]
    train = [pair for pair in pairs if pair.module not in held_out]
    return train, [pair for pair in pairs if pair.module in held_out]


def write_dataset(folder: str | Path) -> tuple[Path, Path]:
    """Writes the pairs as chat messages under `folder`, unless they are there already.

    Args:
      folder: e.g. the user's cache folder. The files go into a folder below it that names the
        version of Python.

    Returns:
      The paths of (train.jsonl, validation.jsonl).
    """
    version = f"{platform.python_implementation().lower()}-{platform.python_version()}"
    home = Path(folder) / f"docstrings-{_FORMAT}-{version}"
    files = home / "train.jsonl", home / "validation.jsonl"
    if not all(file.exists() for file in files):
        home.parent.mkdir(parents=True, exist_ok=True)
        # Made beside its place and renamed whole: an interrupted run leaves no half-made data set.
        made = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
        try:
            for file, pairs in zip(files, split(collect()), strict=True):
                rows = "".join(json.dumps(_row(pair)) + "\n" for pair in pairs)
                (made / file.name).write_text(rows, encoding="utf-8")
            shutil.rmtree(home, ignore_errors=True)
            os.rename(made, home)
        except OSError:
            if not all(file.exists() for file in files):  # else another process was faster
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return files


def _row(pair: Pair) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": PROMPT.format(source=pair.source)},
            {"role": "assistant", "content": pair.summary},
        ],
        "source": f"{pair.module}:{pair.name}",
    }


def _modules(library: Path) -> list[str]:
    modules = []
    for folder, below, files in os.walk(library):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS]
        names = [name for name in files if name.endswith(".py") and not name.startswith("test")]
        modules += [(Path(folder) / name).relative_to(library).as_posix() for name in names]
    return sorted(modules)


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods in the order of the file; expressions hold none, so are not entered."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            yield from _functions(child)


def _unparse(statements: list[ast.stmt]) -> str:
    return ast.unparse(ast.Module(statements, []))


def _pairs_of(path: Path, module: str) -> Iterator[tuple[Pair, set[str]]]:
    """Usable pairs of one file, each with the keys that tell duplicates."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for function in _functions(tree):
        docstring = ast.get_docstring(function)
        summary = _summary(docstring) if docstring else None
        source = _without_docstring(function, lines) if summary else None
        if summary and source and summary.rstrip(".") not in source:
            words = " ".join(re.findall(r"[a-z]+", summary.lower()))
            code = ast.unparse(function.args) + _unparse(function.body[1:])
            yield Pair(source, summary, module, function.name), {f"s {words}", f"c {code}"}


def _summary(docstring: str) -> str | None:
    """The first sentence, or None where it says little about the function."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = _FIRST_SENTENCE.match(paragraph)
    summary = sentence.group(1) if sentence else paragraph
    if summary[-1:].isalnum() or summary[-1:] in "'\")]`":
        summary += "."
    good = (
        _MIN_SUMMARY <= len(summary) <= _MAX_SUMMARY
        and summary.isascii()
        and summary.endswith(".")
        and len(summary.split()) >= 3
        and not _JUNK.search(summary)
    )
    return summary if good else None


def _without_docstring(
    function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """The function's lines less the docstring's; None if they are inseparable or say nothing."""
    docstring, *rest = function.body
    if not rest or all(_says_nothing(statement) for statement in rest):
        return None
    start = min([function.lineno, *(d.lineno for d in function.decorator_list)]) - 1
    first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
    while not lines[last].strip():
        last += 1
    while not lines[first - 1].strip():
        first -= 1
    kept = [*lines[start:first], *lines[last : function.end_lineno]]
    source = textwrap.dedent("\n".join(line.rstrip() for line in kept)).strip("\n")
    words = re.findall(r"[a-zA-Z]+|[^a-zA-Z\s]", source)
    if len(source) > _MAX_SOURCE or len(words) > _MAX_WORDS or not source.isascii():
        return None
    try:
        tree = ast.parse(source)
    except SyntaxError:  # the docstring shared a line with code
        return None
    found = next(_functions(tree), None)
    return source if found and _unparse(found.body) == _unparse(rest) else None


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise) and statement.exc is not None:
        return "NotImplementedError" in ast.unparse(statement.exc)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
