"""Runs whose `lora.init` is not the default: resumed, served, merged and exported."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from laws import assert_close
from test_peft import load_in_peft, logits_of, torch_model
from tiny import write_config, write_model

import jlora
from jlora import cli, config, models, saved, starts
from jlora.base import Base
from jlora.quant import NF4Array

TOKENS = np.asarray(jax.random.randint(jax.random.key(9), (2, 12), 0, 250), np.int32)
CASES = {
    "pissa": ({"init": "pissa", "dropout": 0.0}, {}),
    "loftq": ({"init": "loftq", "dropout": 0.0}, {"quantize": "nf4"}),
    "lora_ga": ({"init": "lora_ga", "dropout": 0.0, "init_batches": 2}, {}),
    "qera": ({"init": "qera", "dropout": 0.0, "init_batches": 2}, {"quantize": "nf4"}),
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
    lora = {"rank": 4, "targets": ["q_proj", "down_proj"], **lora}  # each costs a decomposition
    path = write_config(tmp_path, lora=lora, eval={"samples": 0}, train={"steps": 4})
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
@pytest.mark.parametrize("init", ["qera", "loftq"])
def test_a_start_over_quantised_layers_leaves_a_dense_head_as_it_is(init, tmp_path):
    lora = {"init": init, "init_batches": 2, "targets": "all-linear", "dropout": 0.0}
    path = write_config(tmp_path, lora=lora, eval={"samples": 0}, train={"steps": 3})
    write_model(tmp_path / "model", tied=False)
    assert cli.main(["train", str(path), "model.quantize=nf4"]) == 0
    trained, _ = saved.load_run(tmp_path / "runs" / "tiny", quiet)
    leaves = jlora.lora.leaves_by_path(trained.params)
    head = leaves["lm_head/kernel"]
    assert isinstance(head.w, jax.Array)
    assert isinstance(leaves["layers/mlp/up_proj/kernel"].w, NF4Array)
    # After three steps from zero the head's update is small beside what makes up for quantising.
    sizes = {
        name: float(jnp.abs(leaf.b).max()) for name, leaf in leaves.items() if "kernel" in name
    }
    assert 0 < sizes.pop("lm_head/kernel") < 0.3 * min(sizes.values())
    out = tmp_path / "merged"
    merge = ["merge", str(tmp_path / "runs" / "tiny"), "-o", str(out), "--into", "dequantized"]
    assert cli.main(merge) == 0
    model, params = models.load(out)
    assert_close(model.apply({"params": params}, TOKENS), logits(trained, trained.params), 1e-4)


@pytest.mark.slow
def test_tables_in_int8_have_originals_too(tmp_path, capsys):
    """An unfinished run whose layers are dense and whose tables are not, and its merge's table."""
    targets = ["embed_tokens", "lm_head", "q_proj"]
    lora = {"init": "pissa", "rank": 4, "targets": targets, "dropout": 0.0}
    path = write_config(tmp_path, lora=lora, eval={"samples": 0}, train={"steps": 4})
    write_model(tmp_path / "model", tied=False)
    options = ["model.quantize_embeddings=int8"]
    assert cli.main(["train", str(path), *options]) == 0
    run = tmp_path / "runs" / "tiny"
    out = [tmp_path / "finished", tmp_path / "unfinished"]
    assert cli.main(["merge", str(run), "-o", str(out[0])]) == 0
    (run / "result.json").unlink()
    assert cli.main(["merge", str(run), "-o", str(out[1]), "--into", "original"]) == 0
    for one, other in zip(*(jax.tree.leaves(models.load(folder)[1]) for folder in out)):
        assert_close(one, other, 1e-5)

    plain = [*options, "lora.init=default", "name=plain"]
    assert cli.main(["train", str(path), *plain]) == 0
    run = tmp_path / "runs" / "plain"
    capsys.readouterr()
    assert cli.main(["merge", str(run), "-o", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    trained, _ = saved.load_run(run, quiet)
    original = models.load(tmp_path / "model")[1]
    for figures in jlora.merge_error(trained.params, base=original).rows:
        (shown,) = (line.split() for line in lines if line.startswith(figures.path))
        names = ("update", "rounding", "worst", "erased", "noise", "shift")
        for number, name in zip(shown[1:], names):
            if number != "-":  # for q_proj, which is dense
                assert float(number) == pytest.approx(getattr(figures, name), rel=0.01), name


@pytest.mark.slow
def test_a_run_that_eva_starts_is_plain_lora_with_its_ranks(tmp_path, capsys):
    lora = {"init": "eva", "init_batches": 2, "rank": 4, "dropout": 0.0}
    path = write_config(tmp_path, lora=lora, eval={"samples": 0}, train={"steps": 4})
    assert cli.main(["train", str(path)]) == 0
    assert "Measuring the start, lora.init=eva, on 2 batches" in capsys.readouterr().out
    assert cli.main(["train", str(path), "name=again"]) == 0
    whole, again = (tmp_path / "runs" / name for name in ("tiny", "again"))
    lose_the_end(again)
    unfinished, lora = saved.load_run(again, quiet)
    ranks = dict(lora.rank_pattern)
    assert lora.init == "default"
    assert len(set(ranks.values())) > 1
    capsys.readouterr()
    assert cli.main(["train", str(path), "name=again", "model.cache=true"]) == 0
    said = capsys.readouterr().out
    assert "Resuming at step 2" in said
    assert "Measuring" not in said  # the start is in the folder
    assert_same_adapter(whole, again)

    # Nothing but the adapter is needed afterwards: the base is what it was.
    (whole / "start.npz").unlink()
    trained, read = saved.load_run(whole, quiet)
    assert {path: read.rank_of(path) for path in ranks} == ranks
    assert not np.array_equal(
        logits(trained, trained.params), logits(unfinished, unfinished.params)
    )
    out = tmp_path / "merged"
    assert cli.main(["merge", str(whole), "-o", str(out)]) == 0
    model, params = models.load(out)
    assert_close(model.apply({"params": params}, TOKENS), logits(trained, trained.params), 1e-4)

    # A run that is not finished begins from its start; without it, that is said.
    lose_the_end(again)
    (again / "start.npz").unlink()
    capsys.readouterr()
    assert cli.main(["export", str(again), "-o", str(tmp_path / "exported")]) == 2
    assert "jlora train of the same run measures it again" in capsys.readouterr().err
    assert cli.main(["train", str(path), "name=again"]) == 0
    assert_same_adapter(whole, again)


@pytest.mark.slow
def test_a_merge_takes_what_qera_corrected_off_again(tmp_path):
    """A run that learned nothing leaves the original weights as they were, to rounding."""
    path = write_config(
        tmp_path,
        model={"path": str(write_model(tmp_path / "model")), "quantize": "nf4"},
        lora={"init": "qera", "dropout": 0.0, "init_batches": 2},
        eval={"samples": 0, "every": None},
        train={"steps": 1},
        optim={"learning_rate": 1e-9, "warmup_steps": 0},
    )
    assert cli.main(["train", str(path)]) == 0
    run, out = tmp_path / "runs" / "tiny", tmp_path / "merged"
    base = saved.load_base(str(tmp_path / "model"))
    original = logits(base, base.params)
    assert cli.main(["merge", str(run), "-o", str(out), "--error-layers", "0"]) == 0
    model, params = models.load(out)
    assert_close(model.apply({"params": params}, TOKENS), original, 1e-4)
    # And into what training saw: the corrected outputs, nearer to the original's than NF4's.
    trained, _ = saved.load_run(run, quiet)
    packed = saved.load_base(str(tmp_path / "model"), quantize="nf4")
    corrected = np.linalg.norm(logits(trained, trained.params) - original)
    assert corrected < 0.8 * np.linalg.norm(logits(packed, packed.params) - original)


def test_a_start_of_other_rows_or_settings_is_not_taken(tmp_path):
    file = tmp_path / "start.npz"
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
    lora = jlora.LoraConfig(rank=2, targets=("w",), dtype="bfloat16")
    tree = jlora.init(jax.random.key(1), params, lora)
    base = Base("tiny", None, params, None)
    assert starts.load(file, lambda lora: base) is None
    starts.save(file, (tree, lora), {"data": "one"})

    def adapt(lora):
        return dataclasses.replace(base, params=jlora.init(jax.random.key(2), params, lora))

    assert starts.load(file, adapt, {"data": "another"}) is None
    for origin in ({"data": "one"}, None):
        read, own = starts.load(file, adapt, origin)
        assert own == lora
        assert jax.tree.all(jax.tree.map(jnp.array_equal, read.params, tree))
    params = {"w": jnp.zeros((4, 6))}
    with pytest.raises(ValueError, match="holds the start of another model: see 'w'"):
        starts.load(file, adapt)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged"):
        starts.load(file, adapt)


def test_a_measured_start_is_looked_at_before_any_compute(tmp_path, capsys):
    path = write_config(tmp_path, lora={"init": "eva", "dropout": 0.0})
    assert cli.main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "lora.init=eva is measured on 8 batches" in said
    assert not (tmp_path / "runs" / "tiny" / "start.npz").exists()
    assert cli.main(["inspect", str(path), "lora.init=qera"]) == 2
    assert "lora.init=qera makes up for the error of quantising" in capsys.readouterr().err
    assert cli.main(["train", str(path), "mesh={data: 8}", "train.batch_size=8"]) == 2
    assert "lora.init=default" in capsys.readouterr().err


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
    refused(r"init=eva measures what lora.variant=vera", lora={"init": "eva", "variant": "vera"})
    refused(r"set model.quantize", lora={"init": "qera"})
    refused(r"lora.init_batches: got 0", lora={"init": "eva", "init_batches": 0})
