"""One self-contained HTML page about a run, without scripts and without requests.

parts       text, tables, pictures, and the page around them
charts      lines and bars
training    the section about metrics.jsonl
results     the sections about depth, exits and latent states
benchmarks  the section about questions and lm-eval
"""

from rdlm.report.page.benchmarks import benchmarks
from rdlm.report.page.charts import Series, chart
from rdlm.report.page.parts import Html, details, document, facts, missing, picture, table, tag
from rdlm.report.page.results import calibrated, loss_by_depth, sweep, trajectories
from rdlm.report.page.training import training

__all__ = [
    "Html",
    "Series",
    "benchmarks",
    "calibrated",
    "chart",
    "details",
    "document",
    "facts",
    "loss_by_depth",
    "missing",
    "picture",
    "sweep",
    "table",
    "tag",
    "training",
    "trajectories",
]
