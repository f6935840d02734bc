"""Rows of a table that train alone: equal to the merged table, never its size, as PEFT's are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import arrays_of_size, assert_close
from test_peft import (
    TOKENS,
    apply,
    assert_same,
    load_in_peft,
    logits_of,
    settings_of,
    tiny,
    torch_model,
    wrap_in_peft,
)

import jlora
from jlora import peft
from jlora.rows import RowsArray

ROWS = (int(TOKENS[1, 4]), 60, int(TOKENS[0, 2]))
CONFIG = jlora.LoraConfig(rank=4, targets=("q_proj",), rows={"embed_tokens": ROWS})


def is_rows(leaf):
    return isinstance(leaf, RowsArray)


def train(params, seed=5):
    """The tree with rows that have moved away from the start."""
    draw = np.random.default_rng(seed)

    def move(leaf):
        if not is_rows(leaf):
            return leaf
        change = jnp.asarray(draw.normal(0, 0.5, leaf.rows.shape), leaf.rows.dtype)
        return dataclasses.replace(leaf, rows=leaf.rows + change)

    return jax.tree.map(move, params, is_leaf=is_rows)


USES = {
    "lookup": (lambda w, x: jnp.take(w, jnp.array([[3, 4], [11, 7]]), axis=0) * x[0, 0], 0),
    "clipped lookup": (
        lambda w, x: jnp.take(w, jnp.array([3, 90, -1]), axis=0, mode="clip") * x[0, 0], 0
    ),
    "column lookup": (lambda w, x: jnp.take(w, jnp.array([7, 2, 3]), axis=1).T * x[0, 0], 1),
    "head": (lambda w, x: jnp.einsum("bd,vd->bv", x, w), 0),
    "head on the left": (lambda w, x: w @ x.T, 0),
    "kernel": (lambda w, x: x @ w, 1),
    "transposed": (lambda w, x: x @ w.T, 0),
    "summed over the rows": (lambda w, x: jax.nn.softmax(x @ w.T) @ w, 0),
    "nothing low-rank": (lambda w, x: jnp.tanh(w) * x[0, 0], 0),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_adapted_equals_merged_with_gradients(use):
    fn, axis = USES[use]
    name = "kernel" if axis else "embedding"
    shape = (8, 12) if axis else (12, 8)
    base = {name: jax.random.normal(jax.random.key(0), shape), "q": jnp.eye(8)}
    config = jlora.LoraConfig(rank=1, targets=("q",), rows={name: (7, 3, 11)})
    params = jlora.init(jax.random.key(1), base, config)
    assert params[name].axis == axis
    assert_same(jlora.merge_params(params), base)
    x = jax.random.normal(jax.random.key(2), (5, 8))
    policy = "allow" if use == "nothing low-rank" else "error"
    run = jlora.adapt(lambda p, x: fn(p[name], x @ p["q"]), on_unsupported=policy)
    np.testing.assert_array_equal(run(params, x), fn(base[name], x))
    params = train(params)

    def loss(forward):
        def total(rows, x):
            tree = {**params, name: dataclasses.replace(params[name], rows=rows)}
            return jnp.sum(jnp.sin(forward(tree, x)))

        return jax.jit(jax.value_and_grad(total, (0, 1)))(params[name].rows, x)

    dense = loss(lambda p, x: fn(jlora.merge_params(p)[name], x))
    assert_close(loss(run), dense, 1e-5)
    batched = jax.vmap(lambda x: run(params, x[None]))(x)
    assert_close(
        batched, jax.vmap(lambda x: fn(jlora.merge_params(params)[name], x[None]))(x), 1e-5
    )


def test_nothing_of_the_tables_size_is_built():
    base = {"embedding": jnp.ones((512, 64)), "q": jnp.eye(64)}
    config = jlora.LoraConfig(rank=1, targets=("q",), rows={"embedding": (3, 500)})
    params = jlora.init(jax.random.key(1), base, config)
    trainable, frozen = jlora.split(params, config)
    assert jax.tree.leaves(trainable["embedding"])[0].shape == (2, 64)
    assert {x for x in jax.tree.leaves(jlora.labels(params, config)["embedding"])} == {
        "frozen", "full",
    }  # fmt: skip

    def fn(params, tokens):
        x = jnp.take(params["embedding"], tokens, axis=0) @ params["q"]
        return x @ params["embedding"].T

    run = jlora.adapt(fn, on_unsupported="error")
    loss = lambda t: jnp.sum(run(jlora.combine(t, frozen), jnp.array([3, 4])))  # noqa: E731
    built = arrays_of_size(jax.grad(loss), trainable, size=512 * 64)
    assert set(built) <= {"transpose"}  # of the frozen table, as the function has it


def test_mistakes_are_told():
    _, base = tiny()

    def refused(match, **fields):
        with pytest.raises(ValueError, match=match):
            jlora.init(jax.random.key(0), base, dataclasses.replace(CONFIG, axes=AXES, **fields))

    refused("No leaf matches rows 'nothing'|'nothing'", rows={"nothing": (1,)})
    refused("names row 61, and it has 61", rows={"embed_tokens": (1, 61)})
    refused("must be a plain matrix", rows={"norm": (1,)})
    refused("'embed_tokens/embedding' is in rows, and in", train=("embed_tokens",))
    for wrong in ((), (1, 1), (-1,), (1.5,)):
        with pytest.raises(ValueError, match="different whole numbers"):
            dataclasses.replace(CONFIG, rows={"embed_tokens": wrong})
    assert jlora.LoraConfig.from_json(CONFIG.to_json()) == CONFIG


AXES = {"*/q_proj/kernel": ("stack", "in", "out")}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("indices", [list(ROWS), {"embed_tokens": list(ROWS), "lm_head": [5, 3]}])
def test_peft_in_and_out(tied, indices, tmp_path):
    if tied and isinstance(indices, dict):
        pytest.skip("a tied head has the embedding's rows")
    model, base = tiny(tie_embeddings=tied)
    torch, reference = torch_model(tmp_path / "base", model, base)
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=indices)
    reference = wrap_in_peft(torch, reference, **options)
    reference.save_pretrained(tmp_path / "adapter")
    params, config = peft.load(tmp_path / "adapter", base)
    got = apply(model)(params, TOKENS)
    np.testing.assert_allclose(got, logits_of(torch, reference), rtol=1e-4, atol=1e-4)
    fn = lambda params, tokens: model.apply({"params": params}, tokens)  # noqa: E731
    again = jlora.init(jax.random.key(0), base, config, fn=fn, args=(TOKENS,))
    assert jax.tree.structure(again) == jax.tree.structure(params)

    params = train(params)
    peft.save(tmp_path / "ours", params, config)
    assert_same(peft.load(tmp_path / "ours", base)[0], params)
    _, fresh = torch_model(tmp_path / "base", model, base)
    theirs = load_in_peft(fresh, tmp_path / "ours")
    want = apply(model)(params, TOKENS)
    np.testing.assert_allclose(logits_of(torch, theirs), want, rtol=1e-4, atol=1e-4)
    merged = jlora.merge_params(params)
    np.testing.assert_allclose(apply(model)(merged, TOKENS), want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - apply(model)(base, TOKENS)).max((1, 2)).min() > 1e-2
    written = settings_of(tmp_path / "ours")["trainable_token_indices"]
    want = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    written = written if isinstance(written, dict) else {"embed_tokens": written}
    assert {k: sorted(v) for k, v in written.items()} == {k: sorted(v) for k, v in want.items()}
