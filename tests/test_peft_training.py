"""Training on from a PEFT adapter takes the steps that PyTorch takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_peft import SHAPE, tiny, torch_model, wrap_in_peft

import jlora
from jlora import peft

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
# With 1e-2, rounding errors grow tenfold every few steps and the runs part after a dozen.
RATE = 2e-3
ADAM = dict(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01)
_SEEN = np.random.default_rng(5).integers(0, SHAPE["vocab_size"], (2, 4, 16)).astype(np.int32)
BATCHES = np.tile(_SEEN, (10, 1, 1))  # seen again and again, so that there is something to learn


def losses_here(model, base, folder):
    params, config = peft.load(folder, base)
    trainable, frozen = jlora.split(params, config)
    forward = jlora.adapt(lambda params, tokens: model.apply({"params": params}, tokens))
    tx = jlora.optimizer(optax.adamw(RATE, **ADAM), config)

    def loss_fn(trainable, tokens):
        logits = forward(jlora.combine(trainable, frozen), tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return each.mean()

    @jax.jit
    def step(trainable, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(trainable, tokens)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = tx.init(trainable), []
    for tokens in BATCHES:
        trainable, state, loss = step(trainable, state, jnp.asarray(tokens))
        losses.append(float(loss))
    return losses


def losses_in_torch(torch, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(
        trained, RATE, betas=(ADAM["b1"], ADAM["b2"]), eps=ADAM["eps"], weight_decay=0.01
    )
    losses = []
    for tokens in BATCHES:
        tokens = torch.from_numpy(tokens.astype(np.int64))
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
        )
        tx.zero_grad()
        loss.backward()
        tx.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_from_the_same_adapter_have_the_same_losses(kind, tmp_path):
    model, base = tiny()
    torch, reference = torch_model(tmp_path / "base", model, base)
    options = dict(r=4, lora_alpha=8, target_modules="all-linear", **KINDS[kind])
    reference = wrap_in_peft(torch, reference, **options)
    reference.save_pretrained(tmp_path / "adapter")
    here = losses_here(model, base, tmp_path / "adapter")
    there = losses_in_torch(torch, reference)
    np.testing.assert_allclose(here, there, rtol=1e-3)
    assert abs(here[0] - here[-1]) > 0.1  # or the steps would prove nothing
