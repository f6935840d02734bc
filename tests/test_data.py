"""Files to examples: formats, what is trained, messages for bad rows, length, split."""

import gzip
import json
import re

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jlora import chat, data

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def make_tokenizer(template: str | None = CHATML, merges=()) -> chat.Tokenizer:
    """A token per byte, but for `merges`; text ends with <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(left + right for left, right in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(config)}
    return chat.Tokenizer.from_files(files)


TOKENIZER, PLAIN = make_tokenizer(), make_tokenizer(None)


def write(folder, *rows, name="rows.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def previews(path, tokenizer=TOKENIZER, **options) -> list[str]:
    options = {"max_length": 2000} | options
    examples = data.read_examples(path, tokenizer, **options)
    return [data.preview(example, tokenizer) for example in examples]


def of_tokens(*rows) -> list[data.Example]:
    return [
        data.Example(np.asarray(row, np.int32), np.ones(len(row), np.bool_), f"made:{i}")
        for i, row in enumerate(rows, 1)
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [USER, ANSWER, USER, ANSWER], "further": 1},
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n" * 2,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n",
        ),
        ({"prompt": "1 + 1 = ", "completion": "2"}, "1 + 1 = ⟦2<|im_end|>⟧"),
        ({"prompt": "", "completion": "two"}, "t⟦wo<|im_end|>⟧"),  # nothing predicts the first
        ({"prompt": "a", "completion": "b<|im_end|>"}, "a⟦b<|im_end|>⟧"),
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n",
        ),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            "<|im_start|>user\nAdd.\n\n1, 2<|im_end|>\n<|im_start|>assistant\n⟦3<|im_end|>⟧\n",
        ),
        (
            {"instruction": "Add.", "output": "3"},
            "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n⟦3<|im_end|>⟧\n",
        ),
        ({"text": "Some é 🙂."}, "S⟦ome é 🙂.<|im_end|>⟧"),
    ],
)
def test_formats_are_told_by_their_keys_and_train_what_they_should(tmp_path, row, expected):
    assert previews(write(tmp_path, row, row)) == [expected] * 2


def test_alpaca_without_a_template_takes_the_prompt_of_the_alpaca_project(tmp_path):
    rows = (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "A", "output": "b"},
    )
    with_input, without = previews(write(tmp_path, *rows), PLAIN)
    assert with_input.startswith("Below is an instruction that describes a task, paired with an")
    assert with_input.endswith(
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:⟦3<|im_end|>⟧"
    )
    assert without.endswith("request.\n\n### Instruction:\nA\n\n### Response:⟦b<|im_end|>⟧")


def test_all_counts_without_completions_only(tmp_path):
    rows = {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}
    examples = data.read_examples(
        write(tmp_path, *rows), TOKENIZER, max_length=99, completions_only=False
    )
    assert all(example.loss_mask.all() for example in examples)
    path = write(tmp_path, {"prompt": "ab", "completion": "cd"})
    assert previews(path, completions_only=False) == ["a⟦bcd<|im_end|>⟧"]


def test_a_token_never_straddles_prompt_and_completion(tmp_path):
    tokenizer = make_tokenizer(merges=[("b", "c")])
    path = write(
        tmp_path, {"prompt": "ab", "completion": "cd"}, {"prompt": "a", "completion": "bc"}
    )
    assert previews(path, tokenizer) == ["ab⟦cd<|im_end|>⟧", "a⟦bc<|im_end|>⟧"]
    straddling, inside = data.read_examples(path, tokenizer, max_length=9)
    assert straddling.tokens[:2].tolist() == tokenizer.encode("ab")
    assert len(inside) == 3


def test_examples_know_their_line_and_blank_lines_do_not_count(tmp_path):
    row = json.dumps({"prompt": "a", "completion": "b"})
    path = write(tmp_path, "\ufeff" + row, "", "  ", row)
    examples = data.read_examples(path, TOKENIZER, max_length=9)
    assert [example.source for example in examples] == [f"{path}:1", f"{path}:4"]
    assert examples[0].tokens.dtype == np.int32
    assert examples[0].loss_mask.dtype == np.bool_
    assert examples[0].num_targets == 2


def test_gzip_reads_alike(tmp_path):
    path = write(tmp_path, {"text": "abc"})
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert previews(zipped) == previews(path)
    text = tmp_path / "a.txt.gz"
    text.write_bytes(gzip.compress(b"abc"))
    assert previews(text) == ["a⟦bc<|im_end|>⟧"]


@hypothesis.given(st.text(alphabet="abcdé", min_size=1, max_size=60), st.integers(2, 12))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_windows_predict_every_token_of_a_document_once(tmp_path, text, max_length):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    windows = data.read_examples(path, TOKENIZER, max_length=max_length)
    assert all(2 <= len(window) <= max_length for window in windows)
    predicted = np.concatenate([window.tokens[1:] for window in windows])
    whole = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
    assert predicted.tolist() == whole[1:]
    assert sum(window.num_targets for window in windows) == len(whole) - 1


def test_a_text_file_is_one_document_or_several_with_a_separator(tmp_path):
    path = write(tmp_path, "one", "", "more", name="a.txt")
    assert previews(path) == ["o⟦ne\n\nmore<|im_end|>⟧"]
    path = write(tmp_path, "one", "<|endoftext|>", "two", "more", "<|endoftext|>", name="a.md")
    assert previews(path) == ["o⟦ne<|im_end|>⟧", "t⟦wo\nmore<|im_end|>⟧"]
    sources = [example.source for example in data.read_examples(path, TOKENIZER, max_length=99)]
    assert sources == [f"{path}:1", f"{path}:3"]
    assert previews(write(tmp_path, "x y", name="a.log"), format="text") == ["x⟦ y<|im_end|>⟧"]


def test_the_text_key_can_be_named(tmp_path):
    assert previews(write(tmp_path, {"body": "ab"}), text_field="body") == ["a⟦b<|im_end|>⟧"]


GOOD = {"messages": [USER, ANSWER]}
COMPLETION = {"prompt": "a", "completion": "b"}
ALPACA = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (GOOD, "{'messages': []}", "not JSON .* Expected one JSON object a line"),
        (GOOD, '{"a": 1', "not JSON"),
        (GOOD, '{"a": ' + "9" * 5000 + "}", "not JSON"),
        (GOOD, "[1, 2]", "expected one JSON object a line, got a list"),
        (GOOD, "null", "expected one JSON object a line, got null"),
        (GOOD, '{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a character"),
        (GOOD, {"prompt": "a", "completion": "b"}, "no 'messages': the row has .*'prompt'"),
        (GOOD, {"messages": []}, "'messages' must be a list of messages .* an empty list"),
        (GOOD, {"messages": "hi"}, "'messages' must be a list of messages .* a string"),
        (GOOD, {"messages": ["hi"]}, "'messages' must be a list of messages .* other things"),
        (GOOD, {"messages": [{"role": "bot", "content": "x"}]}, "'bot'.*system, user, assistant"),
        (GOOD, {"messages": [{"content": "x"}]}, "no role"),
        (GOOD, {"messages": [USER, {"role": "assistant"}]}, "'content'"),
        (GOOD, {"messages": [USER, {"role": "assistant", "content": 3}]}, "'content'"),
        (
            GOOD,
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "message 2 of 2 is emp",
        ),
        (GOOD, {"messages": [USER]}, "No assistant message"),
        (GOOD, {"messages": [USER, ANSWER], "tools": [{}]}, "'tools' are not supported"),
        (GOOD, {"conversations": [{"from": "bot", "value": "x"}]}, "'bot'"),
        (GOOD, {"conversations": [{"from": [], "value": "x"}]}, "role"),
        (COMPLETION, {"prompt": "a"}, "no 'completion': the row has"),
        (COMPLETION, {"prompt": "a", "completion": ""}, "'completion' is empty"),
        (COMPLETION, {"prompt": "a", "completion": " \n"}, "'completion' is empty"),
        (COMPLETION, {"prompt": 1, "completion": "b"}, "'prompt' must be a string, got a number"),
        (COMPLETION, {"prompt": [USER], "completion": "b"}, "'completion' must be a list"),
        (COMPLETION, {"prompt": [USER], "completion": [USER]}, "'completion' has no assistant"),
        (ALPACA, {"instruction": "a", "output": None}, "'output' must be a string, got null"),
        (ALPACA, {"instruction": "a", "output": ""}, "'output' is empty"),
        (ALPACA, {"instruction": "a", "input": 1, "output": "b"}, "'input' must be a string"),
        ({"text": "ab"}, {"text": ""}, "'text' is empty"),
        ({"text": "ab"}, {"text": ["ab"]}, "'text' must be a string, got a list"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, good, bad, message):
    path = write(tmp_path, good, bad)
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ") + f".*{message}"):
        data.read_examples(path, TOKENIZER, max_length=99)


def test_other_bad_input_is_named(tmp_path):
    def read(path, tokenizer=TOKENIZER, **options):
        return data.read_examples(path, tokenizer, **({"max_length": 99} | options))

    with pytest.raises(FileNotFoundError, match="No data file at "):
        read(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="a folder"):
        read(tmp_path)
    for empty in (write(tmp_path, name="e.jsonl"), write(tmp_path, "", name="e.txt")):
        with pytest.raises(ValueError, match=f"{re.escape(str(empty))}: the data set is empty"):
            read(empty)
    path = write(tmp_path, {"question": "a"})
    with pytest.raises(
        ValueError, match=r":1: cannot tell the format from the keys \['question'\]"
    ):
        read(path)
    with pytest.raises(ValueError, match="no 'messages'"):
        read(path, format="messages")
    with pytest.raises(ValueError, match="format must be one of auto, messages"):
        read(path, format="csv")
    with pytest.raises(ValueError, match="too_long must be one of error, drop, truncate"):
        read(path, too_long="cut")
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        read(path, max_length=1)
    with pytest.raises(ValueError, match=r":1: .*chat template"):
        read(write(tmp_path, GOOD), PLAIN)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"text": "abc"}).encode()
    path.write_bytes(good + b'\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: not UTF-8: byte 0xff at byte 11"):
        data.read_examples(path, TOKENIZER, max_length=99)
    zipped = gzip.compress(good * 1000)
    path.write_bytes(zipped[: len(zipped) // 2])
    with pytest.raises(ValueError, match="gzip data is cut off or damaged"):
        data.read_examples(path, TOKENIZER, max_length=99)


def test_long_examples_are_refused_dropped_or_truncated(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "ab", "completion": "cd"},  # 5 tokens
        {"prompt": "ab", "completion": "cdefgh"},  # 9
        {"prompt": "abcdefgh", "completion": "i"},  # 10, and truncated before its completion
    )
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*9 tokens.*limit of 6.*drop or truncate"):
        previews(path, max_length=6)
    with pytest.warns(UserWarning, match="2 examples have more than 6 tokens; 2 were dropped"):
        assert previews(path, max_length=6, too_long="drop") == ["ab⟦cd<|im_end|>⟧"]
    with pytest.warns(UserWarning, match="1 were dropped and 1 truncated .*rows.jsonl:2, 9 tokens"):
        kept = previews(path, max_length=6, too_long="truncate")
    assert kept == ["ab⟦cd<|im_end|>⟧", "ab⟦cdef⟧"]
    with (
        pytest.warns(UserWarning, match="3 were dropped"),
        pytest.raises(ValueError, match="data set is empty: all rows are too long"),
    ):
        previews(path, max_length=4, too_long="drop")


rows_of_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=2)


@hypothesis.given(rows_of_tokens, st.floats(0.01, 0.99) | st.integers(1, 20), st.integers(0, 9))
def test_split_is_a_partition_that_never_parts_copies(rows, validation, seed):
    examples = of_tokens(*rows)
    try:
        train, held_out = data.split(examples, validation, seed)
    except ValueError:
        hypothesis.assume(False)
        raise
    assert sorted(e.source for e in train + held_out) == sorted(e.source for e in examples)
    assert train
    assert held_out
    assert not {tuple(e.tokens) for e in train} & {tuple(e.tokens) for e in held_out}
    again = data.split(examples, validation, seed)
    assert [[e.source for e in side] for side in again] == [
        [e.source for e in side] for side in (train, held_out)
    ]
    wanted = validation if isinstance(validation, int) else max(1, round(validation * len(rows)))
    assert len(held_out) <= wanted


def test_split_takes_a_fraction_a_count_or_nothing():
    examples = of_tokens(*([i, i + 1] for i in range(100)))
    assert [len(side) for side in data.split(examples, 0.05, 0)] == [95, 5]
    assert [len(side) for side in data.split(examples, 20, 0)] == [80, 20]
    assert [len(side) for side in data.split(examples, 0, 0)] == [100, 0]
    first, second = (data.split(examples, 20, seed)[1] for seed in (0, 1))
    assert [e.source for e in first] != [e.source for e in second]


def test_split_with_a_validation_file_leaves_out_what_both_have():
    train = of_tokens([1, 2], [3, 4], [1, 2])
    validation = of_tokens([1, 2], [5, 6])
    with pytest.warns(UserWarning, match=r"2 training examples .*the first: made:1"):
        kept, held_out = data.split(train, validation, 0)
    assert kept == [train[1]]
    assert held_out == validation


@pytest.mark.parametrize(
    ("rows", "validation", "message"),
    [
        ([[1], [2]], 1.0, "must be below 1.0"),
        ([[1], [2]], -1, "fraction, a count or examples, got -1"),
        ([[1], [2]], float("nan"), "fraction, a count or examples, got nan"),
        ([[1], [2]], True, "fraction, a count or examples, got True"),
        ([[1], [2]], 2, "Cannot hold out 2 of 2"),
        ([[1]], 0.5, "No training example is left"),
        ([[1], [1], [2], [2]], 1, "more copies"),
        ([[1], [1]], of_tokens([1]), "No training example is left"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*also in the validation data")
def test_a_split_that_leaves_nothing_is_refused(rows, validation, message):
    with pytest.raises(ValueError, match=message):
        data.split(of_tokens(*rows), validation, 0)
