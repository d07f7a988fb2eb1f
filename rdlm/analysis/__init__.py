"""Understand a model: one file per question.

capture        the states behind a text, after every recurrence and core layer
paths          does a token come to rest, go round, or drift?
independence   do different initial states lead to the same limit?
contraction    what does a recurrence do to small differences?
lens           what would it have said after i recurrences?
vitals         what goes wrong in the latent states while a run trains
"""

from rdlm.analysis.capture import Captured, Recurrence, capture, recurrence_of
from rdlm.analysis.contraction import Contraction, contraction
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
    "Recurrence",
    "capture",
    "classify",
    "contraction",
    "distances",
    "from_starts",
    "lens",
    "pca",
    "rate",
    "recurrence_of",
    "settled_after",
    "spread",
]
