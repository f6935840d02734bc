"""Runs whose NF4 base is rounded to their own rows: resumed, merged, and what goes wrong."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from laws import assert_close
from tiny import write_config, write_model

import jlora
from jlora import base, calibrated, cli, config, fresh, models, saved

leaves = jlora.lora.leaves_by_path
TOKENS = np.asarray(jax.random.randint(jax.random.key(9), (2, 12), 0, 250), np.int32)
QUANTISED = ["model.quantize=nf4", "model.calibrate=4"]


def logits(loaded, params):
    return jlora.adapt(lambda p: loaded.model.apply({"params": p}, TOKENS))(params)


def load(run, **options):
    loaded, _ = saved.load_run(run, lambda text: None, **options)
    return loaded, logits(loaded, loaded.params)


@pytest.mark.slow
def test_a_run_on_a_rounded_base(tmp_path, capsys):
    path = write_config(tmp_path, lora={"dropout": 0.0}, eval={"samples": 0}, train={"steps": 4})
    train = ["train", str(path), *QUANTISED]
    assert cli.main(train) == 0
    said = capsys.readouterr().out
    assert "Rounding the base to 4 batches of 456 tokens together, model.calibrate" in said
    assert cli.main([*train, "name=again"]) == 0
    whole, again = (tmp_path / "runs" / name for name in ("tiny", "again"))
    (again / "result.json").unlink()
    shutil.rmtree(again / "checkpoints" / "4")
    capsys.readouterr()
    assert cli.main([*train, "name=again"]) == 0
    said = capsys.readouterr().out
    assert "Resuming at step 2" in said
    assert "Rounding" not in said  # the codes are in the folder
    first, second = (
        safetensors.numpy.load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (whole, again)
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)

    # What training saw is what a merge into the dequantised weights gives.
    trained, wanted = load(whole)
    merge = ["merge", str(whole), "-o"]
    assert cli.main([*merge, str(tmp_path / "saw"), "--into", "dequantized"]) == 0
    model, params = models.load(tmp_path / "saw")
    assert_close(model.apply({"params": params}, TOKENS), wanted, 1e-4)
    plain = base.load_base(str(tmp_path / "model"), quantize="nf4")
    codes, nearest = (
        leaves(tree)["layers/mlp/down_proj/kernel"] for tree in (trained.params, plain.params)
    )
    assert (codes.w.codes != nearest.codes).mean() > 0.05

    # The adapter is one for the original weights, too.
    capsys.readouterr()
    assert cli.main([*merge, str(tmp_path / "original")]) == 0
    lines = capsys.readouterr().out.splitlines()
    model, params = models.load(tmp_path / "original")
    _, wanted = load(whole, quantized=False)
    assert_close(model.apply({"params": params}, TOKENS), wanted, 1e-4)

    original = models.load(tmp_path / "model")[1]
    assert_shown(lines, jlora.merge_error(trained.params, base=original))

    # What a run has trained on is not measured again.
    (again / "result.json").unlink()
    data, codes = tmp_path / "train.jsonl", (again / calibrated.FILE).read_bytes()
    rows = data.read_text()
    data.write_text(rows.replace("aaaa", "bbbb"))
    assert cli.main([*train, "name=again"]) == 2
    assert "calibrated.npz was measured on other rows or another base" in capsys.readouterr().err
    assert (again / calibrated.FILE).read_bytes() == codes
    data.write_text(rows)
    assert cli.main([*train, "name=again"]) == 0

    # Scales are not in the file: codes go with the layers that they were found for alone.
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    turned = {n: x[::-1].copy() if "down_proj" in n else x for n, x in tensors.items()}
    safetensors.numpy.save_file(turned, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"calibrated\.npz was made for another base model"):
        load(whole)
    with pytest.warns(UserWarning, match="keeps its nearest codes"):
        other, _ = load(whole, other_base=True)
    on_other = leaves(other.params)["layers/mlp/down_proj/kernel"]
    nearest = leaves(base.load_base(str(tmp_path / "model"), quantize="nf4").params)
    np.testing.assert_array_equal(on_other.w.codes, nearest["layers/mlp/down_proj/kernel"].codes)
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})

    # Without its codes the base of a run is gone, which is said.
    (whole / calibrated.FILE).unlink()
    capsys.readouterr()
    assert cli.main([*merge, str(tmp_path / "gone"), "--into", "dequantized"]) == 2
    assert "holds the base of this run, rounded to its rows" in capsys.readouterr().err


def assert_shown(lines, errors):
    """The table of what merging costs has the figures of `merge_error`."""
    for figures in errors.rows:
        (shown,) = (line.split() for line in lines if line.startswith(figures.path))
        for number, name in zip(
            shown[1:], ("update", "rounding", "worst", "erased", "noise", "shift")
        ):
            assert float(number) == pytest.approx(getattr(figures, name), rel=0.01), name


@pytest.mark.slow
def test_the_merge_of_a_dora_run_on_a_rounded_base_is_told_right(tmp_path, capsys):
    path = write_config(
        tmp_path,
        lora={"dropout": 0.0, "variant": "dora", "targets": ["down_proj"]},
        data={"pack": False},
        eval={"samples": 0, "every": None},
        optim={"warmup_steps": 1},
        train={"steps": 2},
    )
    assert cli.main(["train", str(path), *QUANTISED]) == 0
    run = tmp_path / "runs" / "tiny"
    capsys.readouterr()
    assert cli.main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 0
    lines = capsys.readouterr().out.splitlines()
    trained, original = load(run)[0].params, models.load(tmp_path / "model")[1]
    assert_shown(lines, jlora.merge_error(trained, base=original))


def test_codes_of_other_rows_or_models_are_not_taken(tmp_path):
    write_model(tmp_path / "model")
    packed = base.load_base(str(tmp_path / "model"), quantize="nf4")
    original = base.load_base(str(tmp_path / "model")).params
    rows = jax.random.randint(jax.random.key(1), (4, 32), 0, 250)
    batch = {
        "tokens": rows,
        "positions": jnp.broadcast_to(jnp.arange(32), rows.shape),
        "segment_ids": jnp.ones_like(rows),
    }
    found = calibrated.calibrate(packed, [batch], original)
    wanted = logits(packed, original)
    before, after = (
        float(jnp.square(logits(packed, params) - wanted).mean())
        for params in (packed.params, found.params)
    )
    assert after < 0.8 * before
    file = tmp_path / calibrated.FILE
    assert calibrated.load(file, packed) is None
    calibrated.save(file, packed, found, {"data": "one"})
    assert calibrated.load(file, packed, {"data": "another"}) is None
    for origin in ({"data": "one"}, None):
        read = calibrated.load(file, packed, origin)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, read.params, found.params))
    write_model(tmp_path / "deeper", layers=3)
    deeper = base.load_base(str(tmp_path / "deeper"), quantize="nf4")
    with pytest.raises(ValueError, match=r"calibrated\.npz was made for another base model"):
        calibrated.load(file, deeper)
    half, other = (
        base.load_base(str(tmp_path / name), dtype="bfloat16", quantize="nf4")
        for name in ("model", "deeper")
    )
    with pytest.raises(ValueError, match="holds the codes of another model: see 'layers/"):
        calibrated.load(file, other)
    # In another dtype a weight of 32 bits has some other codes; those found are taken there too.
    path = "layers/mlp/down_proj/kernel"
    codes = leaves(calibrated.load(file, half).params)[path].codes
    np.testing.assert_array_equal(codes, leaves(found.params)[path].codes)
    assert not np.array_equal(leaves(half.params)[path].codes, leaves(packed.params)[path].codes)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged"):
        calibrated.load(file, packed)


class OfProcess:
    """A device of one of several processes, of which here there is one."""

    platform = device_kind = "cpu"

    def __init__(self, number):
        self.id = self.process_index = number
        self.client = jax.devices()[0].client


def test_a_base_that_cannot_be_rounded_is_refused(tmp_path, capsys):
    def refused(**sections):
        with pytest.raises(ValueError, match=r"model\.calibrate rounds an NF4 base on one device"):
            config.load(write_config(tmp_path, **sections))

    model = {"path": str(tmp_path / "model"), "calibrate": 2}
    refused(model=model)
    refused(model={**model, "quantize": "int8"})
    path = write_config(tmp_path, model={**model, "quantize": "nf4"})
    with pytest.raises(ValueError, match=r"model\.calibrate rounds an NF4 base on one device"):
        config.load(path, ["mesh={data: 1}"])
    with pytest.raises(ValueError, match=r"lora\.init=loftq packs the base again"):
        config.load(path, ["lora.init=loftq", "lora.dropout=0"])
    of_two = [OfProcess(0), OfProcess(1)]
    with pytest.raises(ValueError, match="several processes make a mesh of theirs"):
        fresh.make_mesh(config.load(path), of_two)
    assert cli.main(["plan", str(path), "--gpus", "h100:1", "--suggest"]) == 2
    assert "add model.calibrate=null" in capsys.readouterr().err
    assert config.load(path, ["lora.init=qera", "lora.dropout=0"]).model.calibrate == 2
    with pytest.raises(ValueError, match=r"model\.calibrate: got 0"):
        config.load(write_config(tmp_path, model={**model, "quantize": "nf4", "calibrate": 0}))
