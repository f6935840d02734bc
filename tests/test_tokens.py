"""New tokens: in the tokenizer, in the model, in a run, and in transformers and PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from laws import assert_close
from test_peft import load_in_peft, settings_of, tensors_of, tiny
from tiny import tokenizer_files, write_config

import jlora
from jlora import chat, cli, models, saved, tokens

NEW = ["<tool>", "</tool>"]


def test_a_new_token_is_one_id_wherever_it_stands():
    files, ids = tokens.add(tokenizer_files(), [*NEW, "<|im_end|>"])
    before, after = (chat.Tokenizer.from_files(f) for f in (tokenizer_files(), files))
    assert ids == (before.vocab_size, before.vocab_size + 1, before.encode("<|im_end|>")[0])
    for text in ("a<tool>b</tool>", "x", "<tool><tool>"):
        assert after.decode(after.encode(text)) == text
    assert after.encode("a<tool>b") == [*before.encode("a"), ids[0], *before.encode("b")]
    assert tokens.add(files, NEW)[1] == ids[:2]
    assert tokens.add(tokenizer_files(), []) == (tokenizer_files(), ())
    for wrong in (["a", "a"], [""]):
        with pytest.raises(ValueError, match="different texts"):
            tokens.add(files, wrong)
    with pytest.raises(ValueError, match=r"No tokenizer.json among .*\(config.json\)"):
        tokens.add({"config.json": "{}"}, NEW)
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read"):
        tokens.add({"tokenizer.json": "{}"}, NEW)


@pytest.mark.parametrize("tied", [True, False])
def test_room_is_made_for_tokens(tied):
    model, base = tiny(tie_embeddings=tied)
    wide, params = tokens.grow(model, base, 64)
    assert wide.config.vocab_size == 64
    x = np.arange(12)[None]
    got, want = (m.apply({"params": p}, x) for m, p in ((wide, params), (model, base)))
    assert_close(got[..., :61], want, 1e-6)
    table = params["embed_tokens"]["embedding"]
    assert_close(table[61:], jnp.broadcast_to(table[:61].mean(0), (3, table.shape[1])), 1e-5)
    assert tokens.grow(model, base, 61) == (model, base)
    shapes = jax.eval_shape(lambda: base)
    _, abstract = tokens.grow(model, shapes, 64)
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, params)


@pytest.mark.parametrize("fmt", ["nf4", "int8", "float8"])
def test_room_is_made_in_a_quantised_head(fmt):
    model, base = tiny()
    fn = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    x = jnp.arange(12)[None]
    packed = jlora.quantize(base, fmt, fn=fn, args=(x,))
    wide, params = tokens.grow(model, packed, 64)
    head = params["lm_head"]["kernel"]
    assert type(head) is type(packed["lm_head"]["kernel"])
    dense = packed["lm_head"]["kernel"].materialise()
    np.testing.assert_array_equal(head.materialise()[:, :61], dense)
    assert_close(head.materialise()[:, 61:], dense.mean(1, keepdims=True).repeat(3, 1), 0.1)
    logits = jlora.adapt(lambda p: wide.apply({"params": p}, x))(params)
    assert_close(logits[..., :61], jlora.adapt(lambda p: fn(p, x))(packed), 1e-5)
    _, abstract = tokens.grow(model, jax.eval_shape(lambda: packed), 64)
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, params)


@pytest.mark.slow
def test_a_run_with_new_tokens(tmp_path, capsys):
    path = write_config(
        tmp_path, train={"steps": 4}, lora={"rank": 4, "targets": ["q_proj"], "dropout": 0.0}
    )
    raw = yaml.safe_load(path.read_text())
    raw["model"]["new_tokens"] = NEW
    path.write_text(yaml.safe_dump(raw))
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text().replace("aaaa", "<tool>a</tool>"))
    assert cli.main(["train", str(path)]) == 0
    assert "2 rows" in capsys.readouterr().out
    run = tmp_path / "runs" / "tiny"
    loaded, lora = saved.load_run(run, print)
    assert loaded.new_tokens == (259, 260)
    table = loaded.params["embed_tokens"]["embedding"]
    assert lora.rows == (("embed_tokens", (259, 260)),)
    mean = table.w[:259].mean(0)
    assert jnp.abs(table.rows - mean).max() > 1e-3  # they have trained
    assert_close(table.w[259:], jnp.broadcast_to(mean, (2, len(mean))), 1e-5)
    settings = settings_of(run / "adapter")
    assert settings["trainable_token_indices"] == [259, 260]
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    np.testing.assert_array_equal(tensors_of(run / "adapter")[name], table.rows)

    x = jnp.asarray([loaded.tokenizer.encode("a<tool>b</tool>c")])
    want = loaded.forward(loaded.params, x)
    assert cli.main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 0
    model, params = models.load(tmp_path / "merged")
    assert_close(model.apply({"params": params}, x), want, 1e-4)
    merged = chat.Tokenizer.from_files(models.tokenizer_files(tmp_path / "merged"))
    assert merged.encode("a<tool>b</tool>c") == [*map(int, x[0])]
    generate = ["generate", "--prompt", "a<tool>", "--max-new-tokens", "3"]
    capsys.readouterr()
    assert cli.main([*generate, str(run)]) == 0
    own = capsys.readouterr().out
    base = [str(tmp_path / "model"), "--adapter", str(run / "adapter")]
    assert cli.main([*generate, *base]) == 0
    assert capsys.readouterr().out == own
    (run / "adapter" / "tokenizer.json").unlink()
    assert cli.main([*generate, *base, "--other-base"]) == 2
    assert "make room for them first" in capsys.readouterr().err

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    )
    reference.resize_token_embeddings(261)
    reference = load_in_peft(reference, run / "adapter")
    with torch.no_grad():
        got = reference(torch.from_numpy(np.asarray(x, np.int64))).logits.numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_rows_that_train_already_are_refused(tmp_path, capsys):
    path = write_config(tmp_path, lora={"rank": 4, "train": ["embed_tokens"]})
    assert cli.main(["inspect", str(path), 'model.new_tokens=["<tool>"]']) == 2
    assert "leave ['embed_tokens'] out of lora.rows" in capsys.readouterr().err
    assert cli.main(["inspect", str(path), 'model.new_tokens=["<tool>", ""]']) == 2
    assert "different texts" in capsys.readouterr().err
    assert cli.main(["inspect", str(path), "lora.train=[]", "lora.rows={embed_tokens: [300]}"]) == 2
    assert "names row 300" in capsys.readouterr().err
    assert jlora.tokens.add is tokens.add
