"""Decoding compiled for a real TPU: nothing turns or copies the cache. Needs libtpu; proves no numerics."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import all_passes
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from rdlm import exits
from rdlm.config import CachePolicy, preset
from rdlm.decode.lanes import Flush, advance, empty_lanes
from rdlm.decode.loop import Sizes, decode_tokens, progress_shapes
from rdlm.decode.pages import page_sizes
from rdlm.decode.passes import decode_step
from rdlm.decode.requests import RequestOptions, as_requests
from rdlm.model import cast, init_params, kernels
from rdlm.model.cache import allocate, stored_width
from rdlm.perf import flops, hlo

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

# The published model's ragged width, with fewer and thinner layers. At 1,024 positions the compiler would rather have
# positions last, as at full size.
SHAPE = {"embed_dim": 1056, "num_heads": 11, "mlp_dim": 512, "vocab_size": 512, "padded_vocab_size": None}
CONFIG = dataclasses.replace(
    preset("huginn_3p5b").model, **SHAPE, prelude_layers=1, core_layers=2, coda_layers=1, compute_dtype="bfloat16"
)
B, T, R, POLICY = 16, 1024, 32, CachePolicy(4)
SET = B * T * 1056 * 2  # bytes of one set of one layer's keys


@pytest.fixture(scope="module", autouse=True)
def as_on_a_pod():
    with all_passes():
        yield


@pytest.fixture(scope="module")
def place():
    return SingleDeviceSharding(hlo.tpu_devices("v5e:2x2")[0])


def lowered(place, lanes, policy=POLICY):
    """Adaptive decoding with a KL exit at mixed depths, in lock-step or in lanes."""
    params = jax.eval_shape(lambda: cast(init_params(CONFIG, jax.random.key(0)), jnp.bfloat16))
    request = as_requests(CONFIG, [[1]] * B, 16, RequestOptions(num_steps=R, exit_rule=exits.kl()))[0]

    numbers = jnp.int32(0), jnp.int32(0)
    if lanes:
        sizes, pages = Sizes(policy, 4, T, 64), page_sizes(B, T, platform="tpu")
        state = jax.eval_shape(lambda p, r: empty_lanes(p, CONFIG, r, sizes, pages), params, request)
        params, *rest = hlo.specs((params, state, jnp.zeros(B, jnp.int32), *numbers), place)
        return advance.lower(params, CONFIG, *rest, Flush(width=4, every=4), False)
    progress = progress_shapes(params, CONFIG, request, Sizes(policy, 4, T, T))
    params, *rest = hlo.specs((params, progress, request, *numbers), place)
    return decode_tokens.lower(params, CONFIG, *rest, False)


def slices(program):
    """Operations whose result is one set of a layer's keys or values for all rows, in pages or not."""
    made = rf"= bf16\[{B},({T}|\d+,128),{stored_width(1056)}\]\S* (fusion|copy|gather|dynamic-slice)\("
    return len(re.findall(made, program.text))


@pytest.mark.parametrize("lanes", [False, True], ids=["lock-step", "lanes"])
def test_no_program_copies_the_cache(place, lanes):
    program = hlo.compile_program(lowered(place, lanes))
    core = 4 * SET
    assert not program.copies(core), "a whole layer of the cache is copied"
    assert program.shared >= flops.cache_bytes(CONFIG, POLICY, R, B, T, 2), "the cache is not updated in place"
    assert program.peak <= flops.datasheet(hlo.tpu_devices("v5e:2x2")[0].device_kind).gib * 2**30
    assert not slices(program), "a set of a layer is copied before it is read"
    assert not program.copies(SET // 2, ("gather",))
    moved, least = program.decoding_traffic(), flops.Decoding(B, R, R, T).parts(CONFIG, 2)
    if not lanes:  # whose caches, small as they are here, are moved into the chip's own memory and back
        # One set is read, and counted, of four; some of it may stay in the chip's own memory.
        assert 0.85 < moved["recurrence"] / least["recurrence"] < 1.15
    assert moved["check"] > 0
    assert moved["token"] > 0


def test_in_8_bits_pages_are_updated_in_place_and_copied_in_8_bits(place):
    policy = dataclasses.replace(POLICY, dtype="int8")
    program = hlo.compile_program(lowered(place, True, policy))
    assert program.shared >= flops.cache_bytes(CONFIG, policy, R, B, T, 2), "the cache is not updated in place"
    pages, read = f"s8[{B},{T // 128},128,{stored_width(11 * (96 + 2))}]", CONFIG.core_calls + CONFIG.coda_layers
    assert program.copies(SET // 2, ("gather",)) == {(True, pages): 2 * read}


def test_a_program_of_the_user_runs_on_several_chips():
    # The kernel cannot be split by the compiler, so such a program does without it.
    mesh = Mesh(np.array(hlo.tpu_devices("v5e:2x2")), ("data",))
    small = dataclasses.replace(CONFIG, core_layers=1, coda_layers=0)
    params = jax.eval_shape(lambda: cast(init_params(small, jax.random.key(0)), jnp.bfloat16))
    cache = jax.eval_shape(lambda: allocate(small, POLICY, 4, 4, T, jnp.bfloat16))
    given = hlo.specs((params, cache, jnp.zeros(4, jnp.int32)), NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(lambda params, cache, token: decode_step(params, small, cache, token, 4))
    hlo.compile_program(step.lower(*given))


@pytest.mark.parametrize("lanes", [False, True], ids=["lock-step", "lanes"])
def test_without_the_kernel_sets_are_copied(place, monkeypatch, lanes):
    monkeypatch.setattr(kernels, "fits_stored", lambda *shapes: False)
    jax.clear_caches()
    assert slices(hlo.compile_program(lowered(place, lanes)))
    jax.clear_caches()


def test_control_a_cache_with_ragged_columns_is_copied(place, monkeypatch):
    monkeypatch.setattr("rdlm.model.cache.stored_width", lambda width: width)
    jax.clear_caches()
    program = hlo.compile_program(lowered(place, lanes=False))
    jax.clear_caches()
    assert sum(program.copies(4 * SET).values()) >= 2


def test_an_unknown_topology_is_one_line():
    with pytest.raises(ValueError, match="topology = 'v9z:1x1'") as error:
        hlo.tpu_devices("v9z:1x1")
    assert "\n" not in str(error.value)
