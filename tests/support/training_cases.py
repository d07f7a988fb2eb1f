"""What tests of training share."""

from rdlm.config import PRESETS
from rdlm.train.metrics import read_metrics

NANO = PRESETS["nano"]


def losses(folder):
    """Of every step, with everything else that must be equal."""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    return [(r["step"], r["loss"], r["n"], r["k"], r["grad_norm"], r["learning_rate"]) for r in rows]


class Flips:
    """Stands in for SIGTERM: `requested` is False so many times, then True."""

    def __init__(self, looks):
        self.left = looks

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0

    def restore(self):
        pass


def cut_short(path, item="optimizer"):
    """Cut the arrays of a checkpoint short."""
    for file in (path / item).rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:100])
