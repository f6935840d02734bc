"""The notebooks: stored as a reader should find them, and they run from top to bottom."""

import ast
import importlib
import os
import pathlib
import re
import sys

import pytest
from compiling import xla_flags

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART, ANY_FUNCTION, QLORA = "01_quickstart", "02_any_jax_function", "03_qlora"
SHARDING = "04_tpu_and_sharding"
# A folder of one machine; a shape such as "/16/" or a module such as "a/b" is none.
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|work|Users|usr|opt|var|content)/|\b[A-Z]:\\"
)

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """All texts among the outputs of a cell."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (
            text for kind, text in output.get("data", {}).items() if kind.startswith("text/")
        )


def test_there_are_the_notebooks_that_the_docs_name():
    assert {QUICKSTART, ANY_FUNCTION, QLORA, SHARDING} <= {path.stem for path in NOTEBOOKS}


@by_notebook
def test_a_notebook_is_valid_and_small(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 400_000


@by_notebook
def test_the_first_cell_with_code_installs(path):
    first = code_cells(read(path))[0].source
    assert 'find_spec("jlora")' in first
    assert '"-m", "pip", "install"' in first


@by_notebook
def test_outputs_are_those_of_one_run_from_top_to_bottom(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@by_notebook
def test_outputs_show_nothing_of_the_machine_and_no_noise(path):
    for cell in code_cells(read(path)):
        assert not any(output.get("name") == "stderr" for output in cell.outputs)
        for text in texts(cell):
            assert not MACHINE_PATH.search(text), text


def dotted(node):
    """`jlora.train.evaluate` as its parts, for an expression that starts at the name `jlora`."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return parts[::-1] if isinstance(node, ast.Name) and node.id == "jlora" else []


@by_notebook
def test_a_notebook_uses_public_names_alone(path):
    for cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            module = importlib.import_module("jlora")
            for name in dotted(node):
                inner = f"{module.__name__}.{name}"
                if name in getattr(module, "__all__", ()):
                    break
                assert not name.startswith("_"), inner
                module = importlib.import_module(inner)  # a module, or the name is not public


def run(path, folder, checks, monkeypatch):
    """Runs a notebook in `folder`, and `checks` in one more cell at its end."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", xla_flags())  # one device, as a reader has
    monkeypatch.delenv("MPLBACKEND", raising=False)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    notebook = read(path)
    interpreter = f"import sys\nassert sys.version == {sys.version!r}, sys.version\n"
    notebook.cells.append(nbformat.v4.new_code_cell(interpreter + checks))
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources=resources
    ).execute()
    return notebook


def find(stem):
    return ROOT / "notebooks" / f"{stem}.ipynb"


@pytest.mark.slow
def test_the_quick_start_teaches_the_model_and_saves_it(tmp_path, monkeypatch):
    from jlora import models

    try:
        models.resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    except FileNotFoundError as error:
        pytest.skip(f"no model: {error}")
    checks = """
assert held_out_losses[steps] < 0.85 * held_out_losses[0], held_out_losses
assert held_out_losses[steps] < held_out_losses[steps // 2] < held_out_losses[0], held_out_losses
assert all(before != after for before, after in zip(answers_before, answers_after, strict=True))
assert difference < 1e-4 * size, (difference, size)
assert same
tuned, tuned_params = jlora.models.load(work / "merged")
for one, other in zip(jax.tree.leaves(tuned_params), jax.tree.leaves(merged), strict=True):
    np.testing.assert_array_equal(one, other)
"""
    run(find(QUICKSTART), tmp_path, checks, monkeypatch)
    written = {path.name for path in (tmp_path / "quickstart").iterdir()}
    assert {"adapter", "merged"} <= written


@pytest.mark.slow
def test_the_third_notebook_measures_what_a_quantised_base_costs(tmp_path, monkeypatch):
    from jlora import models

    try:
        models.resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    except FileNotFoundError as error:
        pytest.skip(f"no model: {error}")
    checks = """
mean = {fmt: float(jnp.stack(list(of_format.values())).mean()) for fmt, of_format in errors.items()}
assert mean["int8"] < 0.015 < mean["float8"] < 0.04 < 0.08 < mean["nf4"] < 0.11, mean
assert before["original"] < before["nf4"] and after["nf4"] < 0.85 * before["nf4"], (before, after)
assert gaps[1] < gaps[0], gaps
rows = report.rows
assert len(rows) == 7 and all(row.erased > 0.9 and row.rounding < 1e-7 for row in rows), rows
unmerged, dequantised, original_base, packed_again = losses.values()
assert abs(dequantised - unmerged) < 1e-3, losses
assert original_base < before["original"], losses
assert packed_again > 0.5 * (before["nf4"] + after["nf4"]), losses
"""
    run(find(QLORA), tmp_path, checks, monkeypatch)


@pytest.mark.slow
def test_the_second_notebook_adapts_functions_of_every_kind(tmp_path, monkeypatch):
    pytest.importorskip("equinox")
    checks = """
assert losses[-1] < 0.01 * losses[0]
np.testing.assert_allclose(merged(x), lora_forward(tuned, x), rtol=1e-4, atol=1e-4)
assert first.axes == ("out", "in") and w.axes == ("stack", "in", "out")
assert count(deep_loss, deep_trainable, deep_frozen).endswith(" 0 of them of a weight's size")
assert eight_losses.shape == (8, 200) and (eight_losses[:, -1] < 0.1 * eight_losses[:, 0]).all()
assert apart < 1e-3, apart
# 0.20 to 0.49 of it by how the program is compiled: rounding moves the trained base under it.
assert meta_after < 0.75 * meta_before, (meta_before, meta_after)
np.testing.assert_allclose(out, dense_out, rtol=1e-5, atol=1e-5)
"""
    notebook = run(find(ANY_FUNCTION), tmp_path, checks, monkeypatch)
    printed = "".join(text for cell in code_cells(notebook) for text in texts(cell))
    assert "ambiguous" in printed  # a stack of matrices, without the function
    assert "UserWarning: jlora has no low-rank rule" in printed
    assert "Pass on_unsupported='warn' or 'allow'" in printed  # the refusal
    assert "captures an array of that shape in a closure" in printed


@pytest.mark.slow
def test_the_fourth_notebook_trains_alike_on_every_mesh(tmp_path, monkeypatch):
    checks = """
assert len(devices) == 8 and len(results) == 4
assert apart < 1e-5 and one[-1] < one[0] - 0.3, (apart, one)
held = [of_device for _, of_device, _ in results.values()]
assert max(held[1:]) < 0.25 * held[0], held
gathered = found["all-gather"]
assert any(shape.startswith("u8[") for shape in gathered) and "f32[512,512]" not in gathered, found
sums = [re.findall(r"\\d+", shape)[1:] for shape in found["all-reduce"]]
assert all("8" in sizes for sizes in sums if sizes), found
"""
    run(find(SHARDING), tmp_path, checks, monkeypatch)
