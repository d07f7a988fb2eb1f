"""Training.

step         one optimizer step, compiled once for every depth
loop         `Trainer`: the loop, checkpoints, validation, resume and rollback
folder       the run folder
fit          how much is recomputed, found by compiling the step
startup      what a run does until its first step, in seconds
reporter     metrics, progress line and skipped updates of every step
metrics      metrics.jsonl and speed
faults       updates that are not finite
preemption   signals that ask a run to stop
roofline     time and memory of a step on other hardware
"""

from rdlm.train.folder import write_curve
from rdlm.train.loop import Trainer, train
from rdlm.train.step import (
    TrainState,
    apply_gradients,
    depth_weight,
    draw_depth,
    frozen_shardings,
    gradients,
    init_state,
    layout_of,
    parameter_shardings,
    state_shardings,
    step_keys,
    train_step,
)

__all__ = [
    "TrainState",
    "Trainer",
    "apply_gradients",
    "depth_weight",
    "draw_depth",
    "frozen_shardings",
    "gradients",
    "init_state",
    "layout_of",
    "parameter_shardings",
    "state_shardings",
    "step_keys",
    "train",
    "train_step",
    "write_curve",
]
