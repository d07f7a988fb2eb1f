"""What aot_check.py counts beside the compiler."""

import jax

from experiments.aot.options import Options
from experiments.aot.programs import bytes_on_a_chip, placed_model
from experiments.aot.serving import copies_of_pages, lanes_that_fit
from rdlm.config import CachePolicy, preset
from rdlm.decode.requests import RequestOptions
from rdlm.perf import flops
from rdlm.perf.hlo import Program


def test_lanes_that_share_pages_hold_what_their_requests_need():
    whole, shared = lanes_that_fit(free=100 * 1024, position=1, lane=0, capacity=1024, page=128)
    assert whole == 100
    # A quarter of the capacity on average, less what the capacity cuts off, and half a page more.
    assert 100 / ((256 + 64) / 1024) < shared < 1.1 * 100 / ((256 + 64) / 1024)
    assert lanes_that_fit(100 * 1024, 1, 0, 1024, 1024) == (100, 100), "control: a page for a whole lane"
    assert lanes_that_fit(100 * 1024, 1, 1024, 1024, 128) == (50, 76), "control: lanes that take as much beside them"


def test_a_lane_more_does_not_fit():
    for capacity, page in ((1000, 128), (4096, 128), (64, 32)):
        held = -(-capacity // page) * page
        whole, _ = lanes_that_fit(7 * held + held / 2, 1, 0, capacity, page)
        assert whole == 7


def test_weights_in_8_bits_take_a_byte_and_their_scales():
    config, options = preset("nano").model, RequestOptions(num_steps=4)

    def size(dtype):
        o = Options("nano", tensor=2, weight_dtype=dtype)
        params, *_ = placed_model(config, options, CachePolicy(4), o, jax.devices())
        return bytes_on_a_chip(params)

    D, F = config.embed_dim, config.mlp_dim
    scales = 4 * ((3 * D + 2 * F) / 2 + 2 * D)  # what a layer adds to the residual sum is not split
    layers = config.prelude_layers + config.core_calls + config.coda_layers
    assert size(None) - size("int8") == layers * (flops.block_matrices(config) / 2 - scales)


PROGRAM = """
%tick (s: (bf16[4096,128,128])) -> (bf16[4096,128,128]) {
  %pages = bf16[64,8,128,128]{3,2,1,0} gather(%cache, %table)
  %likeliest = f32[64,65536]{1,0} gather(%logits, %order)
}
ENTRY %main (x: bf16[4096,128,128]) -> bf16[4096,128,128] {
  %all = (bf16[4096,128,128]) while(%x), condition=%cond, body=%tick
  %once = bf16[64,8,128,128]{3,2,1,0} gather(%cache, %table)
}
"""


def test_only_pages_that_a_loop_copies_count():
    assert copies_of_pages(Program(PROGRAM, 0, 0, 0, 0), 128) == 1
    assert copies_of_pages(Program(PROGRAM.replace(", body=%tick", ""), 0, 0, 0, 0), 128) == 0
