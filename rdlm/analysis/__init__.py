"""Understand a model: one file per question.

capture        the states of a text after every recurrence and core layer
paths          does a token's path reach a fixed point, an orbit, or does it drift?
independence   do different initial states lead to the same limit?
contraction    does a recurrence shrink small differences?
gate           where would the model's exit gate stop?
lens           what does the model predict after each recurrence?
vitals         is the recurrence healthy during training?
"""

from rdlm.analysis.capture import Captured, capture, core_layers
from rdlm.analysis.contraction import Contraction, contraction
from rdlm.analysis.gate import exit_distribution
from rdlm.analysis.independence import from_starts, spread
from rdlm.analysis.lens import Lens, lens
from rdlm.analysis.paths import KINDS, SETTLED, Classified, classify, distances, pca, rate, settled_after

__all__ = [
    "KINDS",
    "SETTLED",
    "Captured",
    "Classified",
    "Contraction",
    "Lens",
    "capture",
    "classify",
    "contraction",
    "core_layers",
    "distances",
    "exit_distribution",
    "from_starts",
    "lens",
    "pca",
    "rate",
    "settled_after",
    "spread",
]
