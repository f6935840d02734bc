"""Files of text to tokenised examples: chat messages, prompt and completion, alpaca, plain text.

    train, validation = split(read_examples("rows.jsonl", tokenizer, max_length=512), 0.05, seed=0)
    batches = Batches(train, batch_size=8, length=512, seed=0)

A row that cannot be read is an error that names the file and the line. The batches themselves are
made in `packing.py`, whose names are repeated here.
"""

import gzip
import io
import itertools
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from jlora import chat
from jlora.packing import Batch, Batches, Example, collate, pack

__all__ = [
    "Batch",
    "Batches",
    "Example",
    "Format",
    "TooLong",
    "collate",
    "pack",
    "preview",
    "read_examples",
    "split",
]

Format: TypeAlias = Literal["auto", "messages", "completion", "alpaca", "text"]
TooLong: TypeAlias = Literal["error", "drop", "truncate"]
Row: TypeAlias = Mapping[str, Any]
Message: TypeAlias = dict[str, Any]
Encoded: TypeAlias = tuple[list[int], list[bool]]  # tokens, loss_mask

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TEXT_ENDINGS, _JSON_ENDINGS = (".txt", ".md"), (".jsonl", ".json", ".ndjson")
_DOCUMENT_SEPARATOR = "<|endoftext|>"
# As in https://github.com/tatsu-lab/stanford_alpaca, train.py.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def read_examples(
    path: str | Path,
    tokenizer: chat.Tokenizer,
    *,
    max_length: int,
    format: Format = "auto",
    text_field: str = "text",
    completions_only: bool = True,
    too_long: TooLong = "error",
) -> list[Example]:
    """Reads a file of examples, gzipped or not, and tokenises it.

    Formats, one JSON object a line but for plain text; further keys are ignored:

    - `messages`: `{"messages": [{"role": "user", "content": "..."}, ...]}` through the model's chat
      template; also as `conversations` of `from` and `value`. All assistant turns are trained.
    - `completion`: `{"prompt": "...", "completion": "..."}`, joined as they are, and an
      end-of-sequence token. As lists of messages they go through the chat template, and the
      assistant turns of the completion are trained.
    - `alpaca`: `{"instruction": "...", "input": "...", "output": "..."}` through the chat template
      where there is one, else in the prompt of the Alpaca project.
    - `text`: `{"text": "..."}` in a file ending in `.jsonl`, or a file of plain text: one document,
      or several with a line `<|endoftext|>` between. Each ends with an end-of-sequence token, and
      every token is trained. One longer than `max_length` is cut into windows that share one token,
      so that each token but the first is predicted once.

    Args:
      path: the file.
      tokenizer: of the model to train.
      max_length: tokens an example may have.
      format: `"auto"` takes it from the file's ending (`.txt`, `.md`) or the keys of the first row.
      text_field: the key of the text in rows of format `text`.
      completions_only: whether the loss leaves out prompts and user turns.
      too_long: what to do with an example of more than `max_length` tokens: `"error"`; `"drop"` it;
        `"truncate"` it at the end. A warning says how many were dropped or truncated.

    Returns:
      The examples in the order of the file; their `source` is "file:line".

    Raises:
      ValueError: naming file and line, if a row is not as described or too long; if there are none.
      FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    for name, value, allowed in (("format", format, Format), ("too_long", too_long, TooLong)):
        if value not in get_args(allowed):
            raise ValueError(
                f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}."
            )
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"No data file at {path}{' (a folder)' if path.is_dir() else ''}.")

    kind, rows = _rows(path, format, text_field)
    encode = _ENCODERS.get(kind)
    limit = _Limit(max_length, too_long)
    examples: list[Example] = []
    for number, row in rows:
        source = f"{path}:{number}"
        try:
            if encode is None:
                pieces = _windows(_encode_text(row, tokenizer, text_field), max_length)
            else:
                pieces = limit.apply(encode(row, tokenizer, completions_only), source)
            for tokens, mask in pieces:
                if not any(mask[1:]):
                    raise ValueError("the row has no token to train on.")
                arrays = np.asarray(tokens, np.int32), np.asarray(mask, np.bool_)
                examples.append(Example(*arrays, source))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    limit.report(path)
    if not examples:
        why = "it has no rows" if not limit.found else "all rows are too long"
        raise ValueError(f"{path}: the data set is empty: {why}.")
    return examples


def split(
    examples: Sequence[Example], validation: float | int | Sequence[Example], seed: int
) -> tuple[list[Example], list[Example]]:
    """Splits examples into training and validation; the same tokens are never on both sides.

    Args:
      examples: at least one.
      validation: how many to hold out: a fraction below 1.0 or a count; 0 for none. Or the
        validation examples themselves, read from a file of their own: then training examples with
        the same tokens are left out, with a warning.
      seed: decides which are held out.

    Returns:
      (train, validation), each in the given order. Where copies of an example would exceed the
      count, fewer are held out.

    Raises:
      ValueError: if nothing would remain on one side.
    """
    groups: dict[bytes, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.tokens.tobytes(), []).append(i)
    if not isinstance(validation, (int, float)):
        held_keys = {example.tokens.tobytes() for example in validation}
        held_out = {i for key in held_keys for i in groups.get(key, ())}
        if held_out:
            first = examples[min(held_out)].source
            warnings.warn(
                f"{len(held_out)} training examples are also in the validation data and were left "
                f"out of training (the first: {first}).",
                stacklevel=2,
            )
        chosen = list(validation)
    else:
        held_out = _choose(list(groups.values()), _held_out_count(validation, len(examples)), seed)
        chosen = [examples[i] for i in sorted(held_out)]
    train = [example for i, example in enumerate(examples) if i not in held_out]
    if not train:
        raise ValueError(
            f"No training example is left: {len(examples)} examples, {len(groups)} of them "
            f"distinct, {len(chosen)} held out for validation."
        )
    return train, chosen


def preview(example: Example, tokenizer: chat.Tokenizer) -> str:
    """Decodes an example, special tokens included, with what the loss counts in ⟦...⟧."""
    trained = example.loss_mask.copy()
    trained[:1] = False  # nothing predicts the first token
    cuts = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(example)]
    parts = []
    for start, end in itertools.pairwise(cuts):
        text = tokenizer.decode(example.tokens[start:end].tolist(), skip_special_tokens=False)
        parts.append(f"⟦{text}⟧" if trained[start] else text)
    return "".join(parts)


# Rows of a file


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    with open(path, "rb") as file:
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        stream: io.BufferedIOBase = gzip.GzipFile(fileobj=file) if zipped else file
        try:
            for number, raw in enumerate(stream, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not UTF-8: byte 0x{error.object[error.start]:02x} at byte "
                f"{error.start + 1} of the line. Save the file as UTF-8."
            ) from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}: the gzip data is cut off or damaged after line {number}."
            ) from error


def _rows(path: Path, format: Format, text_field: str) -> tuple[str, Iterator[tuple[int, Row]]]:
    """The format of a file, and its rows with their line numbers."""
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    is_text = ending not in _JSON_ENDINGS if format == "text" else ending in _TEXT_ENDINGS
    if is_text and format in ("auto", "text"):
        return "text", _documents(_lines(path), text_field)
    rows = _json_rows(path)
    if format != "auto":
        return format, rows
    first = next(rows, None)
    if first is None:
        return "text", iter(())
    number, row = first
    return _detect(row, text_field, f"{path}:{number}"), itertools.chain([first], rows)


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = " A file of plain text ends in .txt." if number == 1 else ""
            raise ValueError(
                f"{path}:{number}: not JSON ({error}). Expected one JSON object a line.{hint}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected one JSON object a line, got {_kind(row)}.")
        if "\\ud" in line.lower() and _has_half_character(row):
            raise ValueError(
                f"{path}:{number}: a string holds half a character (an escape \\ud800 to \\udfff "
                "without its partner), which is not text."
            )
        yield number, row


def _has_half_character(row: Row) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _documents(lines: Iterable[tuple[int, str]], text_field: str) -> Iterator[tuple[int, Row]]:
    """Documents of a plain-text file, with the line each starts at."""
    start, parts = 1, []
    for number, line in lines:
        if line.strip() != _DOCUMENT_SEPARATOR:
            parts.append(line)
            continue
        if text := "".join(parts).strip("\r\n"):
            yield start, {text_field: text}
        start, parts = number + 1, []
    if text := "".join(parts).strip("\r\n"):
        yield start, {text_field: text}


def _detect(row: Row, text_field: str, source: str) -> str:
    keys = row.keys()
    if "messages" in keys or "conversations" in keys:
        return "messages"
    if {"prompt", "completion"} <= keys:
        return "completion"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if text_field in keys:
        return "text"
    raise ValueError(
        f"{source}: cannot tell the format from the keys {sorted(keys)}. Expected 'messages' "
        "(or 'conversations'), 'prompt' and 'completion', 'instruction' and 'output', or "
        f"'{text_field}'."
    )


# One row to tokens


def _encode_messages(row: Row, tokenizer: chat.Tokenizer, completions_only: bool) -> Encoded:
    field = "conversations" if "conversations" in row and "messages" not in row else "messages"
    if row.get("tools"):
        raise ValueError("'tools' are not supported: the row would be trained without them.")
    messages = _messages(row, field)
    return chat.encode_messages(tokenizer, messages, completions_only=completions_only)


def _encode_completion(row: Row, tokenizer: chat.Tokenizer, completions_only: bool) -> Encoded:
    if not isinstance(row.get("prompt"), list) and not isinstance(row.get("completion"), list):
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
        return _join(prompt, completion, tokenizer, completions_only)
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    if not any(message.get("role") == "assistant" for message in completion):
        raise ValueError("'completion' has no assistant message: there is nothing to train on.")
    messages = prompt + completion
    tokens, mask = chat.encode_messages(tokenizer, messages, completions_only=completions_only)
    if completions_only:
        turns = np.cumsum(np.diff(mask, prepend=False) & mask)  # which assistant turn a token is in
        earlier = sum(message.get("role") == "assistant" for message in prompt)
        mask = (mask & (turns > earlier)).tolist()
    return tokens, mask


def _encode_alpaca(row: Row, tokenizer: chat.Tokenizer, completions_only: bool) -> Encoded:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    given = _text(row, "input") if row.get("input") is not None else ""
    _refuse_empty(output, "'output'")
    if tokenizer.has_chat_template:
        content = f"{instruction}\n\n{given}" if given else instruction
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": output},
        ]
        return chat.encode_messages(tokenizer, messages, completions_only=completions_only)
    template = _ALPACA_WITH_INPUT if given else _ALPACA
    prompt = template.format(instruction=instruction, input=given)
    return _join(prompt, output, tokenizer, completions_only)


_ENCODERS: dict[str, Callable[[Row, chat.Tokenizer, bool], Encoded]] = {
    "messages": _encode_messages,
    "completion": _encode_completion,
    "alpaca": _encode_alpaca,
}


def _encode_text(row: Row, tokenizer: chat.Tokenizer, text_field: str) -> list[int]:
    text = _text(row, text_field)
    _refuse_empty(text, f"'{text_field}'")
    return [*tokenizer.encode(text), tokenizer.eos_id]


def _windows(tokens: list[int], max_length: int) -> Iterator[Encoded]:
    for start in range(0, len(tokens) - 1, max_length - 1):
        window = tokens[start : start + max_length]
        yield window, [True] * len(window)


def _join(
    prompt: str, completion: str, tokenizer: chat.Tokenizer, completions_only: bool
) -> Encoded:
    _refuse_empty(completion, "'completion'")
    first, tokens = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    if tokens[: len(first)] != first:
        # A token would straddle the border; generation starts from the prompt's own tokens.
        tokens = first + tokenizer.encode(completion)
    if tokens[-1] not in tokenizer.eos_ids:
        tokens = [*tokens, tokenizer.eos_id]
    skip = len(first) if completions_only else 0
    return tokens, [False] * skip + [True] * (len(tokens) - skip)


# Fields of a row


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def _required(row: Row, field: str) -> Any:
    if field not in row:
        raise ValueError(f"no '{field}': the row has {sorted(row)}.")
    return row[field]


def _text(row: Row, field: str) -> str:
    value = _required(row, field)
    if not isinstance(value, str):
        raise ValueError(f"'{field}' must be a string, got {_kind(value)}.")
    return value


def _refuse_empty(text: str, name: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} is empty: there is nothing to train on.")


def _messages(row: Row, field: str) -> list[Message]:
    """The messages of a row, in one spelling; `chat` checks their roles and contents."""
    value = _required(row, field)
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        got = "an empty list" if value == [] else _kind(value)
        got = "a list of other things" if got == "a list" else got
        raise ValueError(f"'{field}' must be a list of messages (objects), got {got}.")
    messages = [_from_sharegpt(m) if "from" in m and "role" not in m else m for m in value]
    for i, message in enumerate(messages, 1):
        content, says_nothing_else = message.get("content"), not message.get("tool_calls")
        if message.get("role") == "assistant" and isinstance(content, str) and says_nothing_else:
            _refuse_empty(content, f"the assistant's content in message {i} of {len(messages)}")
    return messages


def _from_sharegpt(message: Message) -> Message:
    role = message["from"]
    known = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": known, "content": message.get("value")}


# Length


class _Limit:
    """Applies the policy for long examples, and counts."""

    def __init__(self, max_length: int, too_long: TooLong):
        self.max_length = max_length
        self.too_long = too_long
        self.found: list[tuple[str, int]] = []  # source and length of each that was too long
        self.dropped = 0

    def apply(self, encoded: Encoded, source: str) -> list[Encoded]:
        tokens, mask = encoded
        if len(tokens) <= self.max_length:
            return [encoded]
        if self.too_long == "error":
            raise ValueError(
                f"the example has {len(tokens)} tokens, more than the limit of {self.max_length}. "
                "Raise the sequence length, or say what to do with such rows: drop or truncate."
            )
        self.found.append((source, len(tokens)))
        mask = mask[: self.max_length]
        if self.too_long == "drop" or not any(mask[1:]):  # truncated before what is trained
            self.dropped += 1
            return []
        return [(tokens[: self.max_length], mask)]

    def report(self, path: Path) -> None:
        if self.found:
            source, size = self.found[0]
            warnings.warn(
                f"{path}: {len(self.found)} examples have more than {self.max_length} tokens; "
                f"{self.dropped} were dropped and {len(self.found) - self.dropped} truncated "
                f"(the first: {source}, {size} tokens).",
                stacklevel=3,
            )


# Split


def _held_out_count(validation: float | int, total: int) -> int:
    if isinstance(validation, bool) or not validation >= 0:
        raise ValueError(f"validation must be a fraction, a count or examples, got {validation}.")
    if isinstance(validation, float):
        if validation >= 1:
            raise ValueError(
                f"A fraction for validation must be below 1.0, got {validation}; a count is an int."
            )
        return max(1, round(validation * total)) if validation else 0
    if validation >= total and validation > 0:
        raise ValueError(f"Cannot hold out {validation} of {total} examples: none would be left.")
    return validation


def _choose(groups: list[list[int]], count: int, seed: int) -> set[int]:
    chosen: set[int] = set()
    for g in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) + len(groups[g]) <= count:
            chosen.update(groups[g])
    if count and not chosen:
        raise ValueError(
            f"Cannot hold out {count} examples: every example has more copies than that, and "
            "copies of one example must not be on both sides."
        )
    return chosen
