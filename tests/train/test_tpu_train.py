"""Training steps compiled for a real TPU: what the chips tell each other, and when. Needs libtpu; no numerics."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from compilation import all_passes
from jax.sharding import NamedSharding, PartitionSpec

from rdlm.config import MeshConfig, preset
from rdlm.perf import hlo
from rdlm.perf.hlo import LOOPS, Collective, Program
from rdlm.sharding import Layout, make_mesh
from rdlm.train.roofline import hardware_flops, lower_train_step, roofline, wire_bytes

BASE = preset("huginn_3p5b")
# As ragged as the published model's width: some lanes of 128 and a quarter of one. Long enough for the fused kernel.
D, H, F = 288, 3, 256
MODEL = dataclasses.replace(
    BASE.model, embed_dim=D, num_heads=H, mlp_dim=F, vocab_size=512, padded_vocab_size=None,
    prelude_layers=1, core_layers=1, coda_layers=1,
)  # fmt: skip

CORE = D * (3 * D + D + 3 * F + 2 * D) * 2  # bytes of the core block and the adapter in bf16


def run_with(gather, remat="layer"):
    data = dataclasses.replace(BASE.data, tokenizer_size=512, batch_size=4, sequence_length=256)
    recurrence = dataclasses.replace(BASE.recurrence, remat=remat)
    return dataclasses.replace(
        BASE, model=MODEL, data=data, recurrence=recurrence, mesh=MeshConfig(1, 4, gather=gather)
    )


@pytest.fixture(scope="module", autouse=True)
def as_on_a_pod():
    with all_passes():
        yield


@pytest.fixture(scope="module")
def programs():
    pytest.importorskip("libtpu")
    devices = hlo.tpu_devices("v5e:2x2")
    return {gather: hlo.compile_program(lower_train_step(run_with(gather), devices)) for gather in ("once", "each")}


def inside(program):
    return {loop: sum(loop in c.loops for c in program.collectives()) for loop in LOOPS}


@pytest.mark.slow
def test_gathered_once_nothing_travels_inside_the_recurrence(programs):
    assert inside(programs["once"]) == dict.fromkeys(LOOPS, 0)
    gathered = sum(c.size for c in programs["once"].collectives() if c.kind == "all-gather")
    assert gathered >= CORE
    few, many = (sum(wire_bytes(programs["once"], n, 8).values()) for n in (0, 40))
    assert few == many, "bytes between chips do not depend on the depth"


def received(mesh, reduce):
    """Kinds of collectives, and bytes that a chip receives for one of the gradient that `reduce` sums."""
    size, whole = 2 * 1040 * 1024, PartitionSpec(mesh.axis_names)
    run = jax.shard_map(reduce, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    every = jax.ShapeDtypeStruct((mesh.size * 1040, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, whole))
    found = hlo.compile_program(jax.jit(run).lower(every)).collectives()
    return {c.kind for c in found}, sum(c.wire for c in found) / size


# All 16 chips split the width, or 8 of them, and the other 2 the other dimension. One matrix, or two in one array.
@pytest.mark.parametrize(("width", "matrices"), [(1040, 1), (1032, 1), (1032, 2)])
def test_a_gradient_is_reduce_scattered_over_a_whole_pod(width, matrices):
    """Each chip receives it once. The control sums over all chips at once, which is an all-reduce: twice."""
    pytest.importorskip("libtpu")
    model = dataclasses.replace(MODEL, embed_dim=width, num_heads=4)
    mesh = make_mesh(MeshConfig(1, 16), model, hlo.tpu_devices("v5e:4x4"))
    spec = PartitionSpec(None, "fsdp", "rest" if mesh.shape["rest"] > 1 else None)
    layout = Layout(mesh, {"wfc": spec}, jnp.bfloat16)
    kinds, times = received(mesh, lambda g: layout.reduce_scatter({"wfc": g.reshape(matrices, -1, 1024)})["wfc"])
    assert "reduce-scatter" in kinds
    assert "all-reduce" not in kinds
    assert times < 1.1
    kinds, times = received(mesh, lambda g: jax.lax.psum_scatter(g.reshape(16, 65, 1024), ("fsdp", "rest")))
    assert kinds == {"all-reduce"}
    assert times > 1.8


@pytest.mark.slow
def test_control_plain_fsdp_travels_in_every_loop(programs):
    assert all(count >= 3 for count in inside(programs["each"]).values())
    few, many = (sum(wire_bytes(programs["each"], n, 8).values()) for n in (0, 40))
    assert many - few == 40 * CORE * 3 / 4, "the three quarters of the core that other chips hold, every recurrence"


@pytest.mark.slow
def test_the_fused_kernel_is_in_every_loop_and_no_scores_are(programs):
    text = programs["once"].text
    assert "splash" in text
    assert f"[1,{H},256,256]" not in text, "scores of all heads are held"


@pytest.mark.slow
def test_what_is_stored_spares_the_backward_pass_the_forward_kernel(programs):
    """Stored, each backward pass runs its two kernels alone; the control, by layer, the forward one again."""
    stored = hlo.compile_program(lower_train_step(run_with("once", "none"), hlo.tpu_devices("v5e:2x2")))
    assert inside(stored) == dict.fromkeys(LOOPS, 0)
    kernels = {p: p.text.count('custom_call_target="tpu_custom_call"') for p in (stored, programs["once"])}
    forward, backward = 4, 2 * 3  # in prelude, free recurrence, recurrence and coda; in all of these but the free one
    assert kernels[stored] == forward + backward
    assert kernels[programs["once"]] == forward + backward + 3


@pytest.mark.slow
def test_offloaded_states_wait_in_the_memory_of_the_host(programs):
    offloaded = hlo.compile_program(lower_train_step(run_with("once", "offload"), hlo.tpu_devices("v5e:2x2")))
    states = rf"bf16\[8,1,256,{D}\]\{{[^}}]*S\(5\)\}}"  # one for each gradient step; S(5) is the host's
    assert re.search(states, offloaded.text)
    assert not re.search(states, programs["once"].text)


@pytest.mark.slow
def test_the_estimate_adds_up(programs):
    estimate = roofline(run_with("once"), programs["once"], "TPU v5 lite", 4, 25, 8)
    assert estimate.interconnect * 200e9 == pytest.approx(sum(wire_bytes(programs["once"], 25, 8).values()))
    assert 0 < estimate.mfu_exposed <= estimate.mfu < 1
    assert estimate.recompute == pytest.approx(
        hardware_flops(run_with("once"), 25, 8) * 256 / estimate.model_flops, rel=1e-6
    )


# What is read from a program's text

TEXT = """
%starting (p: bf16[8,16]) -> bf16[32,16] {
  %g.1 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}
%async_collective_fusion.3 (p: bf16[8,16]) -> bf16[32,16] {
  %g.2 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}
%ending (p: bf16[8,16]) -> bf16[32,16] {
  %g.3 = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}
%all-reduce-scatter.4 (p: f32[8]) -> f32[4] {
  %a.1 = f32[8]{0} all-reduce(%p), channel_id=9, replica_groups=[2,2]<=[4], to_apply=%add
}
%body (s: bf16[8,16]) -> bf16[8,16] {
  START_INSIDE
  %f = bf16[32,16]{1,0} fusion(%s), kind=kCustom, calls=%async_collective_fusion.3
  %r = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.4
}
ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  START_OUTSIDE
  %w = bf16[8,16] while(%a), condition=%cond, body=%body, metadata={op_name="jit(f)/recurrence_free/while"}
  %async-collective-done.1 = bf16[32,16]{1,0} fusion(%w), kind=kCustom, calls=%ending
  %b = (bf16[8,16], bf16[32,16]) all-gather-start(%a), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
  %c = f32[2,3]{1,0} reduce-scatter(%d), channel_id=11, replica_groups=mesh['x'=4,'y'=2] {'x'}, dimensions={0}
}
"""
START = "%async-collective-start.1 = bf16[32,16]{1,0} fusion(%a), kind=kCustom, calls=%starting"


def read(text):
    return Program(text, 0, 0, 0, 0).collectives()


@pytest.mark.parametrize("where", ["INSIDE", "OUTSIDE"])
def test_collectives_are_read_with_the_loops_they_start_in(where):
    found = read(TEXT.replace(f"START_{where}", START))
    assert found == [
        Collective("all-gather", 1024, 4, ("recurrence_free",) if where == "INSIDE" else ()),
        Collective("reduce-scatter", 32, 2, ("recurrence_free",)),
        Collective("all-gather", 1024, 4, ()),
        Collective("reduce-scatter", 96, 4, ()),
    ]
    assert [c.wire for c in found] == [768, 16, 768, 72]


@pytest.mark.parametrize(
    "odd",
    [
        "  %z = bf16[4]\n  all-gather(%a), channel_id=12",  # broken over lines
        "  %z = bf16[4]{0} all-gather(%a), channel_id=12, replica_groups=something_new",
    ],
)
def test_control_nothing_is_left_out_in_silence(odd):
    with pytest.raises(ValueError, match=r"collectives in the program|unknown groups"):
        read(TEXT + "%more (a: bf16[4]) -> bf16[4] {\n" + odd + "\n}\n")


# What fits


def memory(each, limit, saved_from=10**9):
    """12 GiB and `each` per sequence; from `saved_from` sequences on, half of it, as if the compiler took trouble."""
    tried = []

    def peak(batch):
        tried.append(batch)
        needed = 12 + each * batch * (0.5 if batch >= saved_from else 1.0)
        if needed > limit:
            raise hlo.DoesNotFit(needed, limit)
        return needed

    return peak, tried


@pytest.mark.parametrize(
    ("each", "limit", "saved_from", "first", "expected", "most_tries"),
    [
        (1.5, 95, 10**9, 1, 55, 4),
        (1.5, 15.75, 10**9, 1, 2, 3),
        (1.5, 95, 50, 1, 110, 12),
        (1.5, 95, 10**9, 200, 55, 9),
        (4.0, 15, 10**9, 1, 0, 1),
    ],
)
def test_the_largest_batch_is_found_with_few_tries(each, limit, saved_from, first, expected, most_tries):
    peak, tried = memory(each, limit, saved_from)
    assert hlo.largest_batch(peak, limit, first) == expected
    assert len(tried) <= most_tries


def test_out_of_memory_is_told_from_other_errors():
    message = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries ({}) exceeds available HBM (95.73G)."
    )
    assert hlo.out_of_memory(message.format("4.86T")) == (4.86 * 1024, 95.73)
    assert hlo.out_of_memory(message.format("99.5G")) == (99.5, 95.73)
    assert hlo.out_of_memory("Ran out of memory in memory space hbm. Used 17.2G of 15.75G hbm.") == (17.2, 15.75)
    assert hlo.out_of_memory("INTERNAL: something else") is None
