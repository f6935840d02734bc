"""VeRA in PEFT's format: both ways, its logits, its projections, and what is refused."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_peft import (
    TOKENS,
    apply,
    assert_same,
    load_in_peft,
    logits_of,
    settings_of,
    tensors_of,
    tiny,
    torch_model,
)
from test_vera import train

import jlora
from jlora import peft

VERA = jlora.LoraConfig(rank=40, exclude=("lm_head",), variant="vera", dropout=0.1)


def adapted(config=VERA, **overrides):
    model, base = tiny(**overrides)
    fn = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
    params = jlora.init(jax.random.key(2), base, config, fn=fn, args=(TOKENS,))
    return model, base, train(params)


close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def test_what_peft_writes_loads_computes_the_same_and_goes_back(tmp_path):
    torch_peft = pytest.importorskip("peft")
    model, base = tiny()
    torch, reference = torch_model(tmp_path / "base", model, base)
    options = dict(r=12, target_modules=["q_proj", "k_proj", "down_proj"], vera_dropout=0.1)
    reference = torch_peft.get_peft_model(
        reference, torch_peft.VeraConfig(task_type="CAUSAL_LM", **options)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, reference.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape))
    wanted = logits_of(torch, reference.eval())
    reference.save_pretrained(tmp_path / "adapter")
    params, config = peft.load(tmp_path / "adapter", base)
    assert (config.variant, config.rank, config.dropout) == ("vera", 12, 0.1)
    got = apply(model)(params, TOKENS)
    close(got, wanted)
    assert np.abs(got - apply(model)(base, TOKENS)).max() > 1e-2
    peft.save(tmp_path / "again", params, config)
    first, second = (tensors_of(tmp_path / name) for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    _, fresh = torch_model(tmp_path / "base", model, base)
    close(logits_of(torch, load_in_peft(fresh, tmp_path / "again")), wanted)


def test_what_is_saved_computes_the_same_in_peft_and_merges_alike(tmp_path):
    config = dataclasses.replace(VERA, train=("norm",))
    model, base, params = adapted(config)
    torch, reference = torch_model(tmp_path / "base", model, base)
    peft.save(tmp_path / "adapter", params, config, base_model="m")
    loaded, read = peft.load(tmp_path / "adapter", base)
    assert_same(loaded, params)
    assert (read.variant, read.dropout) == ("vera", 0.1)
    settings = settings_of(tmp_path / "adapter")
    assert (settings["peft_type"], settings["save_projection"]) == ("VERA", True)
    assert tensors_of(tmp_path / "adapter")["base_model.vera_A"].shape == (40, 40)
    assert "VeRA adapter" in (tmp_path / "adapter" / "README.md").read_text()
    reference = load_in_peft(reference, tmp_path / "adapter")
    close(logits_of(torch, reference), apply(model)(params, TOKENS))
    reference.merge_and_unload().save_pretrained(tmp_path / "merged")
    _, merged = jlora.models.load(tmp_path / "merged")
    ours = jlora.lora.leaves_by_path(jlora.merge_params(params))
    for path, leaf in jlora.lora.leaves_by_path(merged).items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)


def test_what_cannot_be_is_refused(tmp_path):
    _, base, params = adapted()
    folder = tmp_path / "adapter"
    peft.save(folder, params, VERA)
    with pytest.raises(NotImplementedError, match="vLLM takes no VeRA"):
        peft.save(tmp_path / "x", params, VERA, serve=True)
    table = dataclasses.replace(VERA, targets=("embed_tokens",))
    with pytest.raises(NotImplementedError, match="VeRA lacks, which is for linear"):
        peft.save(tmp_path / "x", adapted(table)[2], table)
    with pytest.raises(NotImplementedError, match="VeRA lacks, which is for linear"):
        peft.check(adapted(table)[2], table)
    for half in jlora.split(params, VERA):
        with pytest.raises(ValueError, match="one half of a split"):
            peft.save(tmp_path / "x", half, VERA)
    other = jax.tree.map(
        lambda x: dataclasses.replace(x, a=x.a + 1) if x.shape[-1] == 40 else x,
        params,
        is_leaf=lambda x: isinstance(x, jlora.LoraArray),
    )
    with pytest.raises(ValueError, match="not parts of one pair"):
        peft.save(tmp_path / "x", other, VERA)

    def load(match, error=ValueError, tensors=None, **settings):
        peft.save(folder, params, VERA)
        changed = settings_of(folder) | settings
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        if tensors is not None:
            safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(error, match=match):
            peft.load(folder, base)

    whole = tensors_of(folder)
    name = "base_model.model.model.layers.1.self_attn.q_proj.vera_lambda_d"
    load("save_projection=false", NotImplementedError, save_projection=False)
    load("bias='vera_only'", NotImplementedError, bias="vera_only")
    load("asks for what jlora does not read: what=1", NotImplementedError, what=1)
    load("lacks base_model.vera_B", tensors={k: x for k, x in whole.items() if k[-1] != "B"})
    load("Missing.*q_proj.vera_lambda_d", tensors={k: x for k, x in whole.items() if k != name})
    load("needs 40 of rank 40", tensors=whole | {"base_model.vera_A": np.ones((40, 8), np.float32)})
    load("vera_lambda_d has shape", tensors=whole | {name: np.ones(3, np.float32)})
    load("Without a place.*ghost", tensors=whole | {f"{name[:17]}ghost": np.ones(3, np.float32)})
