"""HBM traffic of a token loop, read from a program's text."""

import pytest

from rdlm.perf.hlo import Program

TEXT = """
%one_set (p0: bf16[4,8,128], p1: s32[]) -> bf16[8,128] {
  %p0 = bf16[4,8,128]{2,1,0} parameter(0)
  %p1 = s32[]{:S(6)} parameter(1)
  %view = bf16[4,8,128]{2,1,0} bitcast(%p0)
  %set = bf16[1,8,128]{2,1,0} dynamic-slice(%view, %p1), dynamic_slice_sizes={1,8,128}
  ROOT %flat = bf16[8,128]{1,0} bitcast(%set)
}
%scores (q0: bf16[4,8,128], q1: s32[], q2: bf16[8,8]) -> bf16[8,128] {
  %q0 = bf16[4,8,128]{2,1,0} parameter(0)
  %q1 = s32[]{:S(6)} parameter(1)
  %q2 = bf16[8,8]{1,0} parameter(2)
  %keys = bf16[8,128]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%one_set
  ROOT %product = bf16[8,128]{1,0:S(1)} convolution(%q2, %keys), dim_labels=bf_io->bf
}
%put (u0: bf16[4,8,128], u1: s32[], u2: bf16[1,8,128]) -> bf16[4,8,128] {
  %u0 = bf16[4,8,128]{2,1,0} parameter(0)
  %u1 = s32[]{:S(6)} parameter(1)
  %u2 = bf16[1,8,128]{2,1,0:S(1)} parameter(2)
  ROOT %done = bf16[4,8,128]{2,1,0} dynamic-update-slice(%u0, %u2, %u1)
}
%skip (a: bf16[8,8]) -> bf16[8,8] {
  ROOT %a = bf16[8,8]{1,0} parameter(0)
}
%look (b: bf16[8,8]) -> bf16[8,8] {
  %b = bf16[8,8]{1,0} parameter(0)
  ROOT %c = bf16[8,8]{1,0} copy(%b)
}
%recurrence (s: (bf16[4,8,128])) -> (bf16[4,8,128]) {
  %cache = bf16[4,8,128]{2,1,0} get-tuple-element(%s), index=0
  %i = s32[]{:S(6)} get-tuple-element(%s), index=1
  %w = bf16[8,8]{1,0} get-tuple-element(%s), index=2
  %f = bf16[8,128]{1,0:S(1)} fusion(%cache, %i, %w), kind=kOutput, calls=%scores
  %k = bf16[8,8]{1,0} conditional(%i, %w, %w), branch_computations={%skip, %look}, metadata={op_name="cond"}
}
%token (t: (bf16[4,8,128])) -> (bf16[4,8,128]) {
  %t0 = bf16[4,8,128]{2,1,0} get-tuple-element(%t), index=0
  %i2 = s32[]{:S(6)} get-tuple-element(%t), index=1
  %new = bf16[1,8,128]{2,1,0:S(1)} get-tuple-element(%t), index=2
  %r = (bf16[4,8,128]) while(%t), condition=%cond, body=%recurrence, metadata={op_name="recurrence_until/while"}
  %n = bf16[4,8,128]{2,1,0} fusion(%t0, %i2, %new), kind=kLoop, calls=%put
  %asked = bf16[8,8]{1,0} conditional(%i2, %w, %w), branch_computations={%skip, %look}, metadata={op_name="sampling"}
  %far = (bf16[8,8]{1,0:S(1)}, bf16[8,8]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %near = bf16[8,8]{1,0:S(1)} copy-done(%far)
}
ENTRY %main.1 (x: bf16[4,8,128]) -> bf16[4,8,128] {
  %x = bf16[4,8,128]{2,1,0} parameter(0)
  %all = (bf16[4,8,128]) while(%x), condition=%cond, body=%token, metadata={op_name="jit(decode_tokens)/while"}
}
"""
SET, WEIGHT = 8 * 128 * 2, 8 * 8 * 2


def traffic(text):
    return Program(text, 0, 0, 0, 0).decoding_traffic()


def test_a_slice_and_an_update_in_place_count_and_not_the_whole_cache():
    found = traffic(TEXT)
    scalar = 4
    assert found["recurrence"] == SET + scalar + WEIGHT, "one set of the cache, and the weights"
    assert found["check"] == 2 * WEIGHT, "only what a check runs"
    assert found["token"] == SET + scalar + WEIGHT + scalar, "the update, and the copy into fast memory"


@pytest.mark.parametrize(
    ("old", "new", "part", "more"),
    [
        ("dynamic-slice(%view", "copy(%view", "recurrence", 3 * SET),
        ("dynamic-update-slice(%u0", "select(%u0", "token", 3 * SET + 4 * SET),
        ("bf16[8,128]{1,0:S(1)} convolution", "bf16[8,128]{1,0} convolution", "recurrence", SET),
    ],
)
def test_control_what_is_read_or_written_whole_counts_whole(old, new, part, more):
    assert old in TEXT
    assert traffic(TEXT.replace(old, new))[part] - traffic(TEXT)[part] == more


def test_a_recurrence_of_a_window_counts_once_however_many_an_outer_step_has():
    known = 'op_name="recurrence_window/while"}, backend_config={"known_trip_count":{"n":"4"}}'
    window = TEXT.replace('op_name="recurrence_until/while"}', known)
    assert window != TEXT
    assert traffic(window) == traffic(TEXT)
    assert traffic(window.replace("recurrence_window", "other"))["token"] > 4 * traffic(TEXT)["recurrence"]


FLUSH = (
    "  %flush = bf16[8,8]{1,0} conditional(%i, %w, %w), branch_computations={%skip, %look}, "
    'metadata={op_name="while/body/lanes_flush/cond"}\n'
)
LANES = (
    TEXT.replace(', metadata={op_name="recurrence_until/while"}', "")
    .replace("while(%x), condition=%cond, body=%token", "while(%x), condition=%cond, body=%recurrence")
    .replace("calls=%scores\n", 'calls=%scores, metadata={op_name="while/body/lanes_tick/dot"}\n' + FLUSH)
)


def test_of_the_engine_a_tick_a_check_and_a_flush_count_apart():
    found = traffic(LANES)
    assert found == {"recurrence": SET + 4 + WEIGHT, "check": 2 * WEIGHT, "token": 2 * WEIGHT}
    assert traffic(LANES.replace("lanes_flush", "other"))["check"] == 4 * WEIGHT  # control


def test_collectives_are_counted_where_they_run():
    gather = "%g = bf16[8,32]{1,0} all-gather(%w), replica_groups={{0,1,2,3}}, dimensions={1}"
    text = LANES.replace("ROOT %c = bf16[8,8]{1,0} copy(%b)", f"{gather}\n  ROOT %c = bf16[8,8]{{1,0}} copy(%b)")
    found = Program(text, 0, 0, 0, 0).decoding_collectives()
    assert [(part, [(x.kind, x.size, x.group) for x in of]) for part, of in found.items()] == [
        ("recurrence", []), ("check", [("all-gather", 512, 4)]), ("token", [("all-gather", 512, 4)])
    ]  # fmt: skip


def test_a_kernel_counts_what_it_says_it_reads():
    kernel = (
        '%f = bf16[8,128]{1,0} custom-call(%cache, %i), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"9","bytes_accessed":"1000"}}}'
    )
    line = next(line for line in TEXT.splitlines() if "calls=%scores" in line)
    assert traffic(TEXT.replace(line, kernel))["recurrence"] == 1000 + 8 * 128 * 2
    unsaid = kernel.replace("bytes_accessed", "other")
    assert traffic(TEXT.replace(line, unsaid))["recurrence"] > 4 * SET  # control: the whole cache


def test_control_a_loop_without_its_scope_is_no_recurrence():
    assert traffic(TEXT.replace("recurrence_until", "other"))["recurrence"] == 0
