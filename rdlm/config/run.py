"""Everything a training run needs to know, as frozen dataclasses that tyro turns into a command line."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from rdlm.config.errors import InputError, require
from rdlm.config.model import ModelConfig

Scheme = Literal[
    "poisson-lognormal-filling",
    "poisson-lognormal-fill",
    "poisson-lognormal",
    "poisson-unbounded",
    "poisson-bounded",
    "poisson-fill",
    "simple",
    "fixed",
    "non-recurrent",
    "full",
]

Remat = Literal["none", "iteration", "layer", "offload"]

Gather = Literal["once", "weights_once", "each"]

Packing = Literal["concatenate_and_split", "best_fit", "document_start"]

IGNORED = -100
"""Label of a position that is not scored."""


@dataclasses.dataclass(frozen=True)
class RecurrenceConfig:
    """How many times the core runs in a training step (spec section 3)."""

    scheme: Scheme = "poisson-lognormal-filling"
    """Distribution of (n, k): steps without and with gradient."""
    curriculum_steps: int = 0
    """Grow the mean depth linearly from 1 over this many steps; 0 is off."""
    draw: Literal["step", "microbatch", "sequence"] = "step"
    """What shares a draw of (n, k): a whole step, a microbatch, or nothing but one row of the batch (a step then takes
    as long as its deepest row)."""
    least: int = 1
    """Fewest recurrences n + k of a draw."""
    loss_power: float = 0.0
    """Weigh a draw's loss by (n + k) to this power, divided by its expectation; 0: all alike."""
    remat: Remat = "none"
    """What the backward pass recomputes. none: only what is cheap; iteration: each recurrence from its input;
    layer: each recurrence, and within it, and in prelude and coda, each layer; offload: as layer, and the inputs of the
    recurrences wait in the host's memory."""

    def __post_init__(self) -> None:
        for name, least in (("curriculum_steps", 0), ("least", 1)):
            value = getattr(self, name)
            require(value >= least, f"recurrence.{name}", value, f"must be at least {least}")
        require(abs(self.loss_power) <= 4, "recurrence.loss_power", self.loss_power, "must be in [-4, 4]")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "ellis_adam", "muon"] = "adamw"
    """adamw (optax), the reference's own variant (spec section 4), or Muon for the blocks' matrices and AdamW for the
    rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the cooldown."""
    schedule: Literal["trapezoid", "cosine", "linear"] = "trapezoid"
    """Shape after the warm-up: constant then linear cooldown; cosine; or linear decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    cooldown_steps: int = 100
    """Last steps over which a trapezoid falls to min_learning_rate."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    weight_decay: float = 0.1
    """Applied to matrices and embeddings, not to norms and biases."""
    clip_norm: float = 1.0
    """Largest global L2 norm of the gradient."""
    ema_decay: float = 0.0
    """Also keep a moving average of the weights with this decay (0.999, say), saved with every checkpoint; 0 is off."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be positive")
        require(self.eps > 0, "optimizer.eps", self.eps, "must be positive")
        require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "must be positive (use 1e9 to never clip)")
        for name in ("warmup_steps", "cooldown_steps", "weight_decay", "min_learning_rate"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must not be negative")
        for name in ("b1", "b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and how they are cut into batches."""

    prepared: tuple[str, ...] = ()
    """Your own data: folders made by experiments/prepare_data.py (or their gs:// copies); several are mixed."""
    weights: tuple[float, ...] = ()
    """Shares of the rows that come from each of `prepared`; empty: by their sizes."""
    stream: tuple[str, ...] = ()
    """Files, folders, globs or gs:// too large to prepare, read while training; `prepared` is then a sample of them,
    which gives tokenizer, settings and validation."""
    source: Literal["factbook"] = "factbook"
    """Corpus when `prepared` is empty: the CIA World Factbook (a TFDS builder over a pinned package)."""
    folder: str = "data"
    """Folder for data prepared on first use, and for local copies of gs:// folders."""
    tokenizer_size: int = 4096
    """Entries of the byte-level BPE tokenizer, special tokens included."""
    sequence_length: int = 256
    """Tokens per row (L)."""
    batch_size: int = 8
    """Rows per step, over all devices (B)."""
    microbatches: int = 1
    """Parts of a batch that a device works on one after the other, summing their gradients."""
    validation_fraction: float = 0.05
    """Share of documents held out for validation."""

    def __post_init__(self) -> None:
        # A tokenizer trained here needs 262 entries (it says so itself); a converted model may have any number.
        for name in ("sequence_length", "batch_size", "microbatches", "tokenizer_size"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "must be between 0 and 1",
        )
        require(
            not self.weights or (len(self.weights) == len(self.prepared) and min(self.weights) > 0),
            "data.weights",
            self.weights,
            f"must be empty, or one positive number for each of the {len(self.prepared)} folders in data.prepared",
        )
        require(
            not self.stream or len(self.prepared) == 1,
            "data.stream",
            self.stream,
            "needs exactly one folder in data.prepared: a sample of the stream, made by experiments/prepare_data.py",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each parallel axis; one of them may be -1: all that remain."""

    data: int = -1
    """Copies of the model, each on its part of the batch."""
    fsdp: int = 1
    """Devices that share one copy of the parameters."""
    tensor: int = 1
    """Devices that share one row of the batch: heads and MLP columns are split over them."""
    gather: Gather = "once"
    """When the core's weights are fetched from the devices that share them. once: once for all recurrences of a step,
    and its gradient returned once; weights_once: the same, but the gradient returned after every recurrence; each:
    layer by layer at every use (plain FSDP), which needs the least memory."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over recurrences and devices."""

    def __post_init__(self) -> None:
        sizes = self.data, self.fsdp, self.tensor
        require(
            all(n == -1 or n >= 1 for n in sizes) and sizes.count(-1) <= 1,
            "mesh",
            sizes,
            "axis sizes must be at least 1, and at most one may be -1 (all remaining devices)",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every", self.every, "must be at least 1")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """What is done about a loss or gradients that are not finite; each such update is skipped."""

    patience: int = 5
    """Skipped updates in a row after which the run goes back to its newest good checkpoint, and on with the data behind
    the bad ones; the second time from the same checkpoint it stops."""

    def __post_init__(self) -> None:
        require(self.patience >= 1, "faults.patience", self.patience, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training."""

    every: int = 500
    """Steps between validations; the last step is always validated."""
    batches: int = 16
    """Batches per validation; the final one (loss_by_depth.json) uses all."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Recurrences r at which the loss is read, all from one unroll."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", self.every, "must be at least 1")
        require(self.batches >= 1, "evaluation.batches", self.batches, "must be at least 1")
        require(
            len(self.depths) > 0 and all(r >= 1 for r in self.depths) and list(self.depths) == sorted(set(self.depths)),
            "evaluation.depths",
            self.depths,
            "must be increasing recurrences, each at least 1",
        )


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """What happens when a validation finds the recurrence unwell (`rdlm.analysis.vitals`)."""

    action: Literal["warn", "stop"] = "warn"
    """warn: say so and go on; stop: also save and exit with code 3."""
    start: int = 200
    """No alarm before this step, nor during the warm-up: a new model first learns how frequent tokens are, for which
    depth is no help."""

    def __post_init__(self) -> None:
        require(self.start >= 0, "alarms.start", self.start, "must not be negative")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run: what `experiments/train.py PRESET` resolves to and what `config.json` in the run folder holds."""

    model: ModelConfig
    recurrence: RecurrenceConfig = RecurrenceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    alarms: AlarmConfig = AlarmConfig()
    preset: str = "custom"
    """Name of the preset this came from."""
    steps: int = 1000
    """Optimizer steps in all."""
    seed: int = 0
    """Seed of initialisation, data order, depth draws and states."""
    run_dir: str = ""
    """Run folder; empty: runs/PRESET."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `log`)."""

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            value = getattr(self, section.name)
            for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
                number = getattr(value, field.name)
                finite = not isinstance(number, float) or math.isfinite(number)
                require(finite, f"{section.name}.{field.name}", number, "must be a finite number")
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        require(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")
        require(
            self.data.sequence_length <= self.model.max_length,
            "data.sequence_length",
            self.data.sequence_length,
            f"must be at most model.max_length = {self.model.max_length}",
        )
        # More steps with gradient than recurrences would train a deeper model than mean_recurrence says.
        require(
            self.model.backprop_depth <= self.model.mean_recurrence,
            "model.backprop_depth",
            self.model.backprop_depth,
            f"must be at most model.mean_recurrence = {self.model.mean_recurrence}",
        )
        if self.data.tokenizer_size != self.model.vocab_size:
            raise InputError(
                f"data.tokenizer_size = {self.data.tokenizer_size}: must equal model.vocab_size = "
                f"{self.model.vocab_size}; set both"
            )

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.run_dir or f"runs/{self.preset}"
