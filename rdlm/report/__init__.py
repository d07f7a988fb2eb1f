"""Results as files, figures and one page. Figures need matplotlib (the extra `plots`), imported when one is drawn.

results                                  JSON and CSV that say what made them
depth, sweep, trajectories, questions    the figures of each command
page                                     everything about a run as one HTML page
"""

from rdlm.report.depth import CURVE, depth_distribution, plot_loss_by_depth, read_curve
from rdlm.report.figures import can_draw, picture_line, shown
from rdlm.report.questions import plot_accuracy, plot_steps
from rdlm.report.results import write_result, write_table
from rdlm.report.sweep import FIXED, on_front, plot_sweep
from rdlm.report.trajectories import (
    plot_contraction,
    plot_distance,
    plot_heatmap,
    plot_independence,
    plot_lens,
    plot_paths,
)

__all__ = [
    "CURVE",
    "FIXED",
    "can_draw",
    "depth_distribution",
    "on_front",
    "picture_line",
    "plot_accuracy",
    "plot_contraction",
    "plot_distance",
    "plot_heatmap",
    "plot_independence",
    "plot_lens",
    "plot_loss_by_depth",
    "plot_paths",
    "plot_steps",
    "plot_sweep",
    "read_curve",
    "shown",
    "write_result",
    "write_table",
]
