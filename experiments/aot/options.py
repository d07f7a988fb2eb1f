"""What `aot_check.py` is told to compile."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from rdlm.config import Gather, Remat, Small, TuneConfig

Exit = Literal["none", "kl", "gated_kl", "latent_diff"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """Such as huginn_3p5b."""
    topology: str = "v5e:2x2"
    only: Literal["train", "decode", "serve"] | None = None
    """One of these; None: train and decode."""
    batch: int | None = None
    """Sequences: training, per chip and microbatch (None: 1); decoding, rows (None: 16); serving, lanes (None: 16)."""
    # Training
    data: int = 1
    """Copies of the parameters."""
    tensor: int = 1
    """Chips that share a sequence, also in decoding."""
    gather: Gather = "once"
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat | None = None
    """None: the preset's; auto: compiles the step with each that it may choose, and shows what a step takes."""
    microbatches: int = 1
    sequence_length: int | None = None
    """None: the preset's."""
    search: bool = False
    """Find the largest batch per chip and microbatch that fits (several programs)."""
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)
    """Which parameters learn."""
    json: bool = False
    """Print one JSON object per program instead of text."""
    # Decoding
    cache_tokens: int | None = None
    """Positions that all lanes share, for serving; None: as many as every lane's capacity needs."""
    capacity: int = 1024
    """Positions of the cache per row."""
    recurrences: int | None = 4
    """Recurrences whose keys and values are kept; None: all."""
    cache_dtype: Literal["int8"] | None = None
    """Of keys and values; None: bfloat16."""
    weight_dtype: Small | None = None
    """Of matrices, as quantize.py makes them; None: bfloat16."""
    num_steps: int = 32
    """Maximum recurrences per token."""
    exit: tuple[Exit, ...] = ("kl",)
    """Exit rules; each is a program of its own."""
    mean_depth: float | None = None
    """Recurrences that the batch runs for a token, in the estimate; None: num_steps, as always with exit none."""
    window: int | None = None
    """Unfinished positions of the parallel sampler, compiled too and compared with the last exit rule; None: no."""
    inner: int = 4
    """Recurrences of its outer steps."""
