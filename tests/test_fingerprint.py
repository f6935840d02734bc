"""An adapter knows its base, however that is read: in another dtype, quantised, on a mesh."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_peft import adapted, tiny
from tiny import write_config

import jlora
from jlora import cli, models, peft
from jlora.fingerprint import differences, fingerprint

QV = jlora.LoraConfig(rank=4, targets=("q_proj", "v_proj"))


def packed(params, fmt="nf4"):
    return jlora.quantize(params, fmt, targets=("layers/*_proj/kernel",), axes=AXES)


AXES = {"layers/*_proj/kernel": ("stack", "in", "out")}


def changed(params, path):
    """The base with one weight a little larger in all places."""
    return jlora.tree.map_with_path(lambda p, x: x + 0.02 if p == path else x, params)


def test_a_base_in_other_clothes_is_the_same_base():
    _, base = tiny(qkv_bias=True)
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)  # as it lies in a file
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    recorded = fingerprint(base)
    assert set(recorded) == set(jlora.lora.leaves_by_path(base))
    assert recorded == fingerprint(wide)
    assert recorded == fingerprint(jax.device_get(wide))
    assert not differences(recorded, packed(base))
    assert not differences(fingerprint(packed(base)), wide)
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
        spread = jax.tree.map(
            lambda x, mesh=mesh: jax.device_put(
                x, jax.NamedSharding(mesh, jax.P("x" if x.shape[0] % 2 == 0 else None))
            ),
            base,
        )
        assert fingerprint(spread) == recorded
    model, base = tiny()
    assert fingerprint(adapted(model, base, QV)) == fingerprint(base)


@pytest.mark.parametrize(
    "path", ["embed_tokens/embedding", "norm/scale", "layers/mlp/up_proj/kernel"]
)
def test_another_base_is_told_apart(path):
    _, base = tiny()
    recorded, other = fingerprint(base), changed(base, path)
    assert differences(recorded, other) == [f"{path}: its elements are others"]
    assert not differences(recorded, base)
    if "kernel" in path:  # in four bits, against four bits
        assert differences(fingerprint(packed(base)), packed(other))
    else:
        assert differences(recorded, packed(other))
    _, wider = tiny(intermediate_size=48)
    assert "layers/mlp/up_proj/kernel: its shape was 3x24x40 and is 3x24x48" in differences(
        recorded, wider
    )
    _, biased = tiny(qkv_bias=True)
    assert any(line.endswith("there is none") for line in differences(fingerprint(biased), base))


def test_an_adapter_is_refused_by_another_base(tmp_path):
    model, base = tiny()
    params = adapted(model, base, QV)
    peft.save(tmp_path / "a", params, QV, base_model="some/base", revision="abc")
    other = changed(base, "layers/self_attn/q_proj/kernel")
    with pytest.raises(ValueError, match=r"(?s)some/base of revision abc.*q_proj.*--other-base"):
        peft.load(tmp_path / "a", other)
    loaded, _ = peft.load(tmp_path / "a", other, other_base=True)
    assert jlora.merge_params(loaded)["norm"]["scale"] is other["norm"]["scale"]
    peft.load(tmp_path / "a", packed(base))
    whole = dataclasses.replace(QV, train=("embed_tokens",))
    trained = adapted(model, base, whole)  # the embedding is not the base's any more
    peft.save(tmp_path / "b", trained, whole)
    peft.load(tmp_path / "b", base)
    peft.save(tmp_path / "c", trained, whole, base=fingerprint(base))
    peft.load(tmp_path / "c", base)
    with pytest.raises(ValueError, match="embed_tokens/embedding: its elements are others"):
        peft.load(tmp_path / "c", changed(base, "embed_tokens/embedding"))


def test_a_base_of_which_only_shapes_can_be_compared_is_noted(tmp_path):
    model, base = tiny()
    peft.save(tmp_path, adapted(model, base, QV), QV)
    half = jax.tree.map(lambda x: x.astype(jnp.float16), base)
    with pytest.warns(UserWarning, match=r"Only shapes .* float16 here, and were in bfloat16"):
        peft.load(tmp_path, half)
    peft.load(tmp_path, half, other_base=True)  # and this without a warning


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_an_adapter_replaces_may_be_any_in_its_base(tied, tmp_path):
    model, base = tiny(tie_embeddings=tied)
    rows = {"embed_tokens": (3, 60)} | ({} if tied else {"lm_head": (3, 60)})
    config = dataclasses.replace(QV, rows=rows)
    fn = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    example = jnp.zeros((1, 4), jnp.int32)
    peft.save(tmp_path, jlora.init(jax.random.key(0), base, config, fn=fn, args=(example,)), config)
    table, own = base["embed_tokens"]["embedding"], {"embed_tokens", "lm_head"} & set(base)
    resized = {**base, "embed_tokens": {"embedding": table.at[60].add(1)}}
    if not tied:
        resized["lm_head"] = {"kernel": base["lm_head"]["kernel"].at[:, 60].add(1)}
    loaded, _ = peft.load(tmp_path, resized)
    merged = jlora.merge_params({name: loaded[name] for name in own})
    jax.tree.map(np.testing.assert_array_equal, merged, {name: base[name] for name in own})
    with pytest.raises(ValueError, match="embed_tokens/embedding: its elements are others"):
        peft.load(tmp_path, {**base, "embed_tokens": {"embedding": table.at[:50].add(1)}})


@pytest.mark.slow
def test_a_run_knows_its_base(tmp_path, capsys):
    path = write_config(tmp_path, train={"steps": 4})
    assert cli.main(["train", str(path)]) == 0
    run = tmp_path / "runs" / "tiny"
    assert cli.main(["export", str(run), "-o", str(tmp_path / "exported")]) == 0
    model, params = models.load(tmp_path / "model")
    files = models.tokenizer_files(tmp_path / "model")
    models.save(tmp_path / "model", model, changed(params, "norm/scale"), tokenizer_files=files)
    folders = {"adapter of the finished run": run}
    (tmp_path / "unfinished").mkdir()
    for name in ("config.yaml", "checkpoints"):
        (tmp_path / "unfinished" / name).symlink_to(run / name)
    folders["checkpoint"] = tmp_path / "unfinished"
    for folder in folders.values():
        out = str(tmp_path / f"merged-{folder.name}")
        capsys.readouterr()
        assert cli.main(["merge", str(folder), "-o", out]) == 2
        assert "made for another base model" in (told := capsys.readouterr().err)
        assert "norm/scale: its elements are others" in told
        assert cli.main(["merge", str(folder), "-o", out, "--other-base"]) == 0
    (run / "result.json").unlink()
    capsys.readouterr()
    assert cli.main(["train", str(path)]) == 2
    assert "base.norm/scale: was" in capsys.readouterr().err


@pytest.mark.slow
def test_wrong_adapters_end_the_command_with_one_message(tmp_path, capsys):
    path = write_config(tmp_path, train={"steps": 3}, eval={"samples": 0, "every": None})
    assert cli.main(["train", str(path)]) == 0
    whole = tmp_path / "runs" / "tiny" / "adapter"
    tensors = safetensors.numpy.load_file(whole / "adapter_model.safetensors")
    settings = json.loads((whole / "adapter_config.json").read_text())
    first = sorted(tensors)[0]
    less = {name: x for name, x in tensors.items() if name != first}
    cases = {
        "Missing from the file: model.layers.0": (less, {}),
        "Without a place in the model: model.stranger": (
            tensors | {"base_model.model.model.stranger.lora_A.weight": tensors[first]}, {}
        ),
        "has shape [2, 48], expected [4, 48]": (tensors | {first: tensors[first][:2]}, {}),
        "'LOHA'; only 'LORA' and 'VERA' can be loaded": (tensors, {"peft_type": "LOHA"}),
        "is broken or incomplete": (b"nonsense", {}),
        "a pickle: reading one can run any code": (None, {}),
    }  # fmt: skip
    for number, (message, (contents, changes)) in enumerate(cases.items()):
        folder = tmp_path / f"wrong{number}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
        if isinstance(contents, dict):
            safetensors.numpy.save_file(contents, folder / "adapter_model.safetensors")
        elif contents:
            (folder / "adapter_model.safetensors").write_bytes(contents)
        else:
            (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
        capsys.readouterr()
        arguments = ["--adapter", str(folder), "--prompt", "a"]
        assert cli.main(["generate", str(tmp_path / "model"), *arguments]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert "Traceback" not in told
