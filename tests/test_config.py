"""One YAML a run: what is accepted, what is refused and in which words."""

import pytest

from jlora import config

SMALLEST = """
name: first
model: {path: some/model}
data: {train: rows.jsonl}
train: {steps: 10}
"""


@pytest.fixture
def smallest(tmp_path):
    path = tmp_path / "first.yaml"
    path.write_text(SMALLEST)
    return path


def test_defaults_fill_what_a_file_leaves_out(smallest):
    run = config.load(smallest)
    assert (run.lora.rank, run.optim.clip_norm, run.train.steps) == (16, 1.0, 10)
    assert run.folder.name == "first"


def test_the_resolved_file_reads_back_equal(smallest, tmp_path):
    run = config.load(smallest, ["lora.targets=[q_proj, v_proj]", "lora.rank_pattern.*/x.y/*=4"])
    config.save(tmp_path / "resolved.yaml", run)
    again = config.load(tmp_path / "resolved.yaml")
    assert again == run
    assert config.differences(run, again) == []
    assert again.lora.rank_pattern == {"*/x.y/*": 4}


def test_overrides_replace_values_and_are_yaml(smallest):
    run = config.load(
        smallest, ["optim.learning_rate=1e-4", "train.steps=null", "train.epochs=2", "lora.rank=4"]
    )
    assert run.optim.learning_rate == 1e-4
    assert (run.train.steps, run.train.epochs, run.lora.rank) == (None, 2.0, 4)


def test_paths_are_relative_to_the_working_directory(smallest, tmp_path, monkeypatch):
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = config.load(smallest)
    assert run.data.train == str(tmp_path / "rows.jsonl")
    assert run.model.path == str(tmp_path / "some" / "model")
    assert run.output == str(tmp_path / "runs")


def test_a_name_on_the_hub_stays_a_name(smallest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(smallest).model.path == "some/model"


def test_differences_name_the_keys_that_change_a_run(smallest):
    old = config.load(smallest)
    new = config.load(smallest, ["lora.rank=4", "train.steps=20", "checkpoint.every=7"])
    assert config.differences(old, new) == [
        "lora.rank: was 16, now 4",
        "train.steps: was 10, now 20",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=4", ["unknown key 'train.step'", "train.steps"]),
        ("optim.lr=3", ["unknown key 'optim.lr'", "learning_rate", "clip_norm"]),
        ("learning_rate=3", ["unknown key 'learning_rate'", "optim.learning_rate"]),
        ("foo=1", ["unknown key 'foo'", "name, output, seed"]),
        ("train.steps=1.5", ["train.steps: got 1.5", "a whole number"]),
        ("lora.rank=0", ["lora.rank: got 0", "greater than or equal to 1"]),
        ("lora.rank=true", ["lora.rank: got true", "a whole number"]),
        ("lora.dropout=x", ['lora.dropout: got "x"', "a number"]),
        ("lora.dropout=1", ["lora.dropout: got 1", "less than 1"]),
        ("lora.targets=3", ["lora.targets: got 3", "a list"]),
        ("optim.learning_rate=.nan", ["optim.learning_rate", "finite"]),
        ("model.dtype=fp8", ["model.dtype", "'bfloat16'"]),
        ("data.pack=1", ["data.pack: got 1", "true or false"]),
        ("data.validation=0", ["data.validation", "more than 0"]),
        ("train=3", ["train: got 3", "a section"]),
        ("name.x=3", ["'name' is a value"]),
        ("name=a/b", ["name", "to name a folder"]),
        ("train.steps", ["key=value"]),
        ("lora.rank=[1", ["not valid YAML"]),
        ("train.epochs=2", ["one of train.steps and train.epochs", "both"]),
        ("train.steps=null", ["one of train.steps and train.epochs", "neither"]),
        ("optim.warmup_steps=10", ["optim.warmup_steps is 10", "train.steps"]),
        ("eval.every=5", ["data.validation"]),
        ("eval.patience=5", ["data.validation"]),
        ("model.path=null", ["model.path: got null", "a text"]),
        ("model.remat=keep:mlp", ['model.remat: got "keep:mlp"', "expected one of", "gate_proj"]),
        ("model.unroll=0", ["model.unroll: got 0"]),
        ("train.head_chunk_tokens=0", ["train.head_chunk_tokens: got 0"]),
    ],
)
def test_a_bad_value_is_refused_by_key(smallest, override, words):
    with pytest.raises(ValueError) as error:
        config.load(smallest, [override])
    for word in words:
        assert word in str(error.value)


def test_patience_needs_evaluations_to_count(smallest):
    with pytest.raises(ValueError, match=r"eval\.every"):
        config.load(smallest, ["data.validation=0.1", "eval.patience=2"])


def test_all_mistakes_of_a_file_are_listed_at_once(smallest):
    with pytest.raises(ValueError) as error:
        config.load(smallest, ["lora.rank=x", "seed=-1", "oops=1"])
    assert all(key in str(error.value) for key in ("lora.rank", "seed", "oops"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "twice, line 2"),
        ("name: [a\n", "line 2"),
        ("- a\n", "expected keys"),
        ("", "expected keys"),
        ("name: a\n", "'model' is missing"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        config.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        config.load(tmp_path / "nowhere.yaml")


def test_shipped_configs_are_valid():
    import pathlib

    found = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert found
    for path in found:
        config.load(path)


def test_a_mesh_has_three_sizes_and_does_not_make_another_run(smallest):
    old = config.load(smallest)
    assert old.mesh is None
    run = config.load(smallest, ["mesh.tensor=2"])
    assert (run.mesh.data, run.mesh.fsdp, run.mesh.tensor) == (1, -1, 2)
    assert config.differences(old, run) == []
    with pytest.raises(ValueError, match=r"mesh\.fsdp: got 0, expected at least 1, or -1"):
        config.load(smallest, ["mesh.fsdp=0"])
    with pytest.raises(ValueError, match=r"unknown key 'mesh.fdsp'. Did you mean fsdp|mesh.fsdp"):
        config.load(smallest, ["mesh.fdsp=4"])
