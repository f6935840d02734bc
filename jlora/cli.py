"""The `jlora` command. A user's error ends with one message on stderr and exit code 2."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.arguments import append, count, file

if TYPE_CHECKING:
    from jlora.base import Base

__all__ = ["main"]

_DESCRIPTION = """\
Fine-tune language models with LoRA in JAX.

  jlora inspect configs/quickstart.yaml          what would train, before any compute
  jlora train configs/quickstart.yaml            one YAML file, one run; run again to resume
  jlora train configs/quickstart.yaml train.steps=20 name=short
  jlora generate runs/quickstart                 chat with the result
  jlora generate runs/quickstart --prompt "..."  one answer
  jlora merge runs/quickstart -o merged/         a Hugging Face folder for transformers, vLLM, ...
  jlora export runs/quickstart -o adapter/       a PEFT folder
  jlora bench --shape 1b                         speed and memory of a step on this machine
  jlora plan RUN.yaml --topology v5p:4x4x4       whether a run fits hardware that is not here
  jlora plan RUN.yaml --gpus h100:8              likewise
"""
_JSON = "append the line of JSON to this file too"
_OTHER_BASE = "take an adapter on another base model than the one it was made for"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    code = _run(arguments)
    if code and (devices := sys.modules.get("jlora.devices")):
        devices.leave(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    args = _parse(arguments)
    debug = args.debug or bool(os.environ.get("JLORA_TRACEBACK"))
    try:
        with _plain_warnings():
            code = args.command(args)
    except KeyboardInterrupt:
        print("jlora: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _message(error)
        if debug or message is None:
            traceback.print_exc()
        if message is None:
            return 1
        print(f"jlora: error: {message}", file=sys.stderr)
        if not debug and not _is_ours(error):
            print("(JLORA_TRACEBACK=1 shows where this comes from.)", file=sys.stderr)
        return 2
    return code or 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Takes `key=value` overrides among the options too, which argparse would not."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest:
        if not hasattr(args, "overrides") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jlora", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error (or JLORA_TRACEBACK=1)"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run_commands(commands)
    _add_generate(commands)
    for name, command, summary, described in (
        ("merge", _merge, "fold the adapter into the weights", "a Hugging Face folder"),
        ("export", _export, "write the adapter for PEFT", "a PEFT adapter folder"),
    ):
        sub = commands.add_parser(name, help=summary, description=f"{summary}: {described}")
        sub.add_argument("run", metavar="RUN", help="the folder of a run, such as runs/quickstart")
        sub.add_argument("-o", "--output", required=True, metavar="DIR", help=described)
        sub.add_argument("--other-base", action="store_true", help=_OTHER_BASE)
        sub.set_defaults(command=command)
        if name == "export":
            sub.add_argument(
                "--serve",
                action="store_true",
                help="what vLLM takes: one rank, and every scaling inside lora_B",
            )
        if name == "merge":
            sub.add_argument(
                "--into",
                choices=("original", "dequantized"),
                help="of a run with a quantised base: the weights as they were before (the default "
                "where there are such), or those that training saw",
            )
            sub.add_argument(
                "--error-layers",
                type=int,
                default=3,
                metavar="N",
                help="of a run with a quantised base: layers, evenly spaced, on which to measure "
                "what merging costs, in float64 on the host; default 3, and 0 for none. A layer "
                "of an 8B model takes about half a minute",
            )
            sub.add_argument(
                "--error-text",
                metavar="TEXT",
                help="say as well what merging changes in the logits of this text",
            )
    _add_bench(commands)
    _add_plan(commands)
    return parser


def _add_run_commands(commands: Any) -> None:
    for name, command, summary in (
        ("train", _train, "train, resume, or say that a run is finished"),
        ("inspect", _inspect, "show what would train, without training"),
    ):
        sub = commands.add_parser(name, help=summary, description=summary)
        _add_run_arguments(sub)
        sub.set_defaults(command=command)
        if name == "train":
            _add_process_flags(sub)


def _add_process_flags(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("several processes, each started with the same command")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="of a TPU pod, SLURM, Open MPI or Kubernetes, which say where the others are",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="the number of this one, from 0")


def _add_run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", metavar="RUN.yaml", help="the run's config file")
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replaces a key of the file, such as optim.learning_rate=1e-4",
    )


def _add_generate(commands: Any) -> None:
    sub = commands.add_parser(
        "generate",
        help="chat, or answer prompts",
        description="Without --prompt and --file: an interactive chat.",
    )
    sub.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, or a model")
    sub.add_argument("--adapter", metavar="DIR", help="a PEFT adapter for a model")
    sub.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    sub.add_argument(
        "--file",
        metavar="FILE",
        help="prompts, one a line: JSON with 'messages' or 'prompt', or else plain text; the "
        "answers go to stdout as JSON lines",
    )
    sub.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    sub.add_argument("--raw", action="store_true", help="continue the text; no chat template")
    sub.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    sub.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (greedy) by default"
    )
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1.0")
    sub.add_argument("--seed", type=int, default=0, help="of sampling")
    sub.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the base; by default that of the run, and auto for a model",
    )
    sub.add_argument("--other-base", action="store_true", help=_OTHER_BASE)
    sub.set_defaults(command=_generate)


def _add_bench(commands: Any) -> None:
    summary = "measure a training step on random weights"
    sub = commands.add_parser("bench", help=summary, description=f"{summary}; no download")
    sub.add_argument("--json", type=file, metavar="FILE", help=_JSON)
    # Without a default here, that of bench.Settings holds.
    for name, kind, described in (
        ("shape", str, "tiny, 1b, 8b, 65b, 70b or the path of a config.json; default 1b"),
        ("base", str, "bfloat16 (default), float32, nf4, int8 or float8"),
        ("embeddings", str, "nf4, int8 or float8 for embedding and head; default as computed"),
        ("remat", str, "what the backward pass computes again, as model.remat; default none"),
        ("unroll", int, "layers in an iteration of the loop over them; default 1"),
        ("batch", int, "rows of a micro-batch; default 4"),
        ("length", int, "tokens of a row; default 2048"),
        ("segments", int, "packed examples in a row; default 1, without a mask"),
        ("rank", int, "of the adapters; default 16"),
        ("variant", str, "of the adapters, lora (default), dora or vera"),
        ("targets", str, "weights to adapt, with commas; default the seven projections"),
        ("head-chunk", int, "tokens that go through the head together; default as in a run"),
        ("accumulation", int, "micro-batches of a step; default 1"),
        ("steps", int, "of a repetition; default 5"),
        ("repetitions", int, "default 3, after 2 steps to warm up"),
    ):
        metavar = "N" if kind is int else name.upper()
        sub.add_argument(
            f"--{name}", type=kind, metavar=metavar, help=described, default=argparse.SUPPRESS
        )
    sub.set_defaults(command=_bench)


def _add_plan(commands: Any) -> None:
    summary = "compile a run for hardware that is not here, and say whether it fits"
    sub = commands.add_parser(
        "plan",
        help=summary,
        description=f"{summary}. No weights are read. Exit code 0 if it fits and 3 if it does not.",
    )
    _add_run_arguments(sub)
    target = sub.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--topology",
        metavar="NAME",
        help="a TPU's generation and its chips along each axis: v5e:2x4, v5p:4x4x4, v6e:4x4, "
        "tpu7x:2x2x1, ...",
    )
    target.add_argument(
        "--gpus",
        metavar="NAME",
        help="a kind of GPU and how many: h100:8, or hosts and GPUs of each: a100-80g:4x8, ...",
    )
    sub.add_argument("--slices", type=count, metavar="N", help="of a TPU topology; default 1")
    sub.add_argument(
        "--shape",
        metavar="NAME",
        help="of the model, if its config.json is not here: tiny, 1b, 8b, 65b, 70b or a path",
    )
    sub.add_argument(
        "--suggest",
        action="store_true",
        help="compile other meshes, batches, remat and formats of the base, and list what fits",
    )
    sub.add_argument("--want", type=count, default=3, metavar="N", help="suggestions; default 3")
    sub.add_argument("--json", type=file, metavar="FILE", help=_JSON)
    sub.set_defaults(command=_plan)


# Errors

_AGAIN = "start all of them again with the same command, and the run resumes."


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the source line that gave them."""

    def show(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if _is_broken_program(str(message)) or not issubclass(category, UserWarning):
            return
        print(f"jlora: note: {message}", file=sys.stderr)

    def show_unraisable(event: Any) -> None:
        # What a failed write leaves in orbax's threads; the failure itself is raised and told.
        if "Event loop is closed" not in str(event.exc_value):
            sys.__unraisablehook__(event)

    hook = sys.unraisablehook
    with warnings.catch_warnings():
        warnings.showwarning = show
        sys.unraisablehook = show_unraisable
        try:
            yield
        finally:
            sys.unraisablehook = hook


def _is_broken_program(message: str) -> bool:
    """Whether jax could not read a kept program; removes it, or jax would keep it and try again."""
    if not message.startswith("Error reading persistent compilation cache entry for '"):
        return False
    from jlora import base

    name = message.split("'")[1]
    for program in base.cache_folder().glob(f"programs-*/{name}-*"):
        program.unlink(missing_ok=True)
    return True


def _message(error: Exception) -> str | None:
    """What to tell the user, or None if this is not something a user can mend."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
            return (
                "out of memory. Lower train.batch_size (and raise train.accumulation by as much) "
                f"or data.length, or set model.remat=full.\n{text.splitlines()[0]}"
            )
        gone = "Gloo" in text or "coordination service" in text
        return f"another process of this run is gone: {_AGAIN}\n{text[:200]}" if gone else None
    if type(error).__name__ == "NonFiniteError":
        return text
    if "Unable to initialize backend" in text:  # JAX_PLATFORMS names what is not here
        return (
            f"{text.splitlines()[0]}\nSet JAX_PLATFORMS to what this machine has, or leave it out."
        )
    mendable = (ValueError, KeyError, NotImplementedError, OSError, FloatingPointError)
    return text if isinstance(error, mendable) else None


def _is_ours(error: Exception) -> bool:
    """Whether the message says enough: jlora itself raised it, or it names a file."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = not frames or Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
    return ours or (isinstance(error, OSError) and error.filename is not None)


def _say(text: str) -> None:
    print(text, flush=True)


def _whisper(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _set_up_process() -> None:
    """Quiets orbax, and keeps compiled programs in the user's cache folder for the next start."""
    import logging

    import jax

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax repeats what it raises
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if given is None:
        from jlora import base

        jax.config.update("jax_compilation_cache_dir", str(base.program_folder()))


# Commands. Modules are imported where they are used, so that --help does not wait for them.


def _train(args: argparse.Namespace) -> None:
    from jlora import config

    run = config.load(args.config, args.overrides)
    from jlora import devices
    from jlora import run as runs

    _set_up_process()
    import jax

    devices.start(args.coordinator, args.processes, args.process, automatic=args.distributed)
    runs.run_training(run, _say, jax.devices())


def _inspect(args: argparse.Namespace) -> None:
    from jlora import config

    run = config.load(args.config, args.overrides)
    from jlora import run as runs

    _set_up_process()
    runs.inspect(run, _say)


def _generate(args: argparse.Namespace) -> None:
    from jlora import dialogue

    dialogue.run(args, lambda: _load(args))


def _load(args: argparse.Namespace) -> "Base":
    from jlora import base, peft, saved

    _set_up_process()
    if saved.is_run(args.model):
        if args.adapter:
            raise ValueError("A run has its own adapter; --adapter goes with a model.")
        return saved.load_run(args.model, _whisper, dtype=args.dtype, other_base=args.other_base)[0]
    vocabulary = base.load_vocabulary(args.model, folder=args.adapter)
    loaded = base.load_base(args.model, dtype=args.dtype or "auto", vocabulary=vocabulary)
    if args.adapter:
        params, _ = peft.load(args.adapter, loaded.params, other_base=args.other_base)
        loaded = dataclasses.replace(loaded, params=params)
    return loaded


def _merge(args: argparse.Namespace) -> None:
    import jlora
    from jlora import models, saved

    _set_up_process()
    _refuse_occupied(args.output)
    if args.error_text == "":
        raise ValueError("--error-text needs a text of at least one token.")
    loaded, _, into = saved.load_to_merge(
        args.run, _whisper, into=args.into, other_base=args.other_base
    )
    other = args.other_base
    errors = saved.merge_report(args.run, loaded.params, args.error_layers, other_base=other) or ""
    if args.error_text is not None:
        errors += saved.logits_report(args.run, loaded, args.error_text, other_base=other)
    merged = jlora.merge_params(loaded.params)
    models.save(args.output, loaded.model, merged, tokenizer_files=loaded.vocabulary.files)
    _say(f"Wrote the merged model to {args.output}.{into}")
    if errors:
        _say(errors)


def _export(args: argparse.Namespace) -> None:
    from jlora import saved

    _set_up_process()
    _refuse_occupied(args.output)
    saved.export(args.run, args.output, _whisper, other_base=args.other_base, serve=args.serve)
    _say(f"Wrote the adapter to {args.output}.")


def _bench(args: argparse.Namespace) -> None:
    given = {k: v for k, v in vars(args).items() if k not in ("command", "debug", "json")}
    if "targets" in given:
        given["targets"] = tuple(given["targets"].split(","))
    import jax

    from jlora import bench

    # A program from the cache would make the time to compile a wrong one.
    jax.config.update("jax_enable_compilation_cache", False)
    result = bench.measure(bench.Settings(**given), _whisper)
    _say(bench.table(result))
    line = json.dumps(result)
    _say(line)
    append(args.json, [line])


def _plan(args: argparse.Namespace) -> int:
    from jlora import config

    run = config.load(args.config, args.overrides)
    if args.suggest and run.model.calibrate:
        raise ValueError(
            "--suggest tries meshes, and model.calibrate rounds the base on one device: add "
            "model.calibrate=null to see what fits without it."
        )
    from jlora import topology

    topology.set_up()
    from jlora import gpus, plan, plan_report

    if args.slices is not None and args.gpus:
        raise ValueError("--slices goes with --topology; hosts of GPUs are --gpus h100:4x8.")
    target = gpus.gpus(args.gpus) if args.gpus else topology.tpus(args.topology, args.slices or 1)
    model = plan.read_model(run, args.shape)
    _whisper(f"Compiling the step for {target.name} ...")
    made = plan.measure(run, model, target)
    _say(plan_report.table(made))
    for line in plan_report.advice(made, num_devices=len(target.devices)):
        _say(f"  {line}")
    lines = [made.to_json()]
    if args.suggest:
        lines.append(_suggest(args, model, target, None if made.fits else made))
    elif not made.fits:
        _say("--suggest looks for settings that fit.")
    _say("\n".join(lines))
    append(args.json, lines)
    return 0 if made.fits else 3


def _suggest(args: argparse.Namespace, model: Any, target: Any, refused: Any) -> str:
    """Says what fits; returns it as a line of JSON."""
    from jlora import config, suggest

    def load(extra: Sequence[str]) -> config.RunConfig:
        return config.load(args.config, [*args.overrides, *extra])

    found = suggest.suggest(load, model, target, refused, _whisper, want=args.want)
    _say("What fits:" if found else "Nothing that was tried fits; more devices would be needed.")
    for one in found:
        left = one.plan.headroom_bytes
        room = "" if left is None else f", {left / 2**30:.1f} GiB to spare"
        moved = sum(total.bytes for total in one.plan.collectives.values())
        _say(f"  {' '.join(one.overrides)}")
        _say(
            f"    {one.plan.peak_bytes / 2**30:.1f} GiB a device{room}; "
            f"{moved / 2**30:.1f} GiB to each device a step"
        )
    rows = [{"overrides": one.overrides, **json.loads(one.plan.to_json())} for one in found]
    return json.dumps({"suggestions": rows})


def _refuse_occupied(folder: str) -> None:
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder; choose another.")


if __name__ == "__main__":
    sys.exit(main())
