"""What the backward pass recomputes: the same gradients, more FLOPs in less memory; and what `auto` makes of it."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import rdlm
from rdlm.config import Block, InputError, ModelConfig, preset
from rdlm.model import init_params
from rdlm.perf import flops, hlo
from rdlm.remat import LADDER
from rdlm.train import Trainer, fit
from rdlm.train.metrics import read_metrics

MODEL = ModelConfig(
    vocab_size=32, embed_dim=32, num_heads=2, mlp_dim=64, prelude_layers=1, core_layers=2, coda_layers=1,
    max_length=64, mean_recurrence=4, backprop_depth=4,
)  # fmt: skip
PARAMS = init_params(MODEL, jax.random.key(0))
ROWS = jax.random.randint(jax.random.key(1), (2, 65), 0, 32)


@pytest.fixture(scope="module")
def steps():
    """The compiled gradient of every kind, and what it returns."""

    def gradient(remat):
        def value(params):
            return rdlm.loss(params, MODEL, ROWS, steps=(2, 4), remat=remat)

        compiled = jax.jit(jax.value_and_grad(value)).lower(PARAMS).compile()
        return compiled, compiled(PARAMS)

    return {remat: gradient(remat) for remat in LADDER}


def test_the_gradient_does_not_depend_on_it(steps):
    expected = steps["none"][1]
    for remat in LADDER:
        for one, other in zip(jax.tree.leaves(steps[remat][1]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_each_computes_more_and_stores_less_than_the_one_before(steps):
    work = [steps[remat][0].cost_analysis()["flops"] for remat in LADDER]
    memory = [hlo.Program.of(steps[remat][0]).temporaries for remat in LADDER]
    assert all(less < more for less, more in itertools.pairwise(work))
    assert all(more > less for more, less in itertools.pairwise(memory[:-1]))  # a layer of this size saves nothing


def test_the_count_of_what_is_spared_is_that_of_the_products():
    D, F = 32, 64
    attention, into_sums = flops.spared_flops(MODEL, 10)
    assert attention == 2 * (2 * D * 3 * D + 4 * 10 * D)
    assert into_sums == 2 * (2 * D * D + 2 * F * D)
    branch = dataclasses.replace(MODEL, block=Block(norm_output="branch"))
    assert flops.spared_flops(branch, 10) == (attention, 0), "its norm reads the product before it is added"


def lowered_by(needs):
    """A step whose lowering compiles to a program of needs[remat] bytes beside its arguments."""

    class Lowered:
        def __init__(self, remat):
            self.remat = remat

        def lower(self, *args, **kwargs):
            return self

        def compile(self):
            if isinstance(needs[self.remat], str):
                raise jax.errors.JaxRuntimeError(needs[self.remat])
            return self

        def memory_analysis(self):
            sizes = {"argument_size": 50, "temp_size": needs[self.remat], "output_size": 50, "alias_size": 50}
            return type("Sizes", (), {f"{name}_in_bytes": size for name, size in sizes.items()})

    return lambda run: Lowered(run.recurrence.remat)


AUTO = dataclasses.replace(preset("nano"), recurrence=dataclasses.replace(preset("nano").recurrence, remat="auto"))
NEEDS = {
    "none": "RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm.",
    "attention": 500,
    "sums": 300,
    "iteration": 200,
    "layer": 100,
}


@pytest.mark.parametrize(
    ("free", "expected"), [(1000, "attention"), (320, "sums"), (110, "layer"), (None, "attention")]
)
def test_auto_takes_the_first_that_fits(free, expected, monkeypatch):
    monkeypatch.setattr(fit, "free_memory", lambda: free)
    says = []
    assert fit.fitting(AUTO, lowered_by(NEEDS), ((), {}), says.append).remat == expected
    assert says[0] == "remat auto: none needs 20.00 GiB of 15.75"
    assert says[-1].startswith(f"remat auto: {expected} fits; --recurrence.remat {expected}")


@pytest.mark.parametrize(
    "error",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes.",
        "INTERNAL: Aborting compilation early because it's unlikely to have enough memory.",
    ],
)
def test_auto_goes_on_whatever_words_say_that_memory_is_short(error, monkeypatch):
    monkeypatch.setattr(fit, "free_memory", lambda: 1000)
    says = []
    assert fit.fitting(AUTO, lowered_by(NEEDS | {"none": error}), ((), {}), says.append).remat == "attention"
    assert says[0] == f"remat auto: none does not fit: {error}"


def test_auto_says_that_nothing_fits_and_hides_no_other_error(monkeypatch):
    monkeypatch.setattr(fit, "free_memory", lambda: 99)
    with pytest.raises(InputError, match=r"recurrence.remat = 'auto': the step fits with none .*--data.microbatches"):
        fit.fitting(AUTO, lowered_by(NEEDS), ((), {}), lambda line: None)

    class Broken:
        def lower(self, *args, **kwargs):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fit.fitting(AUTO, lambda run: Broken(), ((), {}), lambda line: None)


def test_a_run_trains_with_what_auto_chose(nano_data, tmp_path, monkeypatch):
    def losses(remat, folder):
        base = preset("nano")
        run = dataclasses.replace(
            base,
            steps=3,
            run_dir=str(tmp_path / folder),
            recurrence=dataclasses.replace(base.recurrence, remat=remat),
            data=dataclasses.replace(base.data, folder=str(nano_data), batch_size=8),
        )
        says = []
        assert Trainer(run, says.append).run() == 0
        return [x["loss"] for x in read_metrics(tmp_path / folder) if "loss" in x], "\n".join(says)

    expected, _ = losses("none", "none")
    left = [0, 2**40]
    monkeypatch.setattr(fit, "free_memory", lambda: left.pop(0))
    found, said = losses("auto", "auto")
    assert "remat auto: none needs" in said
    assert "remat auto: attention fits" in said
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_loss_has_no_auto():
    with pytest.raises(InputError, match="remat = 'auto': must be one of none, attention, sums"):
        rdlm.loss(PARAMS, MODEL, ROWS, steps=(0, 1), remat="auto")
