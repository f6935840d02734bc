"""`jlora generate` once the model is there: an answer, a file of answers, or a chat."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jlora import chat, generate
from jlora.base import Base

__all__ = ["run"]


def run(args: argparse.Namespace, load: Callable[[], Base]) -> None:
    """Reads the prompts, loads the model and answers, or chats if there are none.

    Args:
      args: of the command line, as `cli.py` defines them.
      load: gives the model; called once the prompts are known to be good.

    Raises:
      ValueError: if a file of prompts is empty or not as it should be.
    """
    prompts = [_as_messages(text, args.system) for text in args.prompt or ()]
    if args.file:
        prompts += list(_read_prompts(Path(args.file), args.system))
        if not prompts:
            raise ValueError(f"{args.file} holds no prompts.")
    loaded = load()
    raw = args.raw or not loaded.tokenizer.has_chat_template
    if not prompts:
        _chat(loaded, args, raw)
    elif len(prompts) == 1 and not args.file:
        _stream(loaded, args, _encode(loaded, prompts[0], raw))
        print()
    else:
        _answer_all(loaded, args, prompts, raw)


def _as_messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def _read_prompts(path: Path, system: str | None) -> Iterator[list[dict[str, str]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield _as_messages(line, system)
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}.") from None
        if isinstance(row.get("messages"), list):
            messages = row["messages"]
            # A row of training data: its last answer is what we are to say.
            yield (
                messages[:-1]
                if messages[-1:] and messages[-1].get("role") == "assistant"
                else (messages)
            )
        elif isinstance(row.get("prompt"), str):
            yield _as_messages(row["prompt"], system)
        else:
            raise ValueError(
                f"{path}:{number}: expected 'messages' or 'prompt', got {sorted(row)}."
            )


def _encode(loaded: Base, messages: list[dict[str, str]], raw: bool) -> list[int]:
    if not raw:
        return chat.encode_prompt(loaded.tokenizer, messages)
    text = "\n".join(message["content"] for message in messages)
    tokens = loaded.tokenizer.encode(text)
    if not tokens:
        raise ValueError("The prompt is empty.")
    return tokens


def _options(loaded: Base, args: argparse.Namespace, turn: int = 0) -> dict[str, Any]:
    return {
        "max_new_tokens": args.max_new_tokens,
        "key": jax.random.fold_in(jax.random.key(args.seed), turn),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "eos_ids": loaded.tokenizer.eos_ids,
        "pad_id": loaded.tokenizer.pad_id,
    }


def _stream(loaded: Base, args: argparse.Namespace, prompt: list[int], turn: int = 0) -> str:
    """Prints an answer as it comes; returns it."""
    ids: list[int] = []
    shown = ""
    options = _options(loaded, args, turn)
    for token in generate.stream(
        loaded.forward, loaded.init_cache, loaded.params, prompt, **options
    ):
        ids.append(token)
        text = loaded.tokenizer.decode(ids)
        # A character of several tokens is not complete yet, or the text before it changes.
        if not text.endswith("�") and text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = loaded.tokenizer.decode(ids)
    print(text[len(shown) :], end="", flush=True)
    return text


def _answer_all(
    loaded: Base, args: argparse.Namespace, prompts: list[list[dict[str, str]]], raw: bool
) -> None:
    encoded = [_encode(loaded, messages, raw) for messages in prompts]
    size = 8
    for start in range(0, len(prompts), size):
        answers = generate.generate(
            loaded.forward,
            loaded.init_cache,
            loaded.params,
            encoded[start : start + size],
            **_options(loaded, args, start),
        )
        for messages, answer in zip(prompts[start : start + size], answers, strict=True):
            row = {"prompt": messages[-1]["content"], "answer": loaded.tokenizer.decode(answer)}
            print(json.dumps(row, ensure_ascii=False), flush=True)


def _chat(loaded: Base, args: argparse.Namespace, raw: bool) -> None:
    """Reads turns until end of input; /reset forgets them, /exit ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("Chat: /reset starts anew, /exit or Ctrl-D ends.", file=sys.stderr, flush=True)
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages, turn = list(start), 0
    while True:
        try:
            text = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/reset":
            messages = list(start)
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        prompt = _encode(loaded, messages[-1:] if raw else messages, raw)
        try:
            answer = _stream(loaded, args, prompt, turn)
        except KeyboardInterrupt:
            answer = ""
            messages.pop()
        print()
        if answer and not raw:
            messages.append({"role": "assistant", "content": answer})
        turn += 1
