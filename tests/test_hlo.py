"""Collectives of a program that this machine compiles, and in the ways a TPU spells them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from jlora import hlo
from jlora.hlo import Collective, Total


def test_a_compiled_program_is_counted_with_its_loops():
    mesh = Mesh(jax.devices(), ("x",))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"),
        check_vma=False,
    )  # fmt: skip
    def run(x):  # float32[4 16] on each of 8 devices
        def inner(x, _):
            return jax.lax.ppermute(jnp.sin(x), "x", [(i, (i + 1) % 8) for i in range(8)]), None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, length=3)
            return jax.lax.psum(x, "x") / 8 + x, None

        x, _ = jax.lax.scan(outer, x, length=5)
        return jax.lax.all_gather(x, "x").sum(axis=0)

    found = hlo.collectives(jax.jit(run).lower(jnp.ones((32, 16))).compile().as_text())
    assert sorted((one.kind, one.executions, one.shapes) for one in found) == [
        ("all-gather", 1, (("f32", (8, 4, 16)),)),
        ("all-reduce", 5, (("f32", (4, 16)),)),
        ("collective-permute", 15, (("f32", (4, 16)),)),
    ]
    assert all(one.is_exact for one in found)
    assert hlo.totals(found)["all-reduce"] == Total(1, 5, 5 * 4 * 16 * 4)
    assert next(iter(hlo.totals(found))) == "collective-permute"  # 15 of 256 bytes, the most


# As libtpu 0.0.42 prints it, shortened.
TPU = """\
HloModule jit_step, is_scheduled=true

%async_collective_fusion.1 (p: bf16[2,64]) -> bf16[8,64] {
  %p = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
}

%async_collective_fusion.2 (p.1: bf16[2,64]) -> bf16[8,64] {
  %p.1 = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, dimensions={0}
}

%all-reduce-scatter.3 (p.2: f32[8,64]) -> f32[2,64] {
  %p.2 = f32[8,64]{1,0} parameter(0)
  ROOT %all-reduce.9 = f32[2,64]{1,0} all-reduce(%p.2), channel_id=9, to_apply=%add
}

%body (arg: (s32[], bf16[2,64])) -> (s32[], bf16[2,64]) {
  %a = bf16[8,64] fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %kernel = f32[4]{0} custom-call(%a), custom_call_target="tpu_custom_call", metadata="first
} a line that begins with a brace
}%another"
  %b = bf16[8,64] fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %c = f32[2,64] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
  %s.1 = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%z), channel_id=7
  %s.2 = bf16[4,8]{1,0} collective-permute(%z), channel_id=7
}

%condition (arg.1: (s32[], bf16[2,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(80)
  ROOT %compare = pred[] compare(%i, %bound), direction=LT
}

%unknown (arg.2: (s32[], bf16[2,64])) -> pred[] {
  ROOT %other = pred[] compare(%i, %n), direction=NE
}

%once (arg.3: (s32[], bf16[2,64])) -> (s32[], bf16[2,64]) {
  %r = (f32[], f32[3]{0}) all-reduce(%l, %m), channel_id=12, to_apply=%add
}

ENTRY %main (p.3: bf16[2,64]) -> bf16[2,64] {
  %w = (s32[], bf16[2,64]) while(%t), condition=%condition, body=%body
  %v = (s32[], bf16[2,64]) while(%w), condition=%unknown, body=%once
  %g = ((bf16[2,4], s4[2]), (bf16[8,4], s4[8])) all-gather-start(%q), channel_id=13
  %d = (bf16[8,4], s4[8]) all-gather-done(%g)
}
"""


def test_the_ways_a_tpu_spells_them():
    assert hlo.collectives(TPU) == [
        Collective("all-gather", (("bf16", (8, 64)),), 80),  # twice in the text, one channel
        Collective("reduce-scatter", (("f32", (2, 64)),), 80),
        Collective("collective-permute", (("bf16", (4, 8)),), 80),
        Collective("collective-permute", (("bf16", (4, 8)),), 80),
        Collective("all-reduce", (("f32", ()), ("f32", (3,))), 1, is_exact=False),
        Collective("all-gather", (("bf16", (8, 4)), ("s4", (8,))), 1),
    ]
    assert hlo.totals(hlo.collectives(TPU))["all-gather"] == Total(2, 81, 80 * 1024 + 64 + 4)


@pytest.mark.parametrize(
    ("dtype", "size"), [("pred", 10), ("bf16", 20), ("f8e4m3fn", 10), ("u4", 5), ("c64", 80)]
)
def test_bytes_are_those_of_the_dtype(dtype, size):
    assert Collective("all-gather", ((dtype, (2, 5)),), 3).bytes == 3 * size
