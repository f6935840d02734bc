"""`jlora plan`: what it says of a run on hardware that is not here, and what the step does."""

import dataclasses
import json
import math
import pathlib

import jax
import pytest

from jlora import cli, config, gpus, hardware, hlo, plan, plan_report, shapes, suggest, topology
from jlora.models import attention, decoder, weights

RUN = """
name: tiny
mesh: {data: 1, fsdp: -1, tensor: 2}
model: {path: some/model, remat: full}
data: {train: data.jsonl, length: 128}
lora: {rank: 4, targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}
train: {steps: 10, batch_size: 8}
"""
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
TINY = ("--topology", "v5e:2x4", "--shape", "tiny")
TINY_GPUS = ("--gpus", "h100:8", "--shape", "tiny")
PROJECTIONS = 2 * (4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 128)  # of two layers
FACTORS = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    # what `set_up` changes for the whole process
    monkeypatch.setattr(topology, "set_up", lambda: None)
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return str(path)


def need_cuda_plugin():
    try:
        gpus.gpus("h100:1")
    except ValueError as error:
        pytest.skip(str(error))


def planned(capsys, *arguments):
    code = cli.main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.slow
def test_a_plan_is_a_table_and_one_line_of_json(capsys, tmp_path, run_file):
    pytest.importorskip("libtpu")
    file = tmp_path / "plan.jsonl"
    code, out, err = planned(capsys, run_file, *TINY, "--json", str(file))
    assert code == 0, err
    *table, line = out.splitlines()
    assert table[-1] == "Fits."
    assert any("all-gather" in row for row in table)
    made = json.loads(line)
    assert json.loads(file.read_text()) == made
    assert made["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert made["device_kind"] == "TPU v5 lite"
    assert made["attention"] == "splash"
    assert made["parameters"] == PROJECTIONS + 2 * 256 * 64 + 5 * 64
    assert made["trainable"] == FACTORS
    # every weight is cut over all eight; norms are not
    assert made["frozen_bytes"] == 2 * ((PROJECTIONS + 2 * 256 * 64) // 8 + 5 * 64)
    assert made["argument_bytes"] >= made["frozen_bytes"] + made["state_bytes"]
    assert made["argument_bytes"] < made["peak_bytes"] < 2**24
    assert made["headroom_bytes"] == made["memory_bytes"] - made["peak_bytes"]
    assert made["memory_bytes"] == int(15.75 * 2**30)
    assert made["exact_counts"]
    assert made["collectives"]["all-gather"]["executions"] >= 2 * 7 * 2  # layers, forward and back
    flops = (4 * (PROJECTIONS + 256 * 64) + 6 * FACTORS) * 8 * 128
    flops += 12 * 2 * 64 * 8 * 128 * 129 // 2
    assert made["model_flops"] == flops
    assert made["floor_seconds"] == pytest.approx(flops / 8 / 197e12)


@pytest.mark.slow
def test_a_pod_step_reduces_factors_and_activations_but_no_frozen_weight(tmp_path):
    """Sizes are chosen so that no weight's shard has an axis of the rows' length or of the rank."""
    pytest.importorskip("libtpu")
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    run = config.load(path, ["data.length=640", "lora.rank=24", "train.head_chunk_tokens=1280"])
    shape = decoder.DecoderConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_layers=3, num_heads=4,
        num_kv_heads=4, head_dim=128,
    )  # fmt: skip
    target = topology.tpus("v5e:2x4")
    base, step, arguments = plan.prepare(run, plan.Model(shape, "a test"), target)
    with jax.set_mesh(base.mesh):
        compiled = step.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    found = hlo.collectives(compiled.as_text())
    reduced = [
        sizes
        for one in found
        if one.kind in ("all-reduce", "reduce-scatter")
        for _, sizes in one.shapes
    ]
    factors = [sizes for sizes in reduced if 24 in sizes and not {640, 320} & set(sizes)]
    scalars = [sizes for sizes in reduced if math.prod(sizes) == 1]
    activations = [sizes for sizes in reduced if {640, 320} & set(sizes)]
    assert factors
    assert scalars
    assert len(factors) + len(scalars) + len(activations) == len(reduced), reduced
    # the state goes in and comes out in the same place
    assert compiled.memory_analysis().alias_size_in_bytes > 0.9 * plan.device_bytes(arguments[0])


@pytest.mark.slow
def test_what_does_not_fit_says_so_and_what_to_change(capsys, run_file):
    pytest.importorskip("libtpu")
    options = ("data.length=1024", "mesh.tensor=4")
    code, out, _ = planned(capsys, run_file, *options, *TINY[:3], "70b")
    assert code == 3
    assert "Does not fit." in out
    assert "model.quantize=nf4: the weights alone take 16.43 GiB" in out
    assert "--suggest" in out
    made = json.loads(out.splitlines()[-1])
    assert not made["fits"]
    assert made["headroom_bytes"] < 0
    assert made["peak_bytes"] > made["argument_bytes"] > 141e9 / 8


def made_plan(**changes):
    values = {
        "target": "v5e:2x4", "device_kind": "TPU v5 lite", "num_devices": 8, "jax": "0",
        "model": "m", "parameters": 1, "trainable": 1,
        "mesh": {"data": 1, "fsdp": 8, "tensor": 1}, "quantize": None, "remat": "none",
        "rows": 32, "accumulation": 1, "length": 2048, "fits": False, "frozen_bytes": 10**9,
        "state_bytes": 10**8, "argument_bytes": 2 * 10**9, "peak_bytes": 40 * 10**9,
        "memory_bytes": 16 * 10**9, "memory_source": "", "more_memory": None,
        "attention": "splash", "collectives": {},
        "exact_counts": True, "model_flops": 1.0, "floor_seconds": None, "trace_seconds": 0.0,
        "compile_seconds": 0.0,
    }  # fmt: skip
    return plan.Plan(**{**values, **changes})


def test_suggestions_are_searched_from_near_to_far(tmp_path, monkeypatch):
    """A compiler that takes twice the weights' size stands in for the one that takes minutes."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("batch_size: 8", "batch_size: 32"))
    target = topology.Target("eight", "tpu", jax.devices(), 16 * 2**30)
    model = plan.Model(shapes.decoder_config("70b"), "the shape 70b")
    asked = []

    def compiled(run, model, target):
        asked.append(run)
        config = dataclasses.replace(model.config, dtype="bfloat16")
        params = plan.placed(
            weights.abstract(config, run.model.quantize), plan.make_mesh(run, target)
        )
        peak = 2 * plan.device_bytes(params)
        return made_plan(
            peak_bytes=peak, fits=peak <= target.memory_bytes, rows=run.train.batch_size
        )

    monkeypatch.setattr(plan, "measure", compiled)

    def load(overrides):
        return config.load(path, overrides)

    found = suggest.suggest(load, model, target, made_plan(), lambda text: None, want=2)
    assert len(found) == 2
    for one in found:
        run = load(one.overrides)
        # dense weights are 16 GiB of each device, int8 twice 8.6
        assert run.model.quantize == "nf4"
        assert run.train.batch_size * run.train.accumulation == 32
        assert run.mesh.data * run.mesh.fsdp * run.mesh.tensor == 8
        assert run.train.batch_size % (run.mesh.data * run.mesh.fsdp) == 0
    formats = [run.model.quantize for run in asked]
    assert formats == sorted(formats, key=("int8", "nf4").index)
    assert formats.count("int8") <= 2  # having seen one refused, it leaves those that take as much
    assert len({(run.model, run.mesh, run.train) for run in asked}) == len(asked)


def test_a_bad_option_is_refused_before_anything_is_compiled(capsys, run_file, tmp_path):
    for options, word in (
        (["--slices", "0"], "0 is no whole number"),
        (["--suggest", "--want", "0"], "0 is no whole number"),
        (["--json", str(tmp_path / "none" / "plan.json")], "No such file or directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", str(run_file), *TINY, *options])
        assert ended.value.code == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "v5litepod-8"], ["'v5litepod-8'", "v5e:2x4"]),
        (["--topology", "v5e:3x5"], ["v5e:3x5", "2x2"]),
        (["--topology", "v5e:100x100"], ["v5e:100x100", "at most 16"]),
        (["--topology", "v3:2x2"], ["v3:2x2", "v5e:2x4"]),
        (["--topology", "v5e:2x4", "--shape", "71b"], ["'71b'", "70b"]),
        (["--topology", "v5e:2x4"], ["some/model", "--shape"]),
        ([*TINY, "mesh.tensor=3"], ["8 devices", "Sizes that do"]),
        ([*TINY, "train.batch_size=6"], ["train.batch_size is 6", "multiple of 4"]),
        ([*TINY, "lora.targets=[q_porj]"], ["q_porj", "q_proj"]),
    ],
)
def test_a_mistake_ends_with_one_message_and_code_2(capsys, run_file, arguments, words):
    pytest.importorskip("libtpu")
    code, out, err = planned(capsys, run_file, *arguments)
    assert code == 2
    assert not out
    assert "Traceback" not in err
    assert all(word in err for word in words), err


def test_without_libtpu_one_message_says_how_to_install_it(capsys, run_file, monkeypatch):
    def absent(*args, **options):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", absent)
    code, _, err = planned(capsys, run_file, *TINY)
    assert code == 2
    assert f'pip install "jax[tpu]=={jax.__version__}"' in err


@pytest.mark.slow
def test_a_plan_for_gpus_says_the_same_things(capsys, run_file):
    need_cuda_plugin()
    code, out, err = planned(capsys, run_file, *TINY_GPUS)
    assert code == 0, err
    *table, line = out.splitlines()
    assert table[-1] == "Fits."
    made = json.loads(line)
    assert made["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert made["device_kind"] == "NVIDIA H100 80GB HBM3"
    assert made["attention"] == "cudnn"
    assert made["frozen_bytes"] == 2 * ((PROJECTIONS + 2 * 256 * 64) // 8 + 5 * 64)
    assert made["argument_bytes"] >= made["frozen_bytes"] + made["state_bytes"]
    assert made["argument_bytes"] < made["peak_bytes"] < 2**24
    assert made["memory_bytes"] == int(0.75 * gpus.KINDS["h100"].memory_bytes)
    assert made["exact_counts"]
    # each weight comes whole, but for its part of `tensor`, forward and back; XLA joins small ones
    assert made["collectives"]["all-gather"]["bytes"] >= 2 * PROJECTIONS
    assert made["floor_seconds"] == pytest.approx(made["model_flops"] / 8 / 989e12)


@pytest.mark.slow
def test_a_step_on_gpus_reduces_factors_and_activations_but_no_frozen_weight(tmp_path):
    """XLA joins what is reduced in one place; in all it is as much as the factors."""
    need_cuda_plugin()
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("tensor: 2", "tensor: 1"))
    run = config.load(path)
    shape = shapes.decoder_config("tiny")
    shape = dataclasses.replace(shape, hidden_size=512, intermediate_size=1536)
    target = gpus.gpus("h100:8")
    base, step, arguments = plan.prepare(run, plan.Model(shape, "a test"), target)
    with jax.set_mesh(base.mesh):
        compiled = step.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    found = hlo.collectives(compiled.as_text())
    reduced = sum(
        math.prod(sizes)
        for one in found
        if one.kind in ("all-reduce", "reduce-scatter")
        for _, sizes in one.shapes
        for _ in range(one.executions)
    )
    factors = sum(x.size for x in jax.tree.leaves(arguments[0].trainable))
    assert reduced < 1.2 * factors
    assert compiled.memory_analysis().alias_size_in_bytes > 0.9 * plan.device_bytes(arguments[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", gpus.KINDS)
def test_every_kind_of_gpu_has_a_peak_and_compiles(run_file, kind):
    need_cuda_plugin()
    target = gpus.gpus(f"{kind}:2x2")
    assert [device.process_index for device in target.devices] == [0, 0, 1, 1]
    assert target.slices == 2
    assert hardware.peak_flops(target.kind) is not None
    model = plan.Model(shapes.decoder_config("tiny"), "tiny")
    assert plan.measure(config.load(run_file), model, target).fits


@pytest.mark.slow
def test_a_mistake_about_gpus_that_the_plugin_sees_ends_with_one_message(capsys, run_file):
    need_cuda_plugin()
    cases = [
        (["mesh.tensor=3"], ["8 devices", "Sizes that do"]),
        (["train.batch_size=6"], ["train.batch_size is 6", "multiple of 4"]),
        (["--gpus", "h100:4x2", "mesh.tensor=8"], ["8 devices in 4 slices"]),
    ]
    for arguments, words in cases:
        code, out, err = planned(capsys, run_file, *TINY_GPUS, *arguments)
        assert code == 2
        assert not out
        assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "h100"], ["'h100'", "h100:8", "h100:4x8"]),
        (["--gpus", "h100:0x8"], ["'h100:0x8'"]),
        (["--gpus", "l40:8"], ["'l40'", "a100-40g, a100-80g, h100, h200, b200"]),
        (["--gpus", "h100:32"], ["at most 8", "h100:4x8"]),
        (["--gpus", "h100:8", "--slices", "2"], ["--slices", "--topology"]),
    ],
)
def test_a_mistake_in_the_name_of_gpus_needs_no_plugin(capsys, run_file, arguments, words):
    code, out, err = planned(capsys, run_file, *arguments)
    assert code == 2
    assert not out
    assert all(word in err for word in words), err


@pytest.mark.parametrize("arguments", [[], [*TINY, "--gpus", "h100:8"]])
def test_a_plan_is_for_tpus_or_for_gpus(capsys, run_file, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", run_file, *arguments])
    assert stopped.value.code == 2
    assert "--gpus" in capsys.readouterr().err


def test_without_the_cuda_plugin_one_message_says_how_to_install_it(capsys, run_file, monkeypatch):
    def absent(*args, **options):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(gpus.topologies, "get_topology_desc", absent)
    code, _, err = planned(capsys, run_file, *TINY_GPUS)
    assert code == 2
    assert f'pip install "jax[cuda12]=={jax.__version__}"' in err


def test_the_share_of_a_gpus_memory_is_what_the_environment_says(monkeypatch, capsys, run_file):
    described = []

    def topology_of(name, platform, *, topology, target_config):
        described.append((platform, topology, target_config))
        return type("Topology", (), {"devices": jax.devices()[:2]})

    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus.topologies, "get_topology_desc", topology_of)
    whole = gpus.KINDS["a100-40g"].memory_bytes
    target = gpus.gpus("a100-40g:2x8")
    assert target.memory_bytes == int(0.75 * whole)
    assert target.more_memory == ("XLA_CLIENT_MEM_FRACTION=0.9", int(0.9 * whole))
    assert described[0][:2] == ("cuda", "1x2x8")
    assert f"device_memory_size: {whole}" in described[0][2]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    target = gpus.gpus("a100-40g:8")
    assert target.memory_bytes == int(0.95 * whole)
    assert target.more_memory is None
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    code, _, err = planned(capsys, run_file, *TINY_GPUS)
    assert code == 2
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in err


def test_attention_says_why_it_runs_without_kernels():
    def heads(length, dtype="bfloat16"):
        return jax.ShapeDtypeStruct((2, length, 4, 64), dtype)

    odd, ids = heads(129), jax.ShapeDtypeStruct((2, 129), "int32")
    assert "129" in attention.without_kernels("tpu", odd, odd)
    assert "129" in attention.without_kernels("cuda", odd, odd, segment_ids=ids)
    wide, full = heads(128), heads(128, "float32")
    assert attention.without_kernels("tpu", wide, wide) is None
    assert "soft cap" in attention.without_kernels("cuda", wide, wide, softcap=50.0)
    assert "float32" in attention.without_kernels("cuda", full, full)


def test_a_model_is_found_by_its_name_or_its_config(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"

    def found(name, shape=None):
        path.write_text(RUN.replace("some/model", str(name)))
        return plan.read_model(config.load(path), shape)

    assert found("meta-llama/Llama-3.1-70B-Instruct").config.num_layers == 80
    assert found("meta-llama/Meta-Llama-3-8B").config.hidden_size == 4096
    assert found("meta-llama/Meta-Llama-3-8B", "tiny").config.hidden_size == 64
    folder = tmp_path / "model"
    folder.mkdir()
    fields = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    assert found(folder).config.num_layers == 3


@pytest.mark.slow
def test_the_shipped_run_of_70b_fits_64_chips(capsys, run_file):
    pytest.importorskip("libtpu")
    shipped = str(CONFIGS / "lora-70b-v5p-64.yaml")
    code, out, err = planned(capsys, shipped, "--topology", "v5p:4x4x4")
    assert code == 0, err
    assert "Fits" in out
    made = json.loads(out.splitlines()[-1])
    assert 0 < made["peak_bytes"] < made["memory_bytes"]


def test_batches_of_configs_shipped_for_many_devices_divide_over_them():
    """Their models' shapes are known without a download."""
    for name, count in (("lora-70b-v5p-64", 64), ("qlora-8b-v5e-8", 8), ("lora-70b-gpus-8", 8)):
        run = config.load(CONFIGS / f"{name}.yaml")
        model = plan.read_model(run)
        assert model.config.num_layers in (32, 80)
        parts = count // (run.mesh.tensor * run.mesh.data)
        assert run.train.batch_size % (parts * run.mesh.data) == 0


def test_flops_count_windows_and_the_experts_that_a_token_meets():
    dense = shapes.decoder_config("tiny")
    assert shapes.attention_pairs(dense, 10) == 2 * 55
    windowed = dataclasses.replace(dense, sliding_window=4, sliding_layers=(True, False))
    assert shapes.attention_pairs(windowed, 10) == (1 + 2 + 3 + 4 * 7) + 55
    experts = decoder.Experts(count=4, per_token=2)
    mixed = dataclasses.replace(dense, experts=experts)
    mlp = 2 * 3 * 64 * 128  # of both layers
    more = shapes.step_flops(mixed, {}, tokens=1, pairs=0)
    more -= shapes.step_flops(dense, {}, tokens=1, pairs=0)
    assert more == 4 * (mlp + 2 * 64 * 4)  # two experts in place of one MLP, and the router


def test_a_refusal_is_read_off_the_compilers_message():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (26.30G) exceeds available HBM (15.75G)."
    )
    assert topology.out_of_memory(RuntimeError(text)) == (
        int(26.3 * 2**30),
        int(15.75 * 2**30),
    )
    assert topology.out_of_memory(RuntimeError("INTERNAL: something else")) is None


def test_advice_follows_what_is_in_the_way():
    made = made_plan()
    remat, batch = plan_report.advice(made, num_devices=8)
    assert remat.startswith("model.remat=full")
    assert batch.startswith("train.batch_size=16")
    alone = dataclasses.replace(made, num_devices=1, mesh={"data": 1, "fsdp": 1, "tensor": 1})
    assert "mesh.fsdp=-1" in plan_report.advice(alone, num_devices=8)[0]
    assert plan_report.advice(dataclasses.replace(made, fits=True), num_devices=8) == []
    near = dataclasses.replace(made, more_memory=("SHARE=0.9", 41 * 10**9))
    assert any(line.startswith("SHARE=0.9 ") for line in plan_report.advice(near, num_devices=8))
    far = dataclasses.replace(made, more_memory=("SHARE=0.9", 39 * 10**9))
    assert plan_report.advice(far, num_devices=8) == [remat, batch]
    assert hardware.find("TPU7x").per_chip == 2
