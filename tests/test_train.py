"""The training step and the loop, on toy losses and on the decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import checkpoint, losses, train
from jlora.models import decoder

D_IN, D_OUT = 6, 5


def toy_params():
    w = jax.random.normal(jax.random.key(3), (D_IN, D_OUT))
    return {"layer": {"kernel": w, "bias": jnp.ones(D_OUT)}}


LORA = jlora.LoraConfig(rank=2, alpha=4, targets=("kernel",), train=("bias",))


def toy_loss(params, batch, key):
    del key

    def forward(params, x):
        return jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"])

    y = jlora.adapt(forward)(params, batch["x"])
    losses = jnp.sum((y - batch["y"]) ** 2, axis=-1)
    return jnp.sum(losses * batch["mask"]), jnp.sum(batch["mask"])


def toy_batch(position, rows=4):
    rng = np.random.default_rng(position)
    return {
        "x": rng.normal(size=(rows, D_IN)).astype(np.float32),
        "y": rng.normal(size=(rows, D_OUT)).astype(np.float32),
        "mask": (rng.random(rows) < 0.7).astype(np.float32) + (np.arange(rows) == 0),
    }


class Toy:
    """A run of the toy model that can be begun again on the same checkpoints."""

    def __init__(self, learning_rate=0.05, clip_norm=1.0, tx=None, loss_fn=toy_loss):
        params = jlora.init(jax.random.key(0), toy_params(), LORA)
        self.trainable, self.frozen = jlora.split(params, LORA)
        self.tx = jlora.optimizer(tx or optax.adamw(learning_rate), LORA)
        self.step = train.make_train_step(loss_fn, self.tx, clip_norm=clip_norm)
        self.eval_step = train.make_eval_step(loss_fn)

    def state(self):
        return train.init_state(jax.tree.map(jnp.copy, self.trainable), self.tx)

    def evaluate(self, trainable):
        batches = [toy_batch(1000 + i) for i in range(3)]
        return train.evaluate(self.eval_step, trainable, self.frozen, batches)

    def fit(self, checkpoints=None, **options):
        state, progress = self.state(), None
        if checkpoints is not None and (restored := checkpoints.restore(state)):
            state = restored.tree
            progress = train.Progress(**restored.metadata["progress"])
        options = {"steps": 12, "accumulation": 2, "batch": toy_batch, **options}
        return train.fit(
            state,
            self.frozen,
            train_step=self.step,
            key=jax.random.key(1),
            progress=progress,
            checkpoints=checkpoints,
            **options,
        )


def stack(*batches):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# The step


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_any_split_of_a_batch_gives_the_same_step(accumulation):
    toy = Toy()
    whole = toy_batch(0, rows=8)
    parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), whole)
    state, metrics = toy.step(toy.state(), toy.frozen, parts, jax.random.key(1))
    expected, expected_metrics = toy.step(toy.state(), toy.frozen, stack(whole), jax.random.key(1))
    assert metrics["target_tokens"] == whole["mask"].sum()
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_is_that_of_plain_optax_on_the_trainable_tree():
    toy = Toy(tx=optax.sgd(0.1), clip_norm=None)
    batch = toy_batch(0)
    state, metrics = toy.step(toy.state(), toy.frozen, stack(batch), jax.random.key(1))

    def mean_loss(trainable):
        total, count = toy_loss(jlora.combine(trainable, toy.frozen), batch, None)
        return total / count

    loss, grads = jax.value_and_grad(mean_loss)(toy.trainable)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, toy.trainable, grads)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_norm_is_clipped_over_all_trainable_leaves_together():
    limit = 0.01
    toy = Toy(tx=optax.sgd(1.0), clip_norm=limit)
    before = toy.state()
    leaves = jax.tree.map(np.array, before.trainable)
    state, metrics = toy.step(before, toy.frozen, stack(toy_batch(0)), jax.random.key(1))
    moved = jax.tree.map(lambda a, b: b - a, leaves, state.trainable)
    assert metrics["grad_norm"] > limit  # as it was before clipping
    np.testing.assert_allclose(optax.tree.norm(moved), limit, rtol=1e-4)


def test_the_state_is_donated():
    toy = Toy()
    state = toy.state()
    toy.step(state, toy.frozen, stack(toy_batch(0)), jax.random.key(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(toy.frozen))


def test_each_step_and_micro_batch_draws_its_own_key():
    seen = []

    def loss_fn(params, batch, key):
        jax.debug.callback(lambda k: seen.append(tuple(np.ravel(k))), jax.random.key_data(key))
        return toy_loss(params, batch, key)

    toy = Toy(loss_fn=loss_fn)
    toy.fit(steps=2)
    jax.effects_barrier()
    assert len(set(seen)) == 4


def decoder_problem(remat="none", num_layers=3, length=9):
    config = decoder.DecoderConfig(
        vocab_size=131,  # no two kinds of weight share a shape
        hidden_size=32,
        intermediate_size=56,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tie_embeddings=True,
        remat=remat,
    )
    model = decoder.Decoder(config)
    lora = jlora.LoraConfig(rank=2)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    params = jlora.init(
        jax.random.key(0), decoder.param_shapes(config), lora, fn=apply, args=(tokens,)
    )

    def loss_fn(params, batch, key):
        def compute(params, batch):
            variables = {"params": params}
            hidden = model.apply(variables, batch["tokens"], method="hidden")
            return losses.head_cross_entropy(
                lambda h: model.apply(variables, h, method="head"),
                hidden,
                batch["targets"],
                batch["loss_mask"],
                chunk_tokens=4,
                head_is_frozen=True,
            )

        return jlora.adapt(compute, on_unsupported="error")(params, batch)

    batch = {
        "tokens": jax.ShapeDtypeStruct((2, 2, length), jnp.int32),
        "targets": jax.ShapeDtypeStruct((2, 2, length), jnp.int32),
        "loss_mask": jax.ShapeDtypeStruct((2, 2, length), jnp.float32),
    }
    return params, lora, loss_fn, batch


def walk(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from walk(inner)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_step_makes_no_array_of_a_frozen_weights_size(remat):
    params, lora, loss_fn, batch = decoder_problem(remat)
    trainable, frozen = jlora.split(params, lora)
    tx = jlora.optimizer(optax.adamw(1e-3), lora)
    state = jax.eval_shape(lambda t: train.init_state(t, tx), trainable)
    step = train.make_train_step(loss_fn, tx, clip_norm=1.0)
    key = jax.random.key(0)
    weights = {leaf.shape for leaf in jax.tree.leaves(frozen) if leaf.ndim == 3}
    weights |= {shape[1:] for shape in weights}
    weights |= {leaf.shape for leaf in jax.tree.leaves(frozen) if leaf.ndim == 2 and
                leaf.shape != (3, 32)}  # fmt: skip
    weights |= {shape[:-2] + shape[:-3:-1] for shape in weights}
    # What reads a weight: taking a layer of the stack, and turning it for the backward product.
    reading = {"dynamic_slice", "squeeze", "slice", "transpose", "optimization_barrier", "name"}
    reading |= {"convert_element_type", "copy", "sharding_constraint", "reshape"}
    jaxpr = jax.make_jaxpr(step)(state, frozen, batch, key)
    made = [
        (eqn.primitive.name, out.aval.shape)
        for eqn in walk(jaxpr.jaxpr)
        for out in eqn.outvars
        if getattr(out.aval, "shape", None) in weights and eqn.primitive.name not in reading
    ]
    assert not made


def test_the_compiled_step_has_no_room_for_moments_or_gradients_of_the_base():
    # Many layers and few tokens: the copy of a layer, and its activations, count for little.
    params, lora, loss_fn, batch = decoder_problem(num_layers=24, length=2)
    trainable, frozen = jlora.split(params, lora)
    tx = jlora.optimizer(optax.adamw(1e-3), lora)
    state = jax.eval_shape(lambda t: train.init_state(t, tx), trainable)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    assert size(state.opt_state) < 2 * size(trainable) + 64
    step = train.make_train_step(loss_fn, tx, clip_norm=1.0)
    memory = step.lower(state, frozen, batch, jax.random.key(0)).compile().memory_analysis()
    given = size(state) + size(frozen) + size(batch)
    assert memory.argument_size_in_bytes < given + 1024
    assert memory.output_size_in_bytes < size(state) + 1024
    assert memory.alias_size_in_bytes > 0.9 * size(state)  # donated, so not there twice
    assert memory.temp_size_in_bytes < size(frozen)  # one gradient of the base would fill it


# The schedule


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_schedule_rises_then_falls_to_its_end(kind):
    schedule = train.learning_rate_schedule(
        kind, 1e-3, steps=100, warmup_steps=10, final_fraction=0.1
    )
    rates = np.array([float(schedule(step)) for step in range(101)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 1e-4, rtol=1e-5)
    assert rates.argmax() in (9, 10)
    np.testing.assert_allclose(rates[100], 1e-3 if kind == "constant" else 1e-4, rtol=1e-5)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="shorter than 5 steps"):
        train.learning_rate_schedule("cosine", 1e-3, steps=5, warmup_steps=5)


# The loop


def test_every_step_is_reported_once_and_in_order():
    toy, lines = Toy(), []
    result = toy.fit(
        callbacks=[lines.append],
        evaluate=toy.evaluate,
        eval_every=5,
        learning_rate=lambda step: 0.1 * step,
        count_tokens=lambda batch: 4,
    )
    assert [line["step"] for line in lines] == list(range(13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 5, 10, 12]
    assert lines[12]["tokens"] == 12 * 2 * 4
    assert lines[3]["learning_rate"] == pytest.approx(0.2)  # what the third step used
    assert lines[12]["eval_loss"] < lines[0]["eval_loss"]
    assert result.reason == "finished"
    assert result.progress.position == 24
    assert result.progress.first_loss == lines[0]["eval_loss"]


def test_evaluation_weighs_every_target_token_alike():
    toy = Toy()
    batches = [toy_batch(i, rows=2 + i) for i in range(3)]
    total = sum(
        np.array([*map(float, toy_loss(jlora.combine(toy.trainable, toy.frozen), b, None))])
        for b in batches
    )
    found = train.evaluate(toy.eval_step, toy.trainable, toy.frozen, batches)
    assert found == pytest.approx(total[0] / total[1], rel=1e-6)


def test_evaluation_without_a_target_is_refused():
    toy = Toy()
    nothing = {**toy_batch(0), "mask": np.zeros(4, np.float32)}
    with pytest.raises(ValueError, match="no token that counts"):
        train.evaluate(toy.eval_step, toy.trainable, toy.frozen, [nothing])


class Killed(BaseException):
    """Stands for SIGKILL: nothing below `fit` gets to do anything about it."""


@pytest.mark.parametrize("kills", [(1,), (2, 3), (7,), (3, 8, 11), (12,)])
def test_a_killed_run_ends_bit_equal(tmp_path, kills):
    whole_lines, lines = [], {}
    toy = Toy()
    options = {"save_every": 3, "evaluate": toy.evaluate, "eval_every": 4}
    whole = toy.fit(callbacks=[whole_lines.append], **options)
    for kill in [*kills, None]:

        def callback(line, kill=kill):
            if line["step"] == kill:
                raise Killed
            lines[line["step"]] = line

        checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
        try:
            result = toy.fit(checkpoints, callbacks=[callback], **options)
        except Killed:
            checkpoints.close()
    checkpoints.close()
    assert_trees_equal(result.state, whole.state)
    assert result.progress == whole.progress
    assert [lines[step] for step in sorted(lines)] == whole_lines


def test_stopping_saves_and_the_next_start_goes_on(tmp_path):
    toy = Toy()
    whole = toy.fit()
    checkpoints, steps = checkpoint.Checkpoints(tmp_path), []
    result = toy.fit(
        checkpoints, callbacks=[lambda line: steps.append(line["step"])],
        should_stop=lambda step: len(steps) >= 4,
    )  # fmt: skip
    assert result.reason == "interrupted"
    assert checkpoints.latest() == result.progress.step == steps[-1]
    again = toy.fit(checkpoints)
    checkpoints.close()
    assert again.reason == "finished"
    assert_trees_equal(again.state, whole.state)


@pytest.mark.parametrize("bad_step", [1, 4, 5, 6, 12])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_stops_the_run_by_name_and_is_never_saved(tmp_path, bad_step, value):
    def batch(position):
        good = toy_batch(position)
        return {**good, "y": good["y"] + value} if position // 2 + 1 == bad_step else good

    toy, lines = Toy(), []
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=100)
    with pytest.raises(train.NonFiniteError, match=rf"at step {bad_step}\b"):
        toy.fit(checkpoints, batch=batch, save_every=1, callbacks=[lines.append])
    assert checkpoints.steps() == list(range(1, bad_step))
    assert [line["step"] for line in lines] == list(range(1, bad_step))
    if bad_step > 1:
        restored = checkpoints.restore(toy.state())
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.tree))
    checkpoints.close()


def test_a_nan_gradient_with_a_finite_loss_stops_too():
    def loss_fn(params, batch, key):
        total, count = toy_loss(params, batch, key)
        return total + jnp.sqrt(jnp.sum(0 * params["layer"]["bias"])), count

    with pytest.raises(train.NonFiniteError, match="grad_norm is nan at step 1"):
        Toy(loss_fn=loss_fn).fit()


def test_reading_metrics_lags_one_step_behind_the_device():
    toy, order = Toy(), []

    def step(*args):
        order.append("dispatch")
        return real(*args)

    real, toy.step = toy.step, step
    toy.fit(steps=4, callbacks=[lambda line: order.append(line["step"])])
    assert order == ["dispatch", "dispatch", 1, "dispatch", 2, "dispatch", 3, 4]


def test_patience_stops_and_keeps_the_best_checkpoint(tmp_path):
    toy = Toy()
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 1.0])
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    result = toy.fit(
        checkpoints, steps=50, evaluate=lambda _: next(losses), eval_every=2, patience=3,
        save_every=5,
    )  # fmt: skip
    assert result.reason == "early"
    assert (result.progress.step, result.progress.best_step) == (10, 4)
    assert checkpoints.steps() == [4, 10]  # the best, and the last one
    checkpoints.close()


def test_a_finished_run_does_nothing_more(tmp_path):
    toy = Toy()
    with_checkpoints = checkpoint.Checkpoints(tmp_path)
    first = toy.fit(with_checkpoints, steps=3)
    lines = []
    second = toy.fit(with_checkpoints, steps=3, callbacks=[lines.append])
    with_checkpoints.close()
    assert second.reason == "finished"
    assert lines == []
    assert_trees_equal(first.state, second.state)


def test_progress_survives_json():
    import json

    progress = train.Progress().after_evaluation(0.1).after_step(2, 7).after_evaluation(0.3)
    again = train.Progress(**json.loads(json.dumps(dataclasses.asdict(progress))))
    assert again == progress
    assert (progress.best_loss, progress.best_step, progress.stale) == (0.1, 0, 1)
