"""Whole runs on a quantised base: trained, resumed, merged either way, and what users get wrong."""

import json
import os
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml

import jlora
from jlora import cli, config, models, report, saved
from jlora.quant import Int8Array, NF4Array


def metrics(run):
    """All lines, without what differs between equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def adapter(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A config with quantize: nf4, and its finished run."""
    folder = tmp_path_factory.mktemp("cli")
    path = tiny.write_config(folder)
    raw = yaml.safe_load(path.read_text())
    raw["model"]["quantize"] = "nf4"
    path.write_text(yaml.safe_dump(raw))
    assert cli.main(["train", str(path)]) == 0
    return path, folder / "runs" / "tiny"


def packed(params):
    leaves = jlora.lora.leaves_by_path(params)
    return [path for path, leaf in leaves.items() if isinstance(getattr(leaf, "w", 0), NF4Array)]


def logits(base, params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 200, (2, 12)))
    return base.forward(params, tokens)


def test_it_learns_and_its_checkpoints_hold_no_base(made):
    lines = metrics(made[1])
    assert lines[8]["eval_loss"] < lines[0]["eval_loss"]
    base, _ = saved.load_run(made[1], lambda text: None)
    assert len(packed(base.params)) == 7
    stored = [
        name
        for file in (made[1] / "checkpoints").rglob("_METADATA")
        for name, entry in json.loads(file.read_text())["tree_metadata"].items()
        if entry["value_metadata"]["value_type"] != "None"
    ]
    assert any("q_proj.kernel.a" in name for name in stored)
    assert not any("codes" in name or "absmax" in name or "kernel.w" in name for name in stored)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(made, capsys, monkeypatch):
    path, run = made
    write = report.MetricsLog.__call__

    def write_and_stop(self, line):
        write(self, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(report.MetricsLog, "__call__", write_and_stop)
    assert cli.main(["train", str(path), "name=stopped"]) == 0
    assert "saved at step 4 of 8" in capsys.readouterr().out
    monkeypatch.undo()
    assert cli.main(["train", str(path), "name=stopped", "model.cache=true"]) == 0
    assert "Resuming at step 4 of 8" in capsys.readouterr().out
    assert metrics(run.parent / "stopped") == metrics(run)
    assert adapter(run.parent / "stopped") == adapter(run)


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_merging_goes_into_the_original_or_the_dequantised_weights(made, tmp_path, capsys):
    path, run = made
    base, _ = saved.load_run(run, lambda text: None)
    trained = logits(base, base.params)
    dense = models.load(config.load(path).model.path)[1]
    saw = jlora.dequantize(base.params)
    outputs = {}
    for into in (None, "original", "dequantized"):
        out = tmp_path / f"merged-{into}"
        options = ["--into", into] if into else []
        assert cli.main(["merge", str(run), "-o", str(out), *options]) == 0
        outputs[into] = models.load(out)
        said = capsys.readouterr().out
        assert ("original weights" in said) == (into != "dequantized")
    model, params = outputs["dequantized"]
    np.testing.assert_allclose(
        model.apply({"params": params}, tokens_of(2)), trained, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(*(kernel(outputs[into][1]) for into in (None, "original")))
    # Both got the same update, on weights that differ.
    update = kernel(params) - kernel(saw).w
    np.testing.assert_allclose(kernel(outputs[None][1]) - kernel(dense), update, atol=1e-6)
    assert np.abs(kernel(outputs[None][1]) - kernel(params)).max() > 0.01


def figures(printed):
    """The table of what merging costs, as {weight: {column: number or None}}."""
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("weight "))
    columns = lines[start].split()[1:]
    rows = [line.split() for line in lines[start + 2 :] if line.startswith("layers/")]
    return {
        path: dict(zip(columns, (None if x == "-" else float(x) for x in cells), strict=True))
        for path, *cells in rows
    }


@pytest.mark.parametrize("into", ["original", "dequantized"])
def test_merging_prints_what_it_costs_for_each_weight(made, tmp_path, capsys, into):
    path, run = made
    command = ["merge", str(run), "--into", into, "-o"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    got = figures(capsys.readouterr().out)
    trained = saved.load_run(run, lambda text: None)[0].params
    original = models.load(config.load(path).model.path)[1] if into == "original" else None
    wanted = {row.path: row for row in jlora.merge_error(trained, base=original).rows}
    assert got.keys() == wanted.keys()
    assert len(got) == 7
    for name, row in wanted.items():
        for column, number in got[name].items():
            value = getattr(row, column)
            assert number == (None if value is None else pytest.approx(value, rel=0.01)), column
        assert (got[name]["shift"] is None) == (into == "dequantized")
        assert got[name]["worst"] >= got[name]["rounding"] > 0
    text = "def f(x): return x"
    assert cli.main([*command, str(tmp_path / "text"), "--error-text", text]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = lines[next(i for i, line in enumerate(lines) if line.startswith("logits after")) + 2 :]
    base, _ = saved.load_run(run, lambda text: None)

    def forward(params, tokens):
        return base.model.apply({"params": params}, tokens)

    sample = jnp.asarray([base.tokenizer.encode(text)])
    wanted = jlora.merge_error(trained, base=original, fn=forward, args=(sample,)).logits
    assert [line.split()[0] for line in shown] == [row.way for row in wanted]
    for line, row in zip(shown, wanted):
        # Differences of nearly equal logits; where merging is exact they are rounding alone.
        assert float(line.split()[1]) == pytest.approx(row.largest, rel=0.02, abs=1e-5)
    assert cli.main([*command, str(tmp_path / "quiet"), "--error-layers", "0"]) == 0
    assert "erased" not in capsys.readouterr().out


def test_what_merging_costs_is_measured_on_as_many_layers_as_asked_for(made):
    _, run = made
    params = saved.load_run(run, lambda text: None)[0].params
    last = jlora.lora.leaves_by_path(params)["layers/mlp/up_proj/kernel"]
    one = jax.tree.map(lambda x: x[1:], last)  # of two layers
    (wanted,) = jlora.merge_error({"w": one}).rows
    got = figures(saved.merge_report(run, params, 1))["layers/mlp/up_proj/kernel"]
    assert got["update"] == pytest.approx(wanted.update, rel=0.01)
    assert got["erased"] == pytest.approx(wanted.erased, rel=0.01)


def tokens_of(rows):
    return jnp.asarray(np.random.default_rng(0).integers(3, 200, (rows, 12)))


def kernel(params):
    return params["layers"]["mlp"]["up_proj"]["kernel"]


def test_it_is_exported_and_spoken_with(made, tmp_path, capsys):
    run = made[1]
    assert cli.main(["export", str(run), "-o", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter(run)
    asked = []
    load = models.load

    def spy(*args, **kwargs):
        asked.append(kwargs["quantize"])
        return load(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", spy)
        command = ["generate", str(run), "--prompt", "a 3", "--max-new-tokens", "4"]
        assert cli.main(command) == 0
    assert asked == ["nf4"]


@pytest.mark.parametrize("fmt", ["int8", "float8"])
def test_other_formats_train_too(made, fmt):
    path, run = made
    options = [f"model.quantize={fmt}", f"name={fmt}", "train.steps=3", "eval.every=null"]
    assert cli.main(["train", str(path), *options]) == 0
    lines = metrics(run.parent / fmt)
    assert lines[3]["eval_loss"] < lines[0]["eval_loss"]


@pytest.mark.parametrize("fmt", ["nf4", "null"])
def test_embedding_and_head_in_int8_train_alike_and_merge(made, tmp_path, capsys, fmt):
    path, run = made
    options = ["model.quantize_embeddings=int8", f"model.quantize={fmt}", f"name=e-{fmt}"]
    assert cli.main(["train", str(path), *options]) == 0
    mine = run.parent / f"e-{fmt}"
    lines = metrics(mine)
    assert lines[8]["eval_loss"] < lines[0]["eval_loss"]
    if fmt == "nf4":
        wanted = metrics(run)[8]["eval_loss"]
        assert lines[8]["eval_loss"] == pytest.approx(wanted, rel=0.02)
        assert lines[8]["eval_loss"] != wanted
    tables = saved.load_run(mine, lambda text: None)[0].params["embed_tokens"]["embedding"]
    assert isinstance(tables, Int8Array)
    capsys.readouterr()
    for into, model_of in (("dequantized", tables.materialise()), ("original", None)):
        output = tmp_path / into
        assert cli.main(["merge", str(mine), "-o", str(output), "--into", into]) == 0
        assert ("embeddings int8" in capsys.readouterr().out) == (into == "original")
        merged = models.load(output)[1]["embed_tokens"]["embedding"]
        original = models.load(config.load(mine / "config.yaml").model.path)[1]
        wanted = model_of if model_of is not None else original["embed_tokens"]["embedding"]
        np.testing.assert_array_equal(merged, wanted)


def test_inspect_shows_the_format_and_reads_no_weights(made, capsys, monkeypatch):
    monkeypatch.setattr(models, "load", lambda *args, **kwargs: pytest.fail("loaded the weights"))
    assert cli.main(["inspect", str(made[0])]) == 0
    printed = capsys.readouterr().out
    assert "rank 4, scaling 8, on nf4" in printed
    assert re.search(r"frozen \(.* MB, .* MB of it in nf4\)", printed)


def test_keeping_the_packed_base_is_no_other_run(made, capsys):
    path, _ = made
    assert cli.main(["train", str(path), "model.cache=true"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert cli.main(["train", str(path), "model.quantize=int8"]) == 2
    assert "model.quantize: was 'nf4', now 'int8'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.quantize=nf3"], ["model.quantize", "nf3", "'nf4'", "'int8'", "'float8'"]),
        (["quantize=nf4"], ["unknown key 'quantize'", "model.quantize"]),
        (
            ["name=x", "model.quantize_embeddings=int8", "model.new_tokens=[<x>]"],
            ["model.quantize_embeddings", "model.new_tokens"],
        ),
        (
            ["name=x", "model.quantize_embeddings=int8", "lora.train=[embed_tokens]"],
            ["embed_tokens/embedding", "quantised", "no gradient"],
        ),
        (
            ["name=x", "lora.train=[layers/mlp/up_proj/kernel]", "lora.targets=[q_proj]"],
            ["layers/mlp/up_proj/kernel", "quantised", "no gradient"],
        ),
    ],
)
def test_mistakes_end_with_one_message(made, capsys, options, words):
    assert cli.main(["train", str(made[0]), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("jlora: error: ")
    for word in words:
        assert word in captured.err
    assert "step 0" not in captured.out


def test_into_says_when_there_are_no_such_weights(tmp_path, capsys):
    path = tiny.write_config(tmp_path, train={"steps": 3, "batch_size": 1}, eval={"samples": 0})
    assert cli.main(["train", str(path), "eval.every=null", "name=plain"]) == 0
    capsys.readouterr()
    command = ["merge", str(tmp_path / "runs" / "plain"), "-o", str(tmp_path / "out")]
    assert cli.main([*command, "--into", "dequantized"]) == 2
    assert "is not quantised: leave --into out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*command, "--into", "original"]) == 0
    assert "erased" not in capsys.readouterr().out


CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SIZES = {  # of the models that the configs name, as their config.json has them
    "qlora-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                 "num_attention_heads": 32},
    "qlora-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                  "num_attention_heads": 64},
}  # fmt: skip


@pytest.mark.parametrize(("name", "gigabytes"), [("qlora-8b", 3.60), ("qlora-70b", 35.3)])
def test_shipped_qlora_runs_are_looked_at_without_their_weights(tmp_path, capsys, name, gigabytes):
    model = tiny.write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    file = model / "config.json"
    sizes = {**SIZES[name], "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    sizes |= {"tie_word_embeddings": False, "max_position_embeddings": 131072}
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    data = tiny.write_data(tmp_path / "train.jsonl", count=100)
    overrides = [f"model.path={model}", f"data.train={data}"]
    assert cli.main(["inspect", str(CONFIGS / f"{name}.yaml"), *overrides]) == 0
    printed = capsys.readouterr().out
    megabytes = float(re.search(r"([\d,.]+) MB of it in nf4", printed)[1].replace(",", ""))
    assert megabytes == pytest.approx(1000 * gigabytes, rel=0.002)
    assert "rank 64, scaling 0.25, on nf4" in printed
