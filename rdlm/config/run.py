"""Everything a training run needs to know, as frozen dataclasses that tyro turns into a command line."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Literal

from rdlm.config.errors import require
from rdlm.config.json import check_types
from rdlm.config.model import ModelConfig
from rdlm.config.paths import local_path

Scheme = Literal[
    "poisson-lognormal-filling",
    "poisson-lognormal-fill",
    "poisson-lognormal",
    "poisson-unbounded",
    "poisson-bounded",
    "poisson-fill",
    "poisson-truncated-full",
    "simple",
    "fixed",
    "non-recurrent",
    "full",
]

Remat = Literal["none", "attention", "sums", "iteration", "layer", "offload", "auto"]

Gather = Literal["once", "weights_once", "each"]

Packing = Literal["concatenate_and_split", "best_fit", "document_start"]

Part = Literal["embedding", "prelude", "adapter", "low", "core", "coda", "head", "gate", "values", "norms"]

LoraTarget = Literal["attn.qkv", "attn.proj", "mlp.fc", "mlp.proj", "adapter"]

Small = Literal["int8", "float8_e4m3fn"]
"""Dtypes of quantized matrices (docs/quantize.md)."""

IGNORED = -100
"""Label of a position that is not scored."""


@dataclasses.dataclass(frozen=True)
class RecurrenceConfig:
    """How many times the core runs in a training step (docs/model.md, Sampling the depth)."""

    scheme: Scheme = "poisson-lognormal-filling"
    """Distribution of (n, k): recurrences without and with gradient."""
    curriculum_steps: int = 0
    """Optimizer steps over which the recurrences with and without gradient both grow linearly; 0 is off."""
    curriculum_share: float = 0.0
    """Share of the run's steps over which the mean depth m grows from 1, with gradient through min(m, b) recurrences;
    0 is off."""
    curriculum_shape: Literal["linear", "one_minus_sqrt"] = "linear"
    """Growth of that mean with progress u: as u, or as 1 - sqrt(1 - u), slowly at first."""
    draw: Literal["step", "microbatch", "sequence"] = "step"
    """One draw of (n, k) per optimizer step, per microbatch, or per row of the batch (a step then takes as long as its
    deepest row)."""
    least: int = 1
    """Minimum number of recurrences n + k."""
    loss_power: float = 0.0
    """Weight the loss of a draw by (n + k) to this power, divided by its expectation; 0: equal weights."""
    remat: Remat = "none"
    """What the backward pass recomputes. none: only cheap operations. iteration: each recurrence, and each layer of
    prelude and coda. sums: the same, but the residual sums of a recurrence are stored. attention: they, and what
    attention reads and returns. layer: as iteration, and each layer of a recurrence by itself once more. offload: as
    layer, with the inputs of the recurrences in host memory. auto: the first of none, attention, sums, iteration and
    layer with which the step fits the device."""

    def __post_init__(self) -> None:
        check_types(self, "recurrence.")
        for name, minimum in (("curriculum_steps", 0), ("least", 1)):
            value = getattr(self, name)
            require(value >= minimum, f"recurrence.{name}", value, f"must be at least {minimum}")
        share, shape = self.curriculum_share, self.curriculum_shape
        require(0 <= share <= 1, "recurrence.curriculum_share", share, "must be in [0, 1]")
        once = not (share and self.curriculum_steps)
        require(once, "recurrence.curriculum_share", share, "must be 0 with recurrence.curriculum_steps; choose one")
        grows = shape == "linear" or share > 0
        require(grows, "recurrence.curriculum_shape", shape, "needs recurrence.curriculum_share above 0")
        require(abs(self.loss_power) <= 4, "recurrence.loss_power", self.loss_power, "must be in [-4, 4]")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What training adds to the cross-entropy; validation is always the cross-entropy alone."""

    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps the softmax's normaliser Z near 1, for example 1e-4 (PaLM, arXiv 2204.02311,
    section 5); 0 is off."""
    label_smoothing: float = 0.0
    """Share of a label that is spread evenly over the vocabulary, for example 0.1 (arXiv 1512.00567, section 7);
    0 is off."""
    gate: Literal["none", "exit", "improvement"] = "none"
    """Of a model with an exit gate. exit: every recurrence predicts, weighed by the probability that the gate stops
    there. improvement: only the gate learns, whether one more recurrence still lowers the loss (docs/families.md)."""
    gate_entropy: float = 0.1
    """With gate = "exit", weight of the entropy of where the gate stops, which is rewarded."""
    depths: tuple[int, ...] = ()
    """Recurrences after which the model predicts and is scored, all in one unroll; empty: only after the last."""
    depth_weights: tuple[float, ...] = ()
    """Weight of the loss at each of `depths`, relative to their sum; empty: equal weights."""
    teacher: Literal["none", "first", "deepest", "start"] = "none"
    """Who teaches, through the divergence KL(teacher || student) of predictions. first, deepest: one of `depths`, the
    others, without a gradient of its own from it; start: the weights that the run begins with."""
    teacher_depth: int = 1
    """With teacher = "start", the recurrences that the teacher runs. One is all that a new retrofit needs."""
    teacher_share: float = 0.5
    """Share of that divergence in the loss of a taught depth; the rest is cross-entropy."""
    temperature: float = 1.0
    """T of the divergence: T^2 KL between softmax(logits / T) (arXiv 1503.02531)."""
    stability: float = 0.0
    """Share w of a penalty: (1 - w) loss + w radius, with the spectral radius of a recurrence's Jacobian at the last
    state (arXiv 2605.26733), for example 0.1; 0 is off. It shapes core and adapter alone."""

    def __post_init__(self) -> None:
        check_types(self, "loss.")
        increasing = list(self.depths) == sorted(set(self.depths)) and min(self.depths, default=1) >= 1
        weights, several = self.depth_weights, len(self.depths) > 1
        weighted = not weights or (len(weights) == len(self.depths) and min(weights) > 0)
        checks = {
            "depths": (increasing, "must be increasing recurrences, each at least 1"),
            "depth_weights": (weighted, "must be empty, or a positive number for each of loss.depths"),
            "teacher": (several or self.teacher in ("none", "start"), "needs two loss.depths or more"),
            "teacher_depth": (self.teacher_depth >= 1, "must be at least 1"),
            "teacher_share": (0 < self.teacher_share <= 1, "must be in (0, 1]"),
            "temperature": (self.temperature > 0, "must be positive"),
            "stability": (0 <= self.stability < 1, "must be in [0, 1)"),
        }
        for name, (fulfilled, fix) in checks.items():
            require(fulfilled, f"loss.{name}", getattr(self, name), fix)
        alone = self.gate == "none" or not self.depths
        require(alone, "loss.depths", self.depths, "must be empty with loss.gate, which reads every recurrence")
        untaught = self.gate == "none" or self.teacher == "none"
        require(untaught, "loss.teacher", self.teacher, "must be 'none' with loss.gate")
        require(self.gate_entropy >= 0, "loss.gate_entropy", self.gate_entropy, "must not be negative")
        require(self.z_loss >= 0, "loss.z_loss", self.z_loss, "must not be negative")
        require(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "ellis_adam", "muon"] = "adamw"
    """adamw (optax); ellis_adam, the reference's variant (docs/model.md, Optimizer); muon, with AdamW for all that are
    not matrices of blocks or adapter."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    adamw_learning_rate: float | None = None
    """With muon, peak learning rate of what AdamW moves, on the same schedule; min_learning_rate falls in proportion.
    None: learning_rate."""
    min_learning_rate: float = 0.0
    """Learning rate after the last step."""
    schedule: Literal["trapezoid", "cosine", "linear"] = "trapezoid"
    """Learning rate after the warm-up: constant, then linear cooldown; cosine; or linear decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    cooldown_steps: int = 100
    """Final steps over which a trapezoid falls to min_learning_rate."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; norm weights and biases have none."""
    clip_norm: float = 1.0
    """Maximum global L2 norm of the gradient."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights that is saved with every checkpoint, for example 0.999; 0 is off."""
    quantize: Small | None = None
    """Train for `quantize.py --dtype` with the same dtype: loss and gradient are those of the rounded matrices, and the
    gradient moves the full ones, which are saved and validated (docs/quantize.md). None: off."""

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be positive")
        rest = self.adamw_learning_rate
        require(rest is None or rest > 0, "optimizer.adamw_learning_rate", rest, "must be positive")
        split = rest is None or self.name == "muon"
        require(split, "optimizer.adamw_learning_rate", rest, "needs optimizer.name = 'muon'; set learning_rate")
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
    """Share of the rows from each of `prepared`; empty: in proportion to their sizes."""
    stream: tuple[str, ...] = ()
    """Files, folders, globs or gs:// paths that are read while training because they are too large to prepare.
    `prepared` is then a sample of them, for tokenizer, settings and validation."""
    source: Literal["factbook"] = "factbook"
    """Corpus when `prepared` is empty: the CIA World Factbook (a TFDS builder over a pinned package)."""
    folder: str = "data"
    """Folder for data that are prepared on first use, and for local copies of gs:// folders."""
    tokenizer_size: int = 4096
    """Entries of the byte-level BPE tokenizer, special tokens included."""
    sequence_length: int = 256
    """Tokens per row (L)."""
    batch_size: int = 8
    """Rows per step, over all devices (B)."""
    microbatches: int = 1
    """Parts of a batch that a device processes sequentially, accumulating gradients."""
    validation_fraction: float = 0.05
    """Share of documents held out for validation."""
    task: str = ""
    """Task of `rdlm.tasks.TASKS` that the run is trained on instead of text. Studies set it; train.py reads text."""
    task_size: int = 0
    """Size of the task's largest training instances: letters, digits, operators, hops or distance."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        # Training a tokenizer needs at least 262 entries and checks that; a converted model may have any number.
        for name in ("sequence_length", "batch_size", "microbatches", "tokenizer_size"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        local_path(self.folder, "data.folder")
        folders = len(self.prepared)
        total = sum(self.weights)  # not a number if one of them is not
        weighted = not self.weights or (len(self.weights) == folders and min(self.weights) > 0 and total < math.inf)
        sample = "a sample of the stream, made by experiments/prepare_data.py"
        checks = {
            "validation_fraction": (0 < self.validation_fraction < 1, "must be between 0 and 1"),
            "weights": (
                weighted,
                f"must be empty, or a positive finite number for each of the {folders} in data.prepared",
            ),
            "stream": (not self.stream or folders == 1, f"needs exactly one folder in data.prepared: {sample}"),
            "task_size": ((self.task_size >= 1) == bool(self.task), "must be at least 1 with data.task, and 0 without"),
        }
        for name, (fulfilled, fix) in checks.items():
            require(fulfilled, f"data.{name}", getattr(self, name), fix)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each parallel axis; one axis may be -1: all remaining devices."""

    data: int = -1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = 1
    """Devices over which one copy of the parameters is sharded."""
    tensor: int = 1
    """Devices over which heads and MLP columns are split for one row of the batch."""
    gather: Gather = "once"
    """How often the core's weights are all-gathered in a step. once: once for all recurrences, with one reduce-scatter
    of the gradient; weights_once: once, with a reduce-scatter after every recurrence; each: layer by layer at every use
    (plain FSDP), which needs the least memory."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are accumulated over recurrences and devices."""

    def __post_init__(self) -> None:
        check_types(self, "mesh.")
        sizes = self.data, self.fsdp, self.tensor
        require(
            all(n == -1 or n >= 1 for n in sizes) and sizes.count(-1) <= 1,
            "mesh",
            sizes,
            "axis sizes must be at least 1, and at most one may be -1 (all remaining devices)",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often the run is saved, and which checkpoints are kept."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Number of newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep the checkpoints of steps that are multiples of this; 0 is off."""
    keep_best: int = 0
    """Also keep this many checkpoints with the lowest validation loss, at the depth of evaluation.depths nearest to
    model.mean_recurrence; 0 is off."""

    def __post_init__(self) -> None:
        check_types(self, "checkpoint.")
        require(self.every >= 1, "checkpoint.every", self.every, "must be at least 1")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "must be at least 1")
        kept = self.keep_every >= 0 and self.keep_every % self.every == 0
        fix = f"must be 0 or a multiple of checkpoint.every = {self.every}, or no checkpoint of these steps is made"
        require(kept, "checkpoint.keep_every", self.keep_every, fix)
        require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must not be negative")


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """What happens when loss or gradients are not finite. Every such update is skipped."""

    patience: int = 5
    """Skipped updates in a row after which the run rolls back to its newest good checkpoint and continues with the data
    after the bad batches. A second rollback to the same checkpoint stops the run instead."""

    def __post_init__(self) -> None:
        check_types(self, "faults.")
        require(self.patience >= 1, "faults.patience", self.patience, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training."""

    every: int = 500
    """Steps between validations; there is always one after the last step."""
    batches: int = 16
    """Batches per validation; the final one (loss_by_depth.json) uses all."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Recurrences r at which the loss is measured, all in one unroll."""

    def __post_init__(self) -> None:
        check_types(self, "evaluation.")
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
    """What happens when the vitals of the recurrence leave their limits at a validation (`rdlm.analysis.vitals`)."""

    action: Literal["warn", "stop"] = "warn"
    """warn: print an alarm and continue; stop: also save, and exit with code 3."""
    start: int = 200
    """First step with alarms, and not before the end of the warm-up: a new model first learns token frequencies, for
    which depth is of no use."""

    def __post_init__(self) -> None:
        check_types(self, "alarms.")
        require(self.start >= 0, "alarms.start", self.start, "must not be negative")


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Which parameters learn (docs/training.md, Train a part, or low-rank pairs)."""

    only: tuple[Part, ...] = ()
    """Parts that learn; empty: all, or with lora_rank none. norms: every norm weight, also those inside of blocks;
    low: the inner one of two stacks; values: value embeddings and their gates."""
    lora_rank: int = 0
    """Rank r of the pairs A, B that learn in place of a matrix W: y = x W + (alpha / r) (x A) B; 0: no pairs. Parts in
    `only` still learn in full."""
    lora_targets: tuple[LoraTarget, ...] = ()
    """Matrices that get a pair; empty: all of these that the model has. attn.qkv: queries, keys and values together;
    mlp.fc: gate and up."""
    lora_alpha: float = 16.0
    """alpha of lora_rank: a pair counts alpha / r times."""

    @property
    def freezes(self) -> bool:
        """Whether some parameters are frozen: those of the model that the run begins with, its base."""
        return bool(self.only or self.lora_rank)

    @property
    def targets(self) -> tuple[str, ...]:
        """`lora_targets` written out."""
        return self.lora_targets or typing.get_args(LoraTarget)

    def __post_init__(self) -> None:
        check_types(self, "tune.")
        require(self.lora_rank >= 0, "tune.lora_rank", self.lora_rank, "must not be negative")
        require(self.lora_alpha > 0, "tune.lora_alpha", self.lora_alpha, "must be positive")
        needs = "needs tune.lora_rank, for example 16"
        require(self.lora_rank > 0 or not self.lora_targets, "tune.lora_targets", self.lora_targets, needs)
        default = type(self).lora_alpha
        require(self.lora_rank > 0 or self.lora_alpha == default, "tune.lora_alpha", self.lora_alpha, needs)

    def check_fits(self, model: ModelConfig) -> None:
        """Refuse parts and matrices that `model` does not have, and a rank that saves nothing. Raises InputError."""
        adapter = model.loop.injection in ("linear", "diagonal")
        there = {
            "adapter": (adapter, "this model has no adapter (model.loop.injection)"),
            "values": (
                bool(model.value_layers),
                "this model uses no value embeddings (layers in both model.value_tables and model.value_gates)",
            ),
            "head": (not model.tie_embeddings, "this model reads its head from the embedding; say embedding"),
            "gate": (model.loop.gate, "this model has no exit gate (model.loop.gate)"),
            "low": (model.low_layers > 0, "this model has one stack (model.loop.low_cycles)"),
            "prelude": (model.prelude_layers > 0, "this model has no prelude"),
            "coda": (model.coda_layers > 0 or model.loop.linear_bridge, "this model has no coda"),
            "norms": (model.block.norm_weight != "none", "the norms of this model have no weights"),
        }
        for field in ("only", "lora_targets"):
            for name in getattr(self, field):
                found, why = there.get(name, (True, ""))
                require(found, f"tune.{field}", getattr(self, field), why)
        smallest = min(model.embed_dim, model.mlp_dim)
        fix = f"must be below {smallest}, the smallest side of a matrix"
        require(self.lora_rank < smallest, "tune.lora_rank", self.lora_rank, fix)
        layers = [part for part in ("prelude", "low", "core", "coda") if getattr(model, f"{part}_layers")]
        blocks = [part for part in layers if part not in self.only]
        adapter = adapter and "adapter" not in self.only and "adapter" in self.targets
        fix = f"no matrix is left for a pair: {', '.join(self.only)} learn in full; name fewer parts in tune.only"
        left = adapter or (blocks and self.targets != ("adapter",))
        require(bool(left) or not self.lora_rank, "tune.lora_rank", self.lora_rank, fix)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run: a preset with its overrides, as stored in config.json of the run folder."""

    model: ModelConfig
    recurrence: RecurrenceConfig = RecurrenceConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    alarms: AlarmConfig = AlarmConfig()
    tune: TuneConfig = TuneConfig()
    preset: str = "custom"
    """Name of the preset."""
    init: str = ""
    """Run folder or Hugging Face folder whose parameters the run begins with; empty: random ones. Its model replaces
    the preset's."""
    init_ema: bool = False
    """Of a run folder, begin with the moving average of the parameters."""
    weights_digest: str = ""
    """sha256 of the parameters of `init`. The run fills it in."""
    steps: int = 1000
    """Number of optimizer steps."""
    seed: int = 0
    """Seed of initialisation, data order, depth draws and states."""
    run_dir: str = ""
    """Run folder; empty: runs/PRESET."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `log`)."""

    def __post_init__(self) -> None:
        check_types(self)
        _ = self.folder  # must be local
        for name in ("init_ema", "weights_digest"):
            require(bool(self.init) or not getattr(self, name), name, getattr(self, name), "only with init")
        require(self.steps >= 1, "steps", self.steps, "must be at least 1")
        require(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")
        require(
            self.data.sequence_length <= self.model.max_length,
            "data.sequence_length",
            self.data.sequence_length,
            f"must be at most model.max_length = {self.model.max_length}",
        )
        require(
            not self.checkpoint.keep_best or self.checkpoint.every % self.evaluation.every == 0,
            "checkpoint.every",
            self.checkpoint.every,
            f"must be a multiple of evaluation.every = {self.evaluation.every}, because checkpoint.keep_best needs the "
            "validation loss of every checkpoint",
        )
        # With more gradient steps than recurrences, training would be deeper than mean_recurrence.
        require(
            self.model.backprop_depth <= self.model.mean_recurrence,
            "model.backprop_depth",
            self.model.backprop_depth,
            f"must be at most model.mean_recurrence = {self.model.mean_recurrence}",
        )
        if self.loss.gate != "none" or self.loss.depths:
            name = "depths" if self.loss.depths else "gate"
            value = getattr(self.loss, name)
            grows = self.recurrence.curriculum_steps or self.recurrence.curriculum_share
            deeper = self.recurrence.least > self.model.mean_recurrence
            fixed = self.recurrence.scheme == "fixed" and not grows and not deeper
            all_of_them = fixed and self.model.backprop_depth == self.model.mean_recurrence
            fix = (
                "needs recurrence.scheme = 'fixed', no curriculum, no larger recurrence.least and "
                "model.backprop_depth = model.mean_recurrence"
            )
            why = "it reads the loss of every recurrence" if name == "gate" else "all of them get a gradient"
            require(all_of_them, f"loss.{name}", value, f"{fix}: {why}")
        if self.loss.teacher == "start":
            require(bool(self.init), "loss.teacher", "start", "needs --init FOLDER, whose weights teach")
        if self.loss.depths:
            last, mean = self.loss.depths[-1], self.model.mean_recurrence
            fix = f"must end with model.mean_recurrence = {mean}, up to which the model is unrolled"
            require(last == mean, "loss.depths", self.loss.depths, fix)
        if self.loss.gate != "none":
            require(self.model.loop.gate, "loss.gate", self.loss.gate, "needs a model with model.loop.gate")
        self.tune.check_fits(self.model)
        fits = not (self.tune.lora_rank and self.optimizer.quantize)
        fix = "must be left out with tune.lora_rank: a pair is merged before its matrix is rounded"
        require(fits, "optimizer.quantize", self.optimizer.quantize, fix)
        only, learns = self.tune.only, not self.tune.freezes or "gate" in self.tune.only
        fix = "the gate learns only with --loss.gate exit or improvement; give one, or leave gate out"
        require(self.loss.gate != "none" or "gate" not in only, "tune.only", only, fix)
        if self.loss.gate == "improvement":
            fix = "trains the gate alone, which is frozen; name it in --tune.only"
            require(learns, "loss.gate", self.loss.gate, fix)
            decay = self.optimizer.weight_decay
            require(decay == 0, "optimizer.weight_decay", decay, "must be 0 with loss.gate = 'improvement'")
        require(
            self.data.tokenizer_size <= self.model.vocab_size,
            "data.tokenizer_size",
            self.data.tokenizer_size,
            f"must be at most model.vocab_size = {self.model.vocab_size}; set both",
        )

    def check_draws(self) -> None:
        """Refuse draws with n > 0 that leave learning parts of a model without injection without a gradient.

        Not part of the other checks, because a folder that was converted and not trained has the default draws.

        Raises:
          InputError: naming the field.
        """
        model, draws, tune = self.model, self.recurrence, self.tune
        there = {"embedding": not model.tie_embeddings, "prelude": model.prelude_layers > 0}
        pairs = {"prelude"} if tune.lora_rank else set()
        learn = [part for part in there if there[part] and (not tune.freezes or part in {*tune.only, *pairs})]
        if model.loop.injection != "none" or not learn:
            return
        why = f"or {' and '.join(learn)} would get no gradient: this model reads them only where the loop starts"
        scheme, deepest = draws.scheme, model.mean_recurrence
        beyond = scheme in ("poisson-lognormal-filling", "poisson-truncated-full")
        require(not beyond, "recurrence.scheme", scheme, f"must be one without n > 0, such as fixed, {why}")
        all_of_them = scheme in ("non-recurrent", "full") or model.backprop_depth == deepest
        fix = f"must be model.mean_recurrence = {deepest}, {why}"
        require(all_of_them, "model.backprop_depth", model.backprop_depth, fix)
        grows = draws.curriculum_steps or draws.curriculum_share
        filled = scheme in ("fixed", "poisson-fill", "poisson-lognormal-fill") and not grows
        smallest = deepest if filled else 1
        require(draws.least <= smallest, "recurrence.least", draws.least, f"must be at most {smallest}, {why}")

    @property
    def folder(self) -> str:
        """The run folder, ~ expanded."""
        return str(local_path(self.run_dir or f"runs/{self.preset}", "run_dir"))
