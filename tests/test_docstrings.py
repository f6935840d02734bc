"""The data set made from the standard library: quality, no leaks, determinism, the cache."""

import ast
import json
import os
import re
import subprocess
import sys
import zlib

import pytest

from jlora import docstrings


@pytest.fixture(scope="module")
def pairs():
    return docstrings.collect()


def write(folder, **modules):
    for name, text in modules.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


FUNCTION = '''
def {name}(x):
    """{docstring}"""
    return {body}
'''


def function(docstring: str, body: str = "x + 1", name: str = "f") -> str:
    return FUNCTION.format(docstring=docstring, body=body, name=name)


def test_there_are_several_thousand_short_clean_pairs(pairs):
    assert 2000 < len(pairs) < 6000
    for pair in pairs:
        assert 16 <= len(pair.summary) <= 101
        assert pair.summary.endswith(".")
        assert "\n" not in pair.summary
        assert pair.summary.rstrip(".") not in pair.source
        assert len(pair.source) <= 600
        tree = ast.parse(pair.source)
        assert len(tree.body) == 1
        assert ast.get_docstring(tree.body[0]) is None
        assert tree.body[0].name == pair.name
        assert not re.search(r"(^|/)(tests?|idlelib|lib2to3|site-packages)/", pair.module)


def test_validation_is_of_other_modules_and_holds_no_copy(pairs):
    train, validation = docstrings.split(pairs)
    assert sorted(map(id, train + validation)) == sorted(map(id, pairs))
    assert 0.03 < len(validation) / len(pairs) < 0.08
    assert len({pair.module for pair in validation}) >= 20
    for key in (
        lambda pair: pair.module,
        lambda pair: re.sub("[^a-z]+", " ", pair.summary.lower()),
        lambda pair: re.sub(r"def \w+", "", pair.source),
    ):
        assert not set(map(key, train)) & set(map(key, validation))


def test_the_same_is_written_again_and_read_from_the_cache(tmp_path, pairs, monkeypatch):
    monkeypatch.setattr(docstrings, "collect", lambda: pairs)
    first = docstrings.write_dataset(tmp_path / "a")
    texts = [path.read_bytes() for path in first]
    assert [path.name for path in first] == ["train.jsonl", "validation.jsonl"]
    second = docstrings.write_dataset(tmp_path / "b")
    assert [path.read_bytes() for path in second] == texts
    rows = [json.loads(line) for line in texts[0].splitlines()]
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].startswith("Write the first line of this function's docstring.\n```")

    first[0].write_text("kept")  # what is there is not made again
    assert docstrings.write_dataset(tmp_path / "a") == first
    assert first[0].read_text() == "kept"
    first[1].unlink()  # half of it is no data set
    docstrings.write_dataset(tmp_path / "a")
    assert [path.read_bytes() for path in first] == texts
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first[0].parent.name]


@pytest.mark.slow
def test_another_process_collects_the_same(pairs):
    code = (
        "import zlib; from jlora import docstrings; "
        "print(zlib.crc32(repr(docstrings.collect()).encode()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(printed.stdout) == zlib.crc32(repr(pairs).encode())


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(pairs):
        raise KeyboardInterrupt

    monkeypatch.setattr(docstrings, "split", interrupt)
    monkeypatch.setattr(docstrings, "collect", list)
    with pytest.raises(KeyboardInterrupt):
        docstrings.write_dataset(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return the number after x.", "Return the number after x."),
        ("Return the number after x", "Return the number after x."),
        (
            "\n    Return the number\n    after x.  It is one\n    more.\n    ",
            "Return the number after x.",
        ),
        (
            "Return the next number, e.g. 2 for 1.\n\n    More.\n    ",
            "Return the next number, e.g. 2 for 1.",
        ),
        ("Return 'x' and (one more)", "Return 'x' and (one more)."),
        ("Short.", None),
        ("Return " + "the number " * 10, None),
        ("f(x) -> the number after x", None),
        ("See the documentation of the module.", None),
        ("Options for this function are:\n\n    - none\n    ", None),
        ("Internal helper for the others.", None),
        ("Return the número after x.", None),
    ],
)
def test_the_summary_is_the_first_sentence_or_the_function_is_left_out(
    tmp_path, docstring, summary
):
    good = function("Give back the given thing.", "x", "g")
    library = write(tmp_path, a=good + function(docstring))
    found = {pair.name: pair.summary for pair in docstrings.collect(library)}
    assert found.pop("g") == "Give back the given thing."
    assert found == ({"f": summary} if summary else {})


def test_the_source_is_the_function_without_its_docstring(tmp_path):
    text = '''
class A:
    @property
    def first(self):

        """Return the first of the things."""

        # by its place
        return self.things[0]

    async def second(self): "Return the second of the things."; return self.things[1]

    def third(self):
        """Return the third of the things."""
        raise NotImplementedError("not here")

    def fourth(self):
        """Return the fourth of the things."""
'''
    pairs = docstrings.collect(write(tmp_path, a=text))
    source = "@property\ndef first(self):\n    # by its place\n    return self.things[0]"
    assert [(pair.name, pair.source) for pair in pairs] == [("first", source)]


def test_copies_and_tests_are_left_out(tmp_path):
    one, two = "Return the number after x.", "Give back one more than x."
    library = write(
        tmp_path,
        a=function(one),
        b=function(one.upper().capitalize(), "x + 2"),  # the same summary
        c=function(two, name="g"),  # the same code
        d__test__e=function("Return something else entirely.", "x + 3"),
        test_f=function("Return what nobody needs here.", "x + 4"),
        broken="def f(:",
        g__h=function("Return the number after the next.", "x + 2"),
    )
    assert [pair.module for pair in docstrings.collect(library)] == ["a.py", "g/h.py"]


def test_a_library_without_source_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="No functions with docstrings under"):
        docstrings.collect(tmp_path)
