"""Whole runs of a tiny model through the command line: from raw text to a merged folder."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from jlora import base, cli, config, dialogue, models, peft, report, saved
from jlora import run as runs


def metrics(run):
    """All lines, without what differs between equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def adapter(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A config and its finished run: (config path, run folder, what was printed)."""
    folder = tmp_path_factory.mktemp("cli")
    path = tiny.write_config(folder)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert cli.main(["train", str(path)]) == 0
    return path, folder / "runs" / "tiny", out.getvalue()


# Training


def test_a_run_leaves_its_folder(made):
    path, run, _ = made
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        "adapter",
        "samples.md",
        "result.json",
    }
    assert config.load(run / "config.yaml") == config.load(path)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in run.iterdir() if "partial" in p.name]


def test_metrics_hold_every_step_once(made):
    lines = [json.loads(line) for line in (made[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 4, 8]
    assert set(lines[8]) == {
        "step", "tokens", "loss", "eval_loss", "learning_rate", "grad_norm", "target_tokens",
        "tokens_per_second",
    }  # fmt: skip
    assert lines[8]["eval_loss"] < lines[0]["eval_loss"]


def test_the_summary_comes_before_the_first_step(made):
    printed = made[2]
    table = printed.index("trainable parameters")
    assert "layers/self_attn/q_proj/kernel" in printed[:table]
    assert table < printed.index("step 0/8")
    assert re.search(r"Done: 8 steps, held-out loss [\d.]+ -> [\d.]+", printed)


def test_samples_show_the_prompt_before_after_and_reference(made):
    text = (made[1] / "samples.md").read_text()
    for heading in ("**Prompt**", "**Before**", "**After**", "**Reference**"):
        assert text.count(heading) == 2


def test_a_finished_run_says_so_and_changes_nothing(made, capsys):
    path, run, _ = made
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert cli.main(["train", str(path)]) == 0
    assert "is finished: 8 steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_another_config_does_not_touch_a_run(made, capsys):
    path, run, _ = made
    before = adapter(run)
    assert cli.main(["train", str(path), "lora.rank=2"]) == 2
    message = capsys.readouterr().err
    assert "lora.rank: was 4, now 2" in message
    assert "another name" in message
    assert adapter(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(made, capsys, monkeypatch, number):
    path, run, _ = made
    name = f"stopped-{number.name}"
    handler = signal.getsignal(number)  # a shell's background jobs ignore SIGINT
    write = report.MetricsLog.__call__

    def write_and_stop(self, line):
        write(self, line)
        if line["step"] == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(report.MetricsLog, "__call__", write_and_stop)
    assert cli.main(["train", str(path), f"name={name}"]) == 0
    assert re.search(r"saved at step 4 of 8", capsys.readouterr().out)
    stopped = run.parent / name
    assert not (stopped / "result.json").exists()
    monkeypatch.undo()
    assert signal.getsignal(number) == handler
    assert cli.main(["train", str(path), f"name={name}"]) == 0
    assert "Resuming at step 4 of 8" in capsys.readouterr().out
    assert metrics(stopped) == metrics(run)
    assert adapter(stopped) == adapter(run)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_equal(made):
    path, run, _ = made
    killed = run.parent / "killed"
    command = [sys.executable, "-m", "jlora.cli", "train", str(path), "name=killed"]
    for lines, delay in [(2, 0.0), (4, 0.01), (7, 0.02)]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = killed / "metrics.jsonl"
        while process.poll() is None:
            if log.exists() and log.read_text().count("\n") >= lines:
                time.sleep(delay)
                process.kill()
                break
            time.sleep(0.001)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert metrics(killed) == metrics(run)
    assert adapter(killed) == adapter(run)


def test_a_half_written_line_of_metrics_is_written_again(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    writer = report.MetricsLog(log, resume_at=1)
    writer({"step": 2, "again": True})
    writer.close()
    assert list(report.read_metrics(log)) == [{"step": 0}, {"step": 1}, {"step": 2, "again": True}]
    with pytest.raises(ValueError, match="JSON compliant"):
        report.MetricsLog(log, resume_at=None)({"loss": float("nan")})


def test_a_full_disk_at_a_line_of_metrics_names_the_file(tmp_path):
    writer = report.MetricsLog(tmp_path / "metrics.jsonl", resume_at=None)
    writer._file = open("/dev/full", "w")  # noqa: SIM115 (closed by the writer)
    with pytest.raises(OSError, match=r"step 3 to .*metrics.jsonl: No space left .* resumes"):
        writer({"step": 3})
    writer.close()


def test_what_no_adapter_folder_can_hold_is_refused_before_weights_are_read(
    made, capsys, monkeypatch
):
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("loaded the weights"))
    options = ["lora.targets=[embed_tokens, q_proj]", "name=tied"]
    assert cli.main(["train", str(made[0]), *options]) == 2
    assert "'embed_tokens/embedding' cannot be exported" in capsys.readouterr().err


def test_a_nan_ends_the_run_and_says_when(made, capsys):
    path, run, _ = made
    options = ["name=nan", "optim.learning_rate=1e30", "optim.clip_norm=null", "eval.every=null"]
    assert cli.main(["train", str(path), *options, "checkpoint.every=1"]) == 2
    message = capsys.readouterr().err
    step = int(re.search(r"at step (\d+)", message)[1])
    assert f"step {step - 1} is the last saved" in message
    assert [line["step"] for line in metrics(run.parent / "nan")][-1] == step - 1
    saved = sorted(int(p.name) for p in (run.parent / "nan" / "checkpoints").iterdir())
    assert saved[-1] == step - 1


def test_a_full_disk_ends_the_run_and_the_next_start_goes_on(made, capsys):
    resource = pytest.importorskip("resource")
    path, run, _ = made
    command = ["train", str(path), "name=full"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert cli.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    captured = capsys.readouterr()
    assert "Could not save the checkpoint of step 2" in captured.err
    assert "Traceback" not in captured.err
    assert cli.main(command) == 0
    assert metrics(run.parent / "full") == metrics(run)
    assert adapter(run.parent / "full") == adapter(run)


def test_two_processes_do_not_write_to_one_run(made, capsys):
    from jlora import process

    path, run, _ = made
    with process.lock(run.parent / "locked"):
        assert cli.main(["train", str(path), "name=locked"]) == 2
    assert "Another process" in capsys.readouterr().err


def test_patience_keeps_the_best_adapter(made, capsys, monkeypatch):
    path, run, _ = made
    found = iter([3.0, 2.0, 1.0, 1.5, 1.2, 0.1])
    monkeypatch.setattr(runs.train, "evaluate", lambda *args: next(found))
    options = ["eval.every=1", "eval.patience=2", "eval.samples=0", "name=patient"]
    assert cli.main(["train", str(path), *options]) == 0
    printed = capsys.readouterr().out
    assert "no better evaluation since step 2" in printed
    assert "adapter of step 2" in printed
    monkeypatch.undo()
    result = json.loads((run.parent / "patient" / "result.json").read_text())
    assert (result["steps"], result["best_step"], result["eval_loss"]) == (4, 2, 1.0)


def test_a_bfloat16_run_by_epochs_without_held_out_rows(made):
    path, run, _ = made
    options = ["train.steps=null", "train.epochs=0.5", "data.validation=null", "eval.every=null"]
    options += ["model.dtype=bfloat16", "model.remat=full", "optim.warmup_steps=0"]
    assert cli.main(["train", str(path), *options, "name=half"]) == 0
    lines = metrics(run.parent / "half")
    assert lines[0]["step"] == 1
    assert not any("eval_loss" in line for line in lines)
    assert not (run.parent / "half" / "samples.md").exists()
    tensors = safetensors.numpy.load_file(run.parent / "half/adapter/adapter_model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype("float32")}


# After training


def trained_logits(path, run):
    """Logits of the base with the run's adapter, before any export."""
    loaded, lora = saved.load_run(run, lambda text: None)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 200, (2, 12)))
    return tokens, loaded.forward(loaded.params, tokens), loaded, lora


def test_merged_and_exported_give_the_trained_logits(made, tmp_path):
    path, run, _ = made
    tokens, expected, _, _ = trained_logits(path, run)
    assert cli.main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 0
    assert cli.main(["export", str(run), "-o", str(tmp_path / "adapter")]) == 0
    model, params = models.load(tmp_path / "merged")
    merged = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)
    loaded = base.load_base(config.load(path).model.path)
    params, _ = peft.load(tmp_path / "adapter", loaded.params)
    np.testing.assert_allclose(loaded.forward(params, tokens), expected, rtol=1e-5, atol=1e-5)
    plain = loaded.apply(loaded.params, tokens)
    assert np.abs(plain - expected).max() > 0.05  # the adapter does something
    assert cli.main(["export", str(run), "-o", str(tmp_path / "served"), "--serve"]) == 0
    served, read = peft.load(tmp_path / "served", loaded.params)
    assert (read.alpha, read.rank_pattern, read.alpha_pattern) == (read.rank, (), ())
    np.testing.assert_allclose(loaded.forward(served, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_transformers_gives_the_trained_logits_from_the_merged_folder(made, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path, run, _ = made
    tokens, expected, _, _ = trained_logits(path, run)
    assert cli.main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = model(torch.tensor(np.asarray(tokens))).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_unfinished_run_is_used_from_its_newest_checkpoint(made, capsys, monkeypatch, tmp_path):
    path, run, _ = made
    _, expected, _, _ = trained_logits(path, run)
    (run / "result.json").rename(tmp_path / "result.json")
    try:
        _, logits, _, _ = trained_logits(path, run)
        assert cli.main(["export", str(run), "-o", str(tmp_path / "adapter")]) == 0
    finally:
        (tmp_path / "result.json").rename(run / "result.json")
    assert "checkpoint of step 8" in capsys.readouterr().err
    np.testing.assert_array_equal(logits, expected)


def test_an_occupied_folder_is_not_overwritten(made, tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert cli.main(["merge", str(made[1]), "-o", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "x"


def test_generate_answers_one_prompt_and_many_alike(made, tmp_path, capsys):
    run = str(made[1])
    greedy = ["--max-new-tokens", "5"]
    assert cli.main(["generate", run, "--prompt", "a 3", *greedy]) == 0
    one = capsys.readouterr().out.removesuffix("\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "a 3"}\nb 44444\n\n' + chat_row(("user", "a 3"), ("assistant", "x"))
    )
    assert cli.main(["generate", run, "--file", str(prompts), *greedy]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a 3", "b 44444", "a 3"]
    assert rows[0]["answer"] == rows[2]["answer"] == one


def test_generate_takes_a_model_and_an_adapter(made, capsys):
    path, run, _ = made
    model = config.load(path).model.path
    outputs = []
    for command in ([str(run)], [model, "--adapter", str(run / "adapter")], [model]):
        assert cli.main(["generate", *command, "--prompt", "hgfe", "--max-new-tokens", "6"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_sampling_follows_its_seed(made, capsys):
    def draw(seed):
        options = ["--temperature", "1.5", "--top-p", "0.9", "--seed", str(seed)]
        command = ["generate", str(made[1]), "--prompt", "a", "--max-new-tokens", "12"]
        assert cli.main([*command, *options]) == 0
        return capsys.readouterr().out

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_chat_remembers_until_reset(made, capsys, monkeypatch):
    asked = []
    encode = dialogue._encode

    def spy(loaded, messages, raw):
        asked.append([message["content"] for message in messages])
        return encode(loaded, messages, raw)

    monkeypatch.setattr(dialogue, "_encode", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n/exit\nfour\n"))
    command = ["generate", str(made[1]), "--max-new-tokens", "3", "--system", "be brief"]
    assert cli.main(command) == 0
    assert [turn[0] for turn in asked] == ["be brief"] * 3
    assert asked[0][1:] == ["one"]
    assert asked[1][-1] == "two"
    assert "one" in asked[1]
    assert asked[2][1:] == ["three"]


def test_inspect_shows_what_would_train_and_reads_no_weights(made, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("loaded the weights"))
    path, run, _ = made
    assert cli.main(["inspect", str(path), "lora.targets=[q_proj, v_proj]"]) == 0
    printed = capsys.readouterr().out
    assert "layers/self_attn/v_proj/kernel" in printed
    assert "o_proj" not in printed
    assert "⟦aaaa<|im_end|>⟧" in printed
    assert not (run.parent / "never").exists()


@pytest.mark.parametrize("sizes", ["mesh={fsdp: -1}", "mesh={data: 2, fsdp: 2, tensor: 16}"])
def test_inspect_needs_no_devices_for_a_mesh(made, capsys, sizes):
    assert cli.main(["inspect", str(made[0]), sizes]) == 0
    assert "layers/self_attn/v_proj/kernel" in capsys.readouterr().out


# What users get wrong: one message, exit code 2, nothing harmed


def damage_model(folder, **changes):
    """Rewrites the model's tensors; None leaves one out."""
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for name, change in changes.items():
        name = name.replace("__", ".")
        tensors[name] = change(tensors[name]) if change else tensors.pop(name)
        if not change:
            del tensors[name]
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def add_row(text):
    def change(folder):
        with open(folder / "train.jsonl", "a") as file:
            file.write(text + "\n")

    return change


def chat_row(*turns):
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})


def truncated_gguf(folder):
    import gguf

    path = folder / "cut.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:-5000])


MISTAKES = {
    "unknown key": (None, ["train.stepz=3"], ["unknown key 'train.stepz'", "train.steps"]),
    "wrong type": (None, ["lora.rank=many"], ["lora.rank", "a whole number"]),
    "missing config": (lambda f: (f / "tiny.yaml").unlink(), [], ["no config file", "tiny.yaml"]),
    "missing data": (lambda f: (f / "train.jsonl").unlink(), [], ["no data file", "train.jsonl"]),
    "missing model": (None, ["model.path=/no/such/model"], ["/no/such/model"]),
    "unmatched target": (None, ["lora.targets=[q_prj]"], ["'q_prj'", "q_proj"]),
    "rank too large": (None, ["lora.rank=500"], ["rank 500"]),
    "bad JSON": (add_row('{"messages": ['), [], ["train.jsonl:25", "JSON"]),
    "too long": (add_row(chat_row(("user", "x"), ("assistant", "y" * 99))), [],
                 ["train.jsonl:25", "64"]),
    "empty data": (lambda f: (f / "train.jsonl").write_text(""), [], ["train.jsonl"]),
    "unknown role": (add_row(chat_row(("wizard", "x"), ("assistant", "y"))), [],
                     ["train.jsonl:25", "wizard"]),
    "missing tensor": (lambda f: damage_model(f / "model", model__norm__weight=None), [],
                       ["model.norm.weight"]),
    "wrong shape": (lambda f: damage_model(f / "model", model__norm__weight=lambda x: x[:-1]), [],
                    ["model.norm.weight", "31"]),
    "truncated weights": (lambda f: os.truncate(f / "model" / "model.safetensors", 5000), [],
                          ["model.safetensors"]),
    "truncated GGUF": (truncated_gguf, ["model.path={folder}/cut.gguf"], ["cut.gguf"]),
    "no tokenizer": (lambda f: (f / "model" / "tokenizer.json").unlink(), [], ["tokenizer.json"]),
    "too many held out": (None, ["data.validation=24"], ["24"]),
    "unknown built-in": (None, ["data.train=builtin:poems"], ["builtin:poems", "docstrings"]),
    "output is a file": (lambda f: (f / "runs").write_text("x"), [], ["runs"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_message_and_code_2(tmp_path, capsys, mistake):
    change, overrides, words = MISTAKES[mistake]
    path = tiny.write_config(tmp_path)
    if change:
        change(tmp_path)
    overrides = [text.format(folder=tmp_path) for text in overrides]
    assert cli.main(["train", str(path), *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jlora: error: ")
    assert "Traceback" not in captured.err
    assert "JLORA_TRACEBACK" not in captured.err  # it is our own message
    for word in words:
        assert word in captured.err
    assert "step 0" not in captured.out  # before any compute


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "/no/such/model", "--prompt", "x"], ["/no/such/model"]),
        (["generate", "{run}", "--adapter", "x", "--prompt", "x"], ["--adapter"]),
        (["generate", "{run}", "--file", "/no/such/file"], ["/no/such/file"]),
        (["generate", "{run}", "--prompt", "x", "--temperature", "-1"], ["temperature"]),
        (["generate", "{run}", "--prompt", "x", "--top-p", "0"], ["top_p"]),
        (["generate", "{run}", "--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens"]),
        (["merge", "{run}/adapter", "-o", "{out}"], ["config.yaml"]),
        (["export", "/no/such/run", "-o", "{out}"], ["/no/such/run"]),
    ],
)
def test_mistakes_after_training(made, tmp_path, capsys, arguments, words):
    given = [text.format(run=made[1], out=tmp_path / "out") for text in arguments]
    assert cli.main(given) == 2
    message = capsys.readouterr().err
    assert message.startswith("jlora: error: ")
    for word in words:
        assert word in message


def test_a_traceback_is_shown_on_request(made, capsys):
    assert cli.main(["--debug", "train", str(made[0]), "train.stepz=3"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_names_every_command_and_needs_no_heavy_module():
    code = (
        "import sys\n"
        "from jlora import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ['flax', 'orbax', 'optax', 'pydantic', 'rich', 'matplotlib', 'tokenizers']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("train", "inspect", "generate", "merge", "export"):
        assert f"jlora {command} " in done.stdout
    assert done.stdout.endswith("[]\n")


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["trian"])
    assert error.value.code == 2


# Shown while training


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(capsys, monkeypatch):
    with report.ProgressReport(100) as plain:
        for step in range(4):
            plain({"step": step, "loss": 1.0, "tokens_per_second": 5.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 0/100  loss 1.0000  5 tokens/s")
    assert len(lines) == 2  # then not again for ten seconds
    monkeypatch.setenv("FORCE_COLOR", "1")
    with report.ProgressReport(100) as bar:
        bar({"step": 1, "loss": 1.25})
        bar({"step": 2, "loss": 1.0, "eval_loss": 2.0, "tokens_per_second": 1234.0})
        bar({"step": 3, "loss": 0.75})
    shown = capsys.readouterr().out
    assert "step 2: held-out loss 2.0000" in shown
    assert "step 3/100" in shown
    assert "0.7500" in shown


def test_a_fence_holds_whatever_a_sample_holds(tmp_path):
    sample = report.Sample(prompt="```python\nx\n```", reference="r", before="b", after="````")
    report.write_samples(tmp_path / "samples.md", [sample], note="n")
    text = (tmp_path / "samples.md").read_text()
    assert "````text\n```python" in text
    assert "`````text\n````\n`````" in text
