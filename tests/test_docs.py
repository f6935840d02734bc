"""What the README and the docstrings show runs as it stands, and links lead somewhere."""

import doctest
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_example_of_the_readme_trains():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    before = names["params"]
    after = names["dense"]
    assert jax.tree.structure(after) == jax.tree.structure({"up": 0, "down": 0})
    assert not jnp.array_equal(after["down"], before["down"].w)


def test_the_examples_of_the_qlora_page_run(tmp_path, monkeypatch):
    import tiny

    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "qlora.md").read_text(), re.DOTALL)
    tiny.write_model(tmp_path / "path" / "to" / "model")
    monkeypatch.chdir(tmp_path)
    names = {
        "mesh": jax.make_mesh((1, 2), ("data", "model"), devices=jax.devices()[:2]),
        "NamedSharding": jax.sharding.NamedSharding,
        "P": jax.sharding.PartitionSpec,
    }
    for block in code:
        exec(block, names)
    np.testing.assert_array_equal(names["merged"]["up"], names["dense"]["up"])  # b is zero
    codes = names["params"]["layers"]["mlp"]["up_proj"]["kernel"].codes
    assert codes.addressable_shards[0].data.shape[1] == codes.shape[1] // 2


@pytest.mark.parametrize("module", ["leaf", "interpret", "usage", "optim"])
def test_examples_in_docstrings_give_what_they_show(module):
    module = importlib.import_module(f"jlora.{module}")
    names = {"jax": jax, "jnp": jnp, "optax": optax, "jlora": jlora, "LoraConfig": jlora.LoraConfig}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_config_is_valid():
    from jlora import config

    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config.load(path, [])
