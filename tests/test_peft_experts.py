"""Adapters of experts and routers, which PEFT calls `target_parameters`, both ways."""

import dataclasses

import jax
import numpy as np
import pytest
from test_peft import (
    TOKENS,
    adapted,
    apply,
    assert_same,
    is_lora,
    load_in_peft,
    logits_of,
    settings_of,
    tiny,
    torch_model,
    wrap_in_peft,
)

import jlora
from jlora import peft
from jlora.models.decoder import Experts

FAMILIES = {
    "mixtral": dict(family="mixtral", experts=Experts(5, 2, renormalize=True)),
    "qwen3_moe": dict(family="qwen3_moe", experts=Experts(4, 2, renormalize=False), qk_norm=True),
}
TARGETS = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "one": ["experts.down_proj"],
    "router": ["mlp.gate.weight", "experts.gate_up_proj"],
}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", TARGETS)
def test_what_peft_writes_loads_and_comes_back(family, targets, tmp_path):
    if (family, targets) == ("qwen3_moe", "router"):
        pytest.skip("the same in both")
    model, base = tiny(**FAMILIES[family])
    torch, reference = torch_model(tmp_path / "base", model, base)
    options = dict(r=3, lora_alpha=6, target_parameters=TARGETS[targets])
    if targets != "one":
        options |= dict(target_modules=["q_proj"], rank_pattern={r"experts\.gate_up_proj": 2})
    reference = wrap_in_peft(torch, reference, **options)
    reference.save_pretrained(tmp_path / "adapter")
    params, config = peft.load(tmp_path / "adapter", base)
    want = apply(model)(params, TOKENS)
    close(want, logits_of(torch, reference))
    assert np.abs(want - apply(model)(base, TOKENS)).max() > 1e-2
    again = adapted(model, base, config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    peft.save(tmp_path / "ours", params, config)
    assert_same(peft.load(tmp_path / "ours", base)[0], params)
    _, fresh = torch_model(tmp_path / "base", model, base)
    close(logits_of(torch, load_in_peft(fresh, tmp_path / "ours")), want)
    close(apply(model)(jlora.merge_params(params), TOKENS), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_a_mixture_goes_to_peft(family, tmp_path):
    model, base = tiny(**FAMILIES[family])
    config = jlora.LoraConfig(
        rank=3,
        alpha=6,
        targets=("all-linear", "experts"),
        exclude=("lm_head",),
        rank_pattern={"down_proj": 2},
        dropout=0.1,
    )
    params = adapted(model, base, config)
    peft.save(tmp_path / "ours", params, config)
    settings = settings_of(tmp_path / "ours")
    assert settings["target_parameters"] == ["down_proj", "gate.weight", "gate_up_proj"]
    assert settings["lora_dropout"] == 0  # PEFT refuses another one
    loaded, _ = peft.load(tmp_path / "ours", base)
    still = jax.tree.map(
        lambda x: dataclasses.replace(x, dropout=0.0) if is_lora(x) else x, params, is_leaf=is_lora
    )
    assert_same(loaded, still)
    torch, fresh = torch_model(tmp_path / "base", model, base)
    got = load_in_peft(fresh, tmp_path / "ours")
    close(logits_of(torch, got), apply(model)(params, TOKENS))
    got.merge_and_unload().save_pretrained(tmp_path / "merged")
    _, expected = jlora.models.load(tmp_path / "merged")
    for path, leaf in jlora.lora.leaves_by_path(jlora.merge_params(params)).items():
        want = jlora.lora.leaves_by_path(expected)[path]
        np.testing.assert_allclose(leaf, want, rtol=1e-6, atol=1e-6, err_msg=path)


def test_what_cannot_be_said_is_refused(tmp_path):
    model, base = tiny(**FAMILIES["mixtral"])
    config = jlora.LoraConfig(rank=3, targets=("experts",))
    with pytest.raises(NotImplementedError, match="vLLM wants experts in another layout"):
        peft.save(tmp_path / "x", adapted(model, base, config), config, serve=True)
    dora = dataclasses.replace(config, variant="dora")
    with pytest.raises(NotImplementedError, match="is DoRA, which PEFT lacks for experts"):
        peft.save(tmp_path / "x", adapted(model, base, dora), dora)
    shared = dataclasses.replace(config, axes={"experts": ("stack", "in", "in", "out")})
    with pytest.raises(NotImplementedError, match=r"has axes .*one input and one output"):
        peft.save(tmp_path / "x", adapted(model, base, shared), shared)
    assert not (tmp_path / "x").exists()
