"""Training: one compiled step for every depth (step), the loop around it (loop), and when to stop (stopping)."""

from rdlm.train.loop import Trainer, train, write_curve
from rdlm.train.step import (
    TrainState,
    depth_weight,
    draw_depth,
    gradients,
    init_state,
    layout_of,
    state_shardings,
    step_keys,
    train_step,
)

__all__ = [
    "TrainState",
    "Trainer",
    "depth_weight",
    "draw_depth",
    "gradients",
    "init_state",
    "layout_of",
    "state_shardings",
    "step_keys",
    "train",
    "train_step",
    "write_curve",
]
