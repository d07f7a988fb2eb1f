"""The self-test names what is wrong with a machine, and nothing else."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script
from golden_cases import LOGITS, cases, model

from rdlm import selftest
from rdlm.config import InputError
from rdlm.model import blocks, kernels
from rdlm.model.attention import softmax_attention
from rdlm.perf.flops import Chip
from rdlm.selftest import Check, Peaks

TINY = dataclasses.replace(selftest.QUICK, heads=((2, 8),))
PEAKS = Peaks(1e9, 1e9, None)
GPUS = Peaks(1e9, 1e9, Chip(1e9, 1e9, 100e9, 1))


def failed(checks):
    return [check.name for check in checks if check.verdict == "FAILED"]


# Numbers


def test_the_plain_model_is_the_public_reference():
    params, config = model("A")
    arrays = cases("A")["forward_zero_state"]["arrays"]
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for row, right in zip(arrays["input_ids"], arrays["logits_r4"], strict=True):
        np.testing.assert_allclose(selftest.plain_logits(config, w, row, 4), right, **LOGITS)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


def test_numbers_are_right_here(one_device):
    found = list(selftest.numbers())
    assert [check.verdict for check in found] == ["ok"] * 3
    assert found[0].value < 1e-5


def test_a_wrong_rope_base_is_named(one_device, monkeypatch):
    right = blocks.rotary_frequencies
    monkeypatch.setattr(
        blocks, "rotary_frequencies", lambda config: right(dataclasses.replace(config, rope_base=config.rope_base / 5))
    )
    # Another config, so that no program compiled before is used.
    monkeypatch.setattr(selftest, "GOLDEN", dataclasses.replace(selftest.GOLDEN, max_length=127))
    names = ["logits, float32, device 0", "logits, bfloat16, device 0", "greedy tokens, device 0"]
    assert failed(selftest.numbers()) == names


def test_wrong_kernels_are_named_and_no_others(monkeypatch):
    assert failed(selftest.kernel_checks(TINY)) == []
    flat, trained, flash = kernels.attend_flat, kernels.attend_in_training, kernels.attend_flash
    stored, in_blocks, filled = kernels.attend_stored, kernels._in_blocks, kernels.attend_filled

    def wrong_gradient(q, k, v, bias):  # the value is right
        out = trained(q, k, v, bias)
        return 1.01 * out - jax.lax.stop_gradient(0.01 * out)

    monkeypatch.setattr(kernels, "attend_in_training", wrong_gradient)
    monkeypatch.setattr(kernels, "attend_flash", lambda q, k, v, ids, **o: flash(q, k, v, jnp.ones_like(ids), **o))
    monkeypatch.setattr(kernels, "attend_flat", lambda q, new, old: flat(q, old))
    monkeypatch.setattr(
        kernels, "attend_stored", lambda q, new, held, *a, **o: stored(q, new, held._replace(set=0 * held.set), *a, **o)
    )
    monkeypatch.setattr(kernels, "_in_blocks", lambda *given: in_blocks(*given[:-1], given[-1] - kernels.FILLED))
    monkeypatch.setattr(kernels, "attend_filled", lambda *given: filled(*given))  # JAX keeps traces of a function
    monkeypatch.setattr(kernels, "after", lambda reads, mask: ~mask)
    assert failed(selftest.kernel_checks(TINY)) == [
        "attend_in_training, 2 heads of 8",
        "attend_flash, 2 heads of 8",
        "attend_cached, 2 heads of 8",
        "attend_stored, 2 heads of 8",
        "attend_copied, 2 heads of 8",
        "attend_filled, 2 heads of 8",
        "attend_flat, 2 heads of 8",
        "row_major, updated_in_place, after",
    ]


def test_the_plain_twin_is_softmax_attention_over_both_parts():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 8, 2, 8)) for i in range(3))
    ours = jax.jit(selftest.over_cache(softmax_attention))(q, k, v, q).reshape(2, 2, 8)
    q, k, v = (np.asarray(x) for x in (q, k, v))
    for row, seen in enumerate([[0, 1, 2, 3, 4, 5, 7], [7, 6, 0]]):  # the last one is the query
        for h in range(2):
            p = np.exp(q[0, seen[-1], h] @ k[0, seen, h].T / 8**0.5)
            np.testing.assert_allclose(ours[row, h], p @ v[0, seen, h] / p.sum(), rtol=1e-5)


def test_one_bit_changes_the_sum_of_all_bits():
    x = jnp.arange(5.0)
    changed = [x, x.at[3].set(jnp.nextafter(x[3], 9.0))]
    assert len({int(selftest.bits({"a": y, "b": x.astype(jnp.bfloat16)})) for y in changed}) == 2


def test_training_and_its_bits():
    checks = {check.name: check for check in selftest.training("nano", TINY, PEAKS, twice=True)}
    assert failed(checks.values()) == []
    assert checks["training nano, first loss"].value == pytest.approx(math.log(384), abs=0.5)
    assert checks["training nano, 64 tokens a device"].value > 0
    assert checks["training nano, bits of two runs"].value == 1
    assert "predicted" in checks["training nano, memory"].note


# Speed


def taking(monkeypatch, *times):
    """Let every run take the next of these times."""
    clock = itertools.cycle(times)

    def seconds(run):
        jax.block_until_ready(run())
        return next(clock)

    monkeypatch.setattr(selftest, "seconds", seconds)


def test_decoding_far_below_its_roofline_is_named(monkeypatch):
    demanding = dataclasses.replace(TINY, speeds=True)
    taking(monkeypatch, 2e-3, 1e-3)  # 1 ms for four tokens of two rows
    fast = list(selftest.decoding(demanding, Peaks(1e9, 1e9, None)))
    assert failed(fast) == []
    assert fast[0].value == pytest.approx(8000)
    slow = selftest.decoding(demanding, Peaks(1e15, 1e15, None))
    assert failed(slow) == ["decoding nano, 2 rows, r = 4"]


def test_a_halved_interconnect_is_named(monkeypatch):
    monkeypatch.setattr(selftest.flops, "links", lambda coordinates, axes: 1.0)
    monkeypatch.setattr(jax, "devices", lambda: [Located(i) for i in range(8)])
    size = selftest.QUICK.copied / 4 * 7 / 8 / 100e9  # seconds of an all-gather at 100 GB/s
    taking(monkeypatch, size, 2 * size)
    found = list(selftest.interconnect(TINY, GPUS))
    assert [check.verdict for check in found] == ["ok", "ok"]
    assert [check.value for check in found] == pytest.approx([100, 100])
    taking(monkeypatch, 2 * size, 4 * size)
    names = ["interconnect, all-gather over 8", "interconnect, all-reduce over 8"]
    assert failed(selftest.interconnect(TINY, GPUS)) == names
    assert failed(selftest.interconnect(TINY, PEAKS)) == [], "no datasheet, no expectation"


@dataclasses.dataclass
class Located:
    """Where a device is."""

    index: int

    @property
    def coords(self):
        return self.index, 0, 0


def test_the_largest_preset_fits_in_memory_and_time(monkeypatch):
    tried = []
    monkeypatch.setattr(selftest, "training", lambda name, *_, **__: iter(tried.append(name) or ()))
    monkeypatch.setattr(selftest, "free_memory", lambda: 200 * 2**30)
    each = 12 / len(jax.devices())  # bytes per parameter, instead of tracing the largest models
    monkeypatch.setattr(selftest, "state_bytes", lambda run, devices: each * selftest.flops.parameters(run.model))
    small = dataclasses.replace(selftest.CPU, preset="small")
    fast = Peaks(1e18, 1e18, None)
    assert failed(selftest.largest(small, fast, 600)) == []
    monkeypatch.setattr(selftest, "free_memory", lambda: 8 * 2**30)
    assert failed(selftest.largest(small, fast, 600)) == []
    (none,) = selftest.largest(small, PEAKS, 1)
    assert tried[0].startswith("huginn")
    assert "huginn" not in tried[1]
    assert none.verdict == "skipped"


# The command


@pytest.mark.parametrize(
    ("value", "least", "most", "verdict"),
    [
        (None, 1, None, "skipped"),
        (2, None, None, "-"),
        (2, 1, 3, "ok"),
        (0.5, 1, None, "FAILED"),
        (4, 1, 3, "FAILED"),
        (math.nan, 1, None, "FAILED"),
        (math.nan, None, 1, "FAILED"),
    ],
)
def test_verdicts(value, least, most, verdict):
    assert Check("x", value, least=least, most=most).verdict == verdict


@pytest.mark.parametrize("kind", [RuntimeError, AttributeError, ZeroDivisionError])
def test_a_check_that_ends_with_an_error_has_failed_and_the_next_begins(kind, monkeypatch):
    def broken():
        raise kind("no such\ndevice")

    for name in ("training", "decoding", "interconnect"):
        monkeypatch.setattr(selftest, name, lambda *_, **__: iter(()))
    monkeypatch.setattr(selftest, "machine", lambda sizes: (PEAKS, []))
    monkeypatch.setattr(selftest, "kernel_checks", lambda sizes: iter([Check("late", 1, least=1)]))
    monkeypatch.setattr(selftest, "numbers", broken)
    said = []
    found = selftest.every_check(TINY, 0, said.append)
    assert failed(found) == ["numbers"]
    assert found[0].note == f"{kind.__name__}: no such device"
    assert found[-1].name == "late"
    assert len(said) == 6


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_writes_a_page_and_exits_by_what_failed(wrong, monkeypatch, tmp_path, capsys):
    checks = [Check("fine", 2.0, "GB/s", least=1), Check("odd <b>", 0.5 if wrong else 1.5, least=1, note="a note")]
    monkeypatch.setattr(selftest, "every_check", lambda *_: list(checks))
    command = script("selftest")
    monkeypatch.setattr("sys.argv", ["selftest.py", "--quick", "--out", str(tmp_path)])
    assert command.main() == int(wrong)
    text, page = (tmp_path / "report.txt").read_text(), (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "report.json").read_text())
    assert text in capsys.readouterr().out
    assert found["failed"] == (["odd <b>"] if wrong else [])
    assert found["checks"][0] == {
        "name": "fine", "value": 2.0, "unit": "GB/s", "least": 1, "most": None, "note": "", "verdict": "ok"
    }  # fmt: skip
    assert found["versions"]["jax"] == jax.__version__
    assert ("1 FAILED: odd <b>." in text) == wrong
    assert "odd &lt;b&gt;" in page
    assert "<b>" not in page


def test_the_page_is_shown_where_it_cannot_be_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(selftest, "every_check", lambda *_: [Check("slow", 2.0, "GB/s", least=1)])
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["selftest.py", "--out", str(tmp_path / "file")])
    with pytest.raises(InputError, match="cannot be written"):
        script("selftest").main()
    assert "1 checks in" in capsys.readouterr().out
