"""Runs whose `lora.init` changes the base: resumed, served, merged and exported."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from laws import assert_close
from test_peft import load_in_peft, logits_of, torch_model
from tiny import write_config

import jlora
from jlora import cli, config, models, saved

TOKENS = np.asarray(jax.random.randint(jax.random.key(9), (2, 12), 0, 250), np.int32)
CASES = {
    "pissa": ({"init": "pissa", "dropout": 0.0}, {}),
    "loftq": ({"init": "loftq", "dropout": 0.0}, {"quantize": "nf4"}),
}


def logits(base, params, tokens=TOKENS):
    return jlora.adapt(lambda p: base.model.apply({"params": p}, tokens))(params)


def quiet(text):
    pass


def lose_the_end(run):
    """The last checkpoints and the result are gone: the run goes on from the middle."""
    (run / "result.json").unlink()
    for step in (run / "checkpoints").glob("[0-9]*"):
        if int(step.name) > 2:
            shutil.rmtree(step)


def assert_same_adapter(one, other):
    first, second = (
        safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (one, other)
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_an_init(case, tmp_path, monkeypatch, capsys):
    lora, quantised = CASES[case]
    path = write_config(tmp_path, lora={"rank": 4, **lora}, eval={"samples": 0}, train={"steps": 4})
    train = ["train", str(path), *(f"model.{k}={v}" for k, v in quantised.items())]
    assert cli.main(train) == 0
    assert cli.main([*train, "name=again"]) == 0
    whole, again = (tmp_path / "runs" / name for name in ("tiny", "again"))
    lose_the_end(again)
    unfinished, own = saved.load_run(again, quiet)
    assert own.init == lora["init"]
    exported, plain = saved.load_run(again, quiet, plain=True)
    assert plain.init == "default"
    if not quantised:
        assert_close(logits(exported, exported.params), logits(unfinished, unfinished.params), 1e-4)
    assert cli.main([*train, "name=again"]) == 0
    assert_same_adapter(whole, again)

    # What training saw: the function of the last step, whose loss is in the result.
    trained, _ = saved.load_run(whole, quiet)
    on_original, read = saved.load_run(whole, quiet, quantized=False)
    assert read.rank == 8
    if not quantised:
        assert_close(logits(trained, trained.params), logits(on_original, on_original.params), 1e-4)
    out = tmp_path / "merged"
    into = ["--into", "dequantized"] if quantised else []
    assert cli.main(["merge", str(whole), "-o", str(out), "--error-layers", "0", *into]) == 0
    model, params = models.load(out)
    merged = model.apply({"params": params}, TOKENS)
    assert_close(merged, logits(trained, trained.params), 1e-4)

    if quantised:  # the row of the original weights is about the model that is written
        written = tmp_path / "original"
        capsys.readouterr()
        options = ["--error-layers", "2", "--error-text", "def f(x): return x"]
        assert cli.main(["merge", str(whole), "-o", str(written), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        row = next(line.split() for line in lines if line.startswith("original "))
        for figures in jlora.merge_error(trained.params, base=on_original.params).rows:
            (shown,) = (line.split() for line in lines if line.startswith(figures.path))
            for number, name in zip(shown[1:], ("update", "rounding", "worst", "erased", "noise")):
                assert float(number) == pytest.approx(getattr(figures, name), rel=0.01), name
        tokens = jnp.asarray([trained.tokenizer.encode("def f(x): return x")])
        model, params = models.load(written)
        change = model.apply({"params": params}, tokens) - logits(trained, trained.params, tokens)
        assert float(row[1]) == pytest.approx(float(jnp.abs(change).max()), rel=0.01)

    # And PEFT on the original base, from the run and from an export.
    assert cli.main(["export", str(whole), "-o", str(tmp_path / "exported")]) == 0
    model, params = models.load(tmp_path / "model")
    torch, reference = torch_model(tmp_path / "base", model, params)
    monkeypatch.setattr("test_peft.TOKENS", TOKENS)
    for folder in (whole / "adapter", tmp_path / "exported"):
        _, fresh = torch_model(tmp_path / "base", model, params)
        got = logits_of(torch, load_in_peft(fresh, folder))
        np.testing.assert_allclose(
            got, logits(on_original, on_original.params), rtol=1e-4, atol=1e-4
        )
    assert np.abs(got - logits_of(torch, reference)).max() > 1e-2


@pytest.mark.slow
def test_a_run_of_vera_resumes_to_the_bit_and_peft_loads_it(tmp_path, monkeypatch):
    path = write_config(
        tmp_path,
        lora={"rank": 32, "variant": "vera"},
        eval={"samples": 0},
        train={"steps": 4},
        optim={"learning_rate": 0.02},
    )
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["train", str(path), "name=again"]) == 0
    whole, again = (tmp_path / "runs" / name for name in ("tiny", "again"))
    lose_the_end(again)
    _, lora = saved.load_run(again, quiet)
    assert lora.variant == "vera"
    assert cli.main(["train", str(path), "name=again"]) == 0
    assert_same_adapter(whole, again)
    trained, _ = saved.load_run(whole, quiet)
    model, params = models.load(tmp_path / "model")
    torch, reference = torch_model(tmp_path / "base", model, params)
    monkeypatch.setattr("test_peft.TOKENS", TOKENS)
    before = logits_of(torch, reference)
    got = logits_of(torch, load_in_peft(reference, whole / "adapter"))
    np.testing.assert_allclose(got, logits(trained, trained.params), rtol=1e-4, atol=1e-4)
    assert np.abs(got - before).max() > 1e-2


def test_an_init_that_cannot_be_is_refused(tmp_path):
    def refused(match, **sections):
        with pytest.raises(ValueError, match=match):
            config.load(write_config(tmp_path, **sections))

    refused(r"lora.init: got \"pizza\", expected default, pissa", lora={"init": "pizza"})
    refused(r"set model.quantize", lora={"init": "loftq_iter_5"})
    refused(r"choose one of the two", lora={"init": "pissa", "variant": "dora"})
