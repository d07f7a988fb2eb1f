"""The training step of a run compiled for devices that are not here, and the upper bound of its speed."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from rdlm import sharding
from rdlm.checkpoint import as_abstract
from rdlm.config import RunConfig
from rdlm.optim import optimizer
from rdlm.perf import flops, hlo
from rdlm.train.step import frozen_shardings, layout_of, state_shardings, train_step


def lower_train_step(run: RunConfig, devices: list[Any]) -> Any:
    """The training step of `run` on a mesh of `devices`, ready to compile; batches as the loader makes them.

    Raises:
      InputError: the mesh does not divide the devices, the model or the batch.
    """
    mesh = sharding.make_mesh(run.mesh, run.model, devices)
    sharding.check_batch(mesh, run.data.batch_size, run.data.microbatches)
    layout, tx = layout_of(run, mesh), optimizer(run.optimizer, run.steps)
    shapes, shardings = state_shardings(run, tx, mesh)
    state = as_abstract(shapes, shardings)
    rows = jax.ShapeDtypeStruct(
        (run.data.batch_size, run.data.sequence_length), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions", "sequence_ids"), rows)
    step = jax.jit(
        functools.partial(train_step, run, tx, layout=layout), donate_argnums=0, out_shardings=(shardings, None)
    )
    return step.lower(state, batch, frozen=as_abstract(*frozen_shardings(run, mesh)))


def state_bytes(run: RunConfig, devices: list[Any]) -> int:
    """Bytes per device that stay from step to step: parameters, frozen ones too, and the optimizer's state."""
    mesh = sharding.make_mesh(run.mesh, run.model, devices)
    stays = state_shardings(run, optimizer(run.optimizer, run.steps), mesh), frozen_shardings(run, mesh)
    sizes = (jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, *one) for one in stays)
    return sum(jax.tree.leaves(list(sizes)))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """An estimate of one training step on one chip, from counts and datasheets, at n and k recurrences.

    seconds of arithmetic (recomputation included), of HBM traffic, and of traffic between chips; model_flops as the
    paper counts them (recomputation not at all).
    """

    compute: float
    memory: float
    interconnect: float
    model_flops: float
    recompute: float
    """FLOPs done for one that counts."""
    peak_flops: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation if the three overlap perfectly."""
        return self.model_flops / self.peak_flops / max(self.compute, self.memory, self.interconnect)

    @property
    def mfu_exposed(self) -> float:
        """The same if no communication hides behind arithmetic."""
        return self.model_flops / self.peak_flops / (max(self.compute, self.memory) + self.interconnect)


def trips(n: float, k: float) -> dict[str, float]:
    """How often each loop of a step runs."""
    return dict(zip(hlo.LOOPS, (n, k, k), strict=True))


def wire_bytes(program: hlo.Program, n: float, k: float, microbatches: int = 1) -> dict[str, float]:
    """Bytes one chip receives in a step, inside each loop of the recurrence and outside ("once").

    With microbatches, all of it lies in a loop over them, except what is summed at the end.
    """
    times = trips(n, k)
    total: dict[str, float] = dict.fromkeys((*hlo.LOOPS, "once"), 0.0)
    for collective in program.collectives():
        inside = [loop for loop in collective.loops if loop in times]
        repeated = microbatches if "other" in collective.loops else 1
        total[inside[0] if inside else "once"] += collective.wire * repeated * (times[inside[0]] if inside else 1)
    return total


def hardware_flops(run: RunConfig, n: float, k: float) -> float:
    """FLOPs per token that a step really does: model FLOPs and what the backward pass recomputes.

    With remat by iteration the forward pass of a gradient recurrence runs twice, but for the products that the stored
    sums and attention spare; by layer three times, its last layer twice. In all these cases prelude and coda run twice.
    """
    length, model = run.data.sequence_length, run.model
    core, outer = flops.core_flops(model, length), flops.outer_flops(model, length)
    remat, attention, into_sums = run.recurrence.remat, *flops.spared_flops(model, length)
    again = {
        "none": 0.0,
        "attention": core - into_sums - attention,
        "sums": core - into_sums,
        "iteration": core,
    }.get(remat, (2.0 - 1.0 / model.core_calls) * core)
    outer_again = 0.0 if remat == "none" else outer
    return flops.training_flops(model, n, k, length) + k * again + outer_again


def roofline(run: RunConfig, program: hlo.Program, device_kind: str, chips: int, n: float, k: float) -> Roofline:
    """The estimate for `program`, compiled from `lower_train_step(run, ...)` for chips of that kind.

    Raises:
      InputError: a chip whose datasheet is not known here.
    """
    chip = flops.datasheet(device_kind)
    tokens = run.data.batch_size * run.data.sequence_length / chips
    model = tokens * flops.training_flops(run.model, n, k, run.data.sequence_length)
    done = tokens * hardware_flops(run, n, k)
    times = trips(n, k) | {"once": 1.0}
    many = run.data.microbatches
    moved = sum(size * times[loop] * (many if loop != "once" else 1) for loop, size in program.traffic().items())
    received = sum(wire_bytes(program, n, k, many).values())
    return Roofline(
        done / chip.flops, moved / chip.memory, received / chip.interconnect, model, done / model, chip.flops
    )
