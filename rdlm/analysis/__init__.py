"""Understand a model: one file per question.

capture        the states behind a text, after every recurrence and core layer
paths          does a token come to rest, go round, or drift?
independence   do different initial states lead to the same limit?
contraction    what does a recurrence do to small differences?
lens           what would it have said after i recurrences?
held_out       examples that a run has not been trained on
"""

from rdlm.analysis.capture import Captured, Recurrence, capture, recurrence_of
from rdlm.analysis.contraction import Contraction, contraction
from rdlm.analysis.held_out import HeldOut, held_out, validation
from rdlm.analysis.independence import from_starts, spread
from rdlm.analysis.lens import Lens, lens
from rdlm.analysis.paths import KINDS, SETTLED, Classified, classify, distances, pca, rate, settled_after

__all__ = [
    "KINDS",
    "SETTLED",
    "Captured",
    "Classified",
    "Contraction",
    "HeldOut",
    "Lens",
    "Recurrence",
    "capture",
    "classify",
    "contraction",
    "distances",
    "from_starts",
    "held_out",
    "lens",
    "pca",
    "rate",
    "recurrence_of",
    "settled_after",
    "spread",
    "validation",
]
