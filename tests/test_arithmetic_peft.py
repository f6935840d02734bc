"""Combinations of adapters against PEFT's: updates equal at 1e-5 of the largest entry.

In float32, where sums in another order differ by as much.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_arithmetic import close, updates

import jlora
from jlora import arithmetic


def peft_model(ranks, alphas):
    torch = pytest.importorskip("torch", reason="parity needs torch")
    peft = pytest.importorskip("peft", reason="parity needs peft")
    torch.manual_seed(0)

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(17, 12)
            self.up = torch.nn.Linear(12, 20, bias=False)

        def forward(self, tokens):
            return self.up(self.embed(tokens))

    names = ["first", "second", "third"][: len(ranks)]
    model = Tiny()
    for index, (name, rank, alpha) in enumerate(zip(names, ranks, alphas)):
        settings = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=["embed", "up"], use_rslora=index == 1
        )
        if index == 0:
            model = peft.get_peft_model(model, settings, name)
        else:
            model.add_adapter(name, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model, names


def from_peft(model, name):
    tree = {}
    for module in ("embed", "up"):
        layer = getattr(model.base_model.model, module)
        weight = layer.get_base_layer().weight.detach().numpy()
        kinds = (
            ("lora_embedding_A", "lora_embedding_B") if module == "embed" else ("lora_A", "lora_B")
        )
        a, b = (getattr(layer, kind)[name] for kind in kinds)
        a, b = (getattr(x, "weight", x).detach().numpy().T for x in (a, b))
        w = weight if module == "embed" else weight.T
        tree[module] = jlora.LoraArray(*map(jnp.asarray, (w, a, b)), scaling=layer.scaling[name])
    return tree


def deltas(model, name):
    found = {}
    for module in ("embed", "up"):
        delta = getattr(model.base_model.model, module).get_delta_weight(name).detach().numpy()
        found[module] = (delta if module == "embed" else delta.T)[None].astype(np.float64)
    return found


def assert_parity(model, names, weights, combination, **options):
    trees = [from_peft(model, name) for name in names]
    for name, tree in zip(names, trees):
        close(updates(tree), deltas(model, name))
    renamed = {"rank": "svd_rank"}
    given = {renamed.get(k, k): v for k, v in options.items() if k != "key"}
    model.base_model.add_weighted_adapter(names, weights, "new", combination, **given)
    got = arithmetic.weighted(trees, weights, combination=combination, **options)
    close(updates(got), deltas(model, "new"))


@pytest.mark.parametrize("weights", [(0.7, 0.3, 1.0), (1.5, -0.4, 0.0)])
@pytest.mark.parametrize(
    ("combination", "options"),
    [
        ("cat", {}),
        ("svd", {}),
        ("svd", {"rank": 3}),
        ("svd", {"rank": 11}),
    ],
)
def test_sums_are_those_of_peft(combination, options, weights):
    model, names = peft_model((4, 2, 5), (8, 3, 5))
    assert_parity(model, names, list(weights), combination, **options)


@pytest.mark.parametrize("weights", [(0.7, 0.3, 1.0), (1.5, -0.4, -0.2)])
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize(
    "combination", ["linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
)
def test_elected_and_pruned_combinations_are_those_of_peft(combination, method, weights):
    if "ties" not in combination and method == "frequency":
        pytest.skip("it elects no signs")
    model, names = peft_model((4, 4, 4), (8, 3, 5))
    options = {} if combination == "linear" else {"density": 0.37}
    options |= {"majority_sign_method": method} if "ties" in combination else {}
    assert_parity(model, names, list(weights), combination, **options)


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_random_combinations_are_those_of_peft_with_the_same_choice(combination, monkeypatch):
    model, names = peft_model((4, 4), (8, 3))
    trees = [from_peft(model, name) for name in names]
    options = {"density": 0.6, "key": jax.random.key(5)}
    import torch

    chosen = []  # the choice shows where all other trees count nothing
    for weights in ((1, 0), (0, 1)):
        chosen.append(arithmetic.weighted(trees, weights, combination="dare_linear", **options))
    masks = iter(
        [
            torch.tensor(np.asarray(getattr(tree[module], factor)).T != 0).float()
            for module in ("embed", "up")
            for factor in ("a", "b")
            for tree in chosen
        ]
    )
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
    assert_parity(model, names, [0.7, -0.3], combination, **options)
    assert next(masks, None) is None
