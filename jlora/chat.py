"""Messages to text, to tokens and a loss mask, with the model's own chat template.

The mask is right by construction: a conversation is rendered and tokenized once, as a whole, and
where the assistant speaks is found in that text, then carried to tokens by their offsets.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

__all__ = ["ROLES", "Tokenizer", "encode_messages", "encode_prompt", "render", "tokenizer_json"]

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]

# Tokens that end a turn in well-known templates, whatever the file calls its `eos_token`.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
# Unicode noncharacters: never text, not whitespace, so no template trims them.
_MARK, _END_MARK = "\ufdd0", "\ufdd1"
_MARK_GENERATION = "_jlora_mark_generation"


class Span(NamedTuple):
    """Where, in the rendered text, an assistant turn stands: characters `start` to `end`."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer as its files describe it; adds no special token that the text does not spell.

    Attributes:
      eos_ids: every id that ends a turn or a text; generation stops at any of them.
      eos_id: the one written after a completion, the file's `eos_token`.
      bos_id: the id that starts a text, or None.
      pad_id: fills batches; the end-of-text id where the file names no padding token.
      chat_template: jinja2 source, or None.
      special_tokens: such as `{"bos_token": "<s>"}`, passed to the template.
    """

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    eos_id: int
    bos_id: int | None
    pad_id: int
    chat_template: str | None
    special_tokens: Mapping[str, str]

    @classmethod
    def from_files(cls, files: Mapping[str, str]) -> "Tokenizer":
        """Reads a tokenizer from the texts of its files.

        Args:
          files: file name to text; `tokenizer.json`, and those there are of
            `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and
            `generation_config.json`.

        Raises:
          ValueError: if `tokenizer.json` is absent or broken, or no token is said to end a text.
        """
        config = _json(files, "tokenizer_config.json")
        special = _special_tokens(config, _json(files, "special_tokens_map.json"))
        backend = _backend(tokenizer_json(files))
        ids = {name: backend.token_to_id(token) for name, token in special.items()}
        eos_ids = _eos_ids(backend, ids.get("eos_token"), _json(files, "generation_config.json"))
        if not eos_ids:
            raise ValueError(
                "The tokenizer names no token that ends a text: add 'eos_token' to "
                "tokenizer_config.json or 'eos_token_id' to generation_config.json."
            )
        pad_id = ids.get("pad_token")
        return cls(
            backend=backend,
            eos_ids=eos_ids,
            eos_id=eos_ids[0],
            bos_id=ids.get("bos_token"),
            pad_id=eos_ids[0] if pad_id is None else pad_id,
            chat_template=files.get("chat_template.jinja") or _template(config),
            special_tokens=special,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; the model's embedding may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `messages` data can be used with this model."""
        return self.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens only where the text spells them."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """Renders messages with the model's chat template, as `transformers` does.

    Args:
      tokenizer: carries the template and the special tokens that it may write.
      messages: `{"role": ..., "content": ...}`, oldest first.
      add_generation_prompt: ends with the header after which the assistant speaks.

    Raises:
      ValueError: if there is no template, a message is malformed, or the template refuses them.
    """
    _check(messages)
    return _render(tokenizer, messages, add_generation_prompt)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the assistant is to speak."""
    _check(messages)
    return tokenizer.encode(_prompt_text(tokenizer, messages))


def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], *, completions_only: bool = True
) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them are to be learned.

    Every assistant turn counts, from the first token of its content to the token that ends it;
    system, user and tool turns, headers and the newlines between turns do not. If the template
    writes no end-of-turn token after the last assistant turn, the `eos_token` is appended.

    Args:
      tokenizer: carries the template.
      messages: `{"role": ..., "content": ...}`, oldest first, at least one from the assistant.
      completions_only: False counts every token.

    Returns:
      `(tokens, loss_mask)`, of one length.

    Raises:
      ValueError: if a message is malformed, none is the assistant's, or the template writes a
        conversation in a way that does not tell where the assistant speaks.
    """
    roles = _check(messages)
    if "assistant" not in roles:
        raise ValueError(
            f"No assistant message to learn from: the roles are {', '.join(roles)}. "
            f"Roles are {', '.join(ROLES)}; at least one message must be the assistant's."
        )
    text = _render(tokenizer, messages)
    spans = _generation_spans(tokenizer, messages, text)
    if spans is None:
        spans = [
            _incremental_span(tokenizer, messages, i, text)
            or _probed_span(tokenizer, messages, i, text)
            for i, role in enumerate(roles)
            if role == "assistant"
        ]
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    tokens, loss_mask = list(encoding.ids), [False] * len(encoding.ids)
    first, ended = 0, False
    for span in spans:
        first, last, ended = _token_range(tokenizer, encoding, span)
        loss_mask[first:last] = [True] * (last - first)
    if roles[-1] == "assistant" and not ended:
        # Whatever the template writes after the content leads to the end, so it is learned too.
        loss_mask[first:] = [True] * (len(tokens) - first)
        tokens, loss_mask = [*tokens, tokenizer.eos_id], [*loss_mask, True]
    return tokens, loss_mask if completions_only else [True] * len(tokens)


# Reading the files.


def tokenizer_json(files: Mapping[str, str]) -> str:
    """The text of a tokenizer's main file.

    Raises:
      ValueError: if it is absent.
    """
    if "tokenizer.json" not in files:
        raise ValueError(
            f"No tokenizer.json among the tokenizer's files ({', '.join(files) or 'none'}). "
            "Save it with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    return files["tokenizer.json"]


def _json(files: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        return json.loads(files.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error


def _backend(text: str) -> tokenizers.Tokenizer:
    try:
        spec = json.loads(text)
        # It would only add special tokens, which we never ask for, and trim spaces off the offsets.
        spec["post_processor"] = None
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the package raises the bare class
        raise ValueError(f"tokenizer.json cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    special: dict[str, str] = {}
    for source in sources:
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"):
            value = source.get(name)
            if isinstance(value, Mapping):  # a serialised AddedToken
                value = value.get("content")
            if isinstance(value, str):
                special.setdefault(name, value)
    return special


def _template(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _eos_ids(
    backend: tokenizers.Tokenizer, eos_id: int | None, generation_config: Mapping[str, Any]
) -> tuple[int, ...]:
    listed = generation_config.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    ids = [eos_id, *listed, *(added.get(token) for token in _TURN_ENDS)]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


# Rendering.


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant says; marked if asked for."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = jinja2.nodes.Name(_MARK_GENERATION, "load")
        call = self.call_method("_wrap", [marked])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _wrap(self, marked: object, caller: Any) -> str:
        return f"{_MARK}{caller()}{_END_MARK}" if marked is True else caller()


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own escapes HTML


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"The chat template is not valid jinja2: {error}") from error


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    mark_generation: bool = False,
) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "This model has no chat template, so it cannot take messages. Use prompt/completion, "
            "alpaca or plain text data with it, or choose its instruction-tuned version."
        )
    template = _compile(tokenizer.chat_template)
    variables = {
        **tokenizer.special_tokens,
        "messages": [dict(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        _MARK_GENERATION: mark_generation,
    }
    try:
        return template.render(variables)
    except Exception as error:  # a template is somebody's program: whatever it raises is its answer
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(
            f"The model's chat template refuses these messages (roles: {roles}): {error}"
        ) from error


def _check(messages: Sequence[Message]) -> list[str]:
    """Checks the form of messages; returns their roles."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            "Messages must be a non-empty list of objects such as "
            f'{{"role": "user", "content": "..."}}, got {_short(messages)}.'
        )
    for i, message in enumerate(messages):
        where = f"Message {i + 1} of {len(messages)}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                f"{where} has no role: {_short(message)}. Roles are {', '.join(ROLES)}."
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"{where} has the role {message['role']!r}, which is none of {', '.join(ROLES)}."
            )
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(
                f"{where} ({message['role']}) needs a text as 'content', got {_short(message)}."
            )
    return [message["role"] for message in messages]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# Finding where the assistant speaks.


def _prompt_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """The text before the assistant's content, its header included."""
    prompt = _render(tokenizer, messages, add_generation_prompt=True)
    if prompt != _render(tokenizer, messages) or not messages:
        return prompt
    # The template ignores add_generation_prompt: see what it writes between here and an answer.
    probe = _render(tokenizer, [*messages, {"role": "assistant", "content": _MARK}])
    before, mark, _ = probe.partition(_MARK)
    header = before.removeprefix(prompt)
    return before if mark and before.startswith(prompt) and header.strip() else prompt


def _generation_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str
) -> list[Span] | None:
    """The template's own `{% generation %}` blocks, or None if it has none."""
    marked = _render(tokenizer, messages, mark_generation=True)
    if marked == text:
        return None
    before, *pieces = marked.split(_MARK)
    spans, position = [], len(before)
    for piece in pieces:
        inside, _, after = piece.partition(_END_MARK)
        spans.append(Span(position, position + len(inside)))
        position += len(inside) + len(after)
    if marked.replace(_MARK, "").replace(_END_MARK, "") != text:
        raise ValueError(
            "The chat template changes what its {% generation %} blocks write, so the assistant's "
            "part cannot be found. Move the blocks to where the text is written."
        )
    return spans


def _incremental_span(
    tokenizer: Tokenizer, messages: Sequence[Message], index: int, text: str
) -> Span | None:
    """From the prompt before a message to the end of its turn, if both are prefixes of `text`."""
    try:
        prompt = _prompt_text(tokenizer, messages[:index])
        through = _render(tokenizer, messages[: index + 1])
    except ValueError:  # some templates refuse a part of a conversation
        return None
    if text.startswith(through) and through.startswith(prompt):
        return Span(len(prompt), len(through))
    return None


def _probed_span(tokenizer: Tokenizer, messages: Sequence[Message], index: int, text: str) -> Span:
    """The content of message `index`: what changes in `text` when the content does."""
    probe = [*messages]
    probe[index] = {**messages[index], "content": _MARK}
    before, mark, after = _render(tokenizer, probe).partition(_MARK)
    end = len(text) - len(after)
    if not mark or not text.startswith(before) or not text.endswith(after) or end < len(before):
        raise ValueError(
            "The model's chat template writes earlier turns differently once later ones follow, so "
            f"the assistant's part (message {index + 1} of {len(messages)}) cannot be told from "
            "the rest. Use prompt/completion data, or a template with {% generation %} blocks."
        )
    return Span(len(before), end)


def _token_range(
    tokenizer: Tokenizer, encoding: tokenizers.Encoding, span: Span
) -> tuple[int, int, bool]:
    """The tokens of a turn, end token included and nothing after it: `(first, last, ended)`."""
    # A token that straddles the border holds some of the content, so it counts.
    inside = [
        i
        for i, (start, end) in enumerate(encoding.offsets)
        if start < span.end and (end > span.start or start == end == span.start)
    ]
    if inside:
        first, last = inside[0], inside[-1] + 1
    else:
        first = last = sum(end <= span.start for _, end in encoding.offsets)
    ids = encoding.ids
    ends = [i for i in range(first, last) if ids[i] in tokenizer.eos_ids]
    if ends:
        return first, ends[0] + 1, True
    if last < len(ids) and ids[last] in tokenizer.eos_ids:
        return first, last + 1, True
    return first, last, False
