"""The shape of the model, and the options of cache, sampling, speculative and parallel decoding."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal

from rdlm.config.errors import InputError, require
from rdlm.config.json import check_types

NOISES = ("fixed", "geom", "sqrt", "line", "chi")


@dataclasses.dataclass(frozen=True)
class Block:
    """What one block computes (docs/families.md). Defaults: the paper's block."""

    norm_input: bool = True
    """Norm of what attention and MLP read."""
    norm_output: Literal["none", "branch", "sum"] = "sum"
    """Norm of what they give: of the branch before it is added, or of the residual sum."""
    norm_weight: Literal["scale", "offset", "none"] = "scale"
    """Norms multiply by w, by 1 + w, or by nothing."""
    qk_norm: Literal["none", "head", "width", "rotated"] = "none"
    """Norm of queries and keys before rotary: of each head, or of all heads together. rotated: of each head, without
    weights and after rotary."""
    qkv_bias: bool = False
    """Learned bias on queries, keys and values."""
    output_gate: bool = False
    """What attention gives is multiplied by sigmoid(W y) before its output projection; y is what attention reads."""
    activation: Literal["silu", "gelu_tanh", "relu2"] = "silu"
    """Of the MLP; relu2: max(x, 0)^2 / 2."""
    gated: bool = True
    """The MLP multiplies the activation by a second linear map of its input."""
    attention_scale: float | None = None
    """What scores are multiplied by. None: 1 / sqrt(head_dim)."""

    def __post_init__(self) -> None:
        check_types(self, "block.")
        normed = self.norm_input or self.norm_output == "branch"
        require(normed, "block.norm_input", self.norm_input, "must be true, unless block.norm_output is 'branch'")
        plain = not (self.output_gate and self.qkv_bias)
        require(plain, "block.qkv_bias", self.qkv_bias, "must be false with block.output_gate")
        scale = self.attention_scale
        require(scale is None or scale > 0, "block.attention_scale", scale, "must be positive")


@dataclasses.dataclass(frozen=True)
class Loop:
    """How the core is repeated (docs/families.md). Defaults: the paper's loop."""

    injection: Literal["linear", "diagonal", "add", "none"] = "linear"
    """What the core reads: A [s; e]; exp(-d exp(A_log)) s + d (B e) with d = softplus(dt_bias), one of each per
    channel; s + e; or s alone."""
    start: Literal["noise", "embedding"] = "noise"
    """The initial state: noise, or what the prelude returns."""
    start_std: float | None = None
    """Standard deviation of the noise before it is cut at 3 of them. None: sqrt(2 / 5)."""
    close: bool = False
    """The final norm ends every recurrence; the next one reads the normed state. Needs coda_layers = 0."""
    bridge: bool = True
    """The final norm stands between core and coda too."""
    linear_bridge: bool = False
    """A matrix C stands between core and coda, in place of the final norm."""
    entry_norm: bool = False
    """A norm of its own ends the prelude."""
    gate: bool = False
    """A linear exit gate reads the state after every recurrence."""
    low_cycles: int = 0
    """Calls of a second stack, as deep as the core, that begin every recurrence. 0: there is none."""
    low_backprop: tuple[int, ...] = ()
    """Calls of it with gradient in each of the last recurrences of a training step; one in those before. (): all."""

    def __post_init__(self) -> None:
        check_types(self, "loop.")
        require(self.start_std is None or self.start_std > 0, "loop.start_std", self.start_std, "must be positive")
        noisy = self.start_std is None or self.start == "noise"
        require(noisy, "loop.start_std", self.start_std, "must be None, because loop.start is 'embedding'")
        fed = self.injection != "none" or self.start == "embedding"
        require(fed, "loop.start", self.start, "must be 'embedding' without injection, or the text is never read")
        require(self.close or not self.gate, "loop.gate", self.gate, "needs loop.close: the gate reads a normed state")
        once = not (self.close and self.bridge)
        require(once, "loop.bridge", self.bridge, "must be false with loop.close, which has normed the state already")
        alone = not (self.linear_bridge and (self.bridge or self.close))
        require(alone, "loop.linear_bridge", self.linear_bridge, "must be false with loop.bridge or loop.close")
        require(self.low_cycles >= 0, "loop.low_cycles", self.low_cycles, "must not be negative")
        alone = self.close and self.injection == "none" and not self.gate
        fits = not self.low_cycles or alone
        require(fits, "loop.low_cycles", self.low_cycles, "needs loop.close, and neither injection nor gate")
        counted = min(self.low_backprop, default=0) >= 0 and (self.low_cycles > 0 or not self.low_backprop)
        require(counted, "loop.low_backprop", self.low_backprop, "must not be negative, and needs loop.low_cycles")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Stretches slow rotary frequencies by `factor`, leaves fast ones, and blends between (docs/families.md)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        check_types(self, "rope_scaling.")
        require(self.factor >= 1, "rope_scaling.factor", self.factor, "must be at least 1")
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low < high, "rope_scaling.low_freq_factor", low, f"must be in (0, high_freq_factor = {high})")
        require(self.original_length >= 1, "rope_scaling.original_length", self.original_length, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a recurrent-depth model (docs/model.md, Block). Hashable, so it can be a static argument of `jit`."""

    vocab_size: int
    """Number of tokens in the tokenizer."""
    embed_dim: int
    """Width D of the residual stream and the latent state."""
    num_heads: int
    """Query heads H; must divide embed_dim, unless head_width is set."""
    mlp_dim: int
    """Width F of the MLP."""
    prelude_layers: int = 2
    """Blocks of the prelude, run once."""
    core_layers: int = 4
    """Blocks of the core, run in every recurrence with the same weights."""
    coda_layers: int = 2
    """Blocks of the coda, run once."""
    num_kv_heads: int | None = None
    """Key/value heads K; must divide num_heads. None: as many as query heads."""
    head_width: int | None = None
    """Width Q of one head. None: embed_dim / num_heads."""
    padded_vocab_size: int | None = None
    """Rows of the embedding (and columns of the logits). None: vocab_size."""
    max_length: int = 4096
    """Maximum number of positions."""
    rope_base: float = 50000.0
    """Base of the rotary frequencies."""
    rope_scaling: RotaryScaling | None = None
    """Stretching of the rotary frequencies. None: off."""
    attention_window: int | None = None
    """Tokens that a query sees: itself and those directly before it. None: all before it."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers that see every earlier token though there is a window, counted from 0 through prelude, core and coda."""
    window_rope_base: float | None = None
    """Base of the rotary frequencies in layers with a window, where they are not scaled. None: rope_base."""
    prefix_attention: bool = False
    """The tokens of a prompt may see each other in both directions, where `prefix` asks for it."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    qk_bias: bool = True
    """Learned bias on queries and keys, per query head, before rotary."""
    tie_embeddings: bool = True
    """The head is the transposed embedding."""
    embed_scale: float | None = None
    """What embeddings are multiplied by. None: sqrt(embed_dim)."""
    block: Block = Block()
    """What one block computes."""
    loop: Loop = Loop()
    """How the core is repeated."""
    mean_recurrence: int = 32
    """Mean r of training, and the default depth at test time."""
    backprop_depth: int = 8
    """b: the recurrences with gradient in a training step are at most b, or 2 b with some schemes of drawing them."""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype in which parameters are initialised and stored."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of matrix products and activations. None: that of the parameters."""
    value_tables: tuple[int, ...] = ()
    """Layers with a table of value embeddings, which are added to the values of attention by token. Counted from 0
    through prelude, core and coda."""
    value_gates: tuple[int, ...] = ()
    """Layers with a gate of value embeddings, counted likewise. A layer uses them if it has both."""
    initial_output: Literal["scaled", "zero"] = "scaled"
    """Output projections of attention and MLP in a new model: scaled down by depth, or zeros."""
    test_time_noise: float = 0.0
    """Noise mixed into the state before each recurrence at test time (docs/model.md, Test-time noise); 0 is off."""
    test_time_noise_type: Literal["fixed", "geom", "sqrt", "line", "chi"] = "fixed"
    """Schedule of the test-time noise over recurrences."""

    def __post_init__(self) -> None:
        check_types(self)
        # An explicit default is stored as None, so that equal shapes compare equal, and overriding only num_heads or
        # vocab_size also changes what follows from it.
        if self.num_kv_heads == self.num_heads:
            object.__setattr__(self, "num_kv_heads", None)
        if self.padded_vocab_size == self.vocab_size:
            object.__setattr__(self, "padded_vocab_size", None)
        if self.head_width is not None and self.head_width * self.num_heads == self.embed_dim:
            object.__setattr__(self, "head_width", None)
        if self.embed_scale == self.embed_dim**0.5:
            object.__setattr__(self, "embed_scale", None)
        positive = ["vocab_size", "embed_dim", "num_heads", "mlp_dim", "prelude_layers", "core_layers", "coda_layers"]
        for name in [*positive, "max_length", "mean_recurrence", "backprop_depth"]:
            value = getattr(self, name)
            minimum = 0 if name in ("prelude_layers", "coda_layers") else 1
            require(
                isinstance(value, int) and value >= minimum, name, value, f"must be an integer of at least {minimum}"
            )
        above, window = -(-self.embed_dim // self.num_heads) * self.num_heads, self.attention_window
        divides = self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0
        sees = window is None or (isinstance(window, int) and window >= 1)
        full, base = self.full_attention_layers, self.window_rope_base
        layers = self.prelude_layers + self.core_layers + self.coda_layers
        checks = {
            "head_width": (self.head_width is None or self.head_width >= 2, "must be at least 2"),
            "embed_scale": (self.embed_scale is None or self.embed_scale > 0, "must be positive"),
            "coda_layers": (not self.loop.close or not self.coda_layers, "must be 0 with loop.close"),
            "qk_bias": (not self.qk_bias or self.block.qk_norm == "none", "must be false with block.qk_norm"),
            "embed_dim": (
                self.head_width is not None or above == self.embed_dim,
                f"must be a multiple of num_heads = {self.num_heads} (try {above})",
            ),
            "num_kv_heads": (divides, f"must divide num_heads = {self.num_heads}"),
            "padded_vocab_size": (self.rows >= self.vocab_size, f"must be at least vocab_size = {self.vocab_size}"),
            "rope_base": (self.rope_base > 0, "must be positive"),
            "attention_window": (sees, "must be an integer of at least 1, or None to see every earlier token"),
            "full_attention_layers": (
                not full or (window is not None and 0 <= min(full) <= max(full) < layers and not self.low_layers),
                f"must be of 0 .. {layers - 1}, needs attention_window, and cannot be had with loop.low_cycles",
            ),
            "window_rope_base": (
                base is None or (base > 0 and window is not None),
                "must be positive, and needs attention_window",
            ),
            "value_tables": (all(i in range(layers) for i in self.value_tables), f"must be of 0 .. {layers - 1}"),
            "value_gates": (
                all(i in range(layers) for i in self.value_gates) and (not self.value_gates or self.embed_dim >= 32),
                f"must be of 0 .. {layers - 1}, and needs embed_dim of at least 32",
            ),
            "prefix_attention": (not self.prefix_attention or window is None, "must be false with attention_window"),
            "norm_eps": (self.norm_eps > 0, "must be positive"),
            "test_time_noise": (self.test_time_noise >= 0, "must not be negative"),
        }
        for name, (fulfilled, fix) in checks.items():
            require(fulfilled, name, getattr(self, name), fix)
        for name in ("full_attention_layers", "value_tables", "value_gates"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        if self.block.attention_scale == self.head_dim**-0.5:
            object.__setattr__(self, "block", dataclasses.replace(self.block, attention_scale=None))
        named = "embed_dim / num_heads" if self.head_width is None else "head_width"
        require(self.head_dim % 2 == 0, named, self.head_dim, "must be even for rotary positions")

    @property
    def head_dim(self) -> int:
        """Width Q of one head."""
        return self.embed_dim // self.num_heads if self.head_width is None else self.head_width

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all blocks in the order in which they first run."""
        parts = {"prelude": self.prelude_layers, "core": self.core_layers, "coda": self.coda_layers}
        return tuple(f"{part}_{j}" for part, count in parts.items() for j in range(count))

    @property
    def value_layers(self) -> tuple[str, ...]:
        """Names of the blocks that use value embeddings."""
        return tuple(self.layers[i] for i in self.value_tables if i in self.value_gates)

    @property
    def low_layers(self) -> int:
        """Blocks of the second stack."""
        return self.core_layers if self.loop.low_cycles else 0

    @property
    def core_calls(self) -> int:
        """Blocks that one recurrence runs; each has keys and values of its own in the cache."""
        return self.core_layers + self.low_layers * self.loop.low_cycles

    @property
    def state_dim(self) -> int:
        """Width of the latent state: embed_dim for each stack of a recurrence."""
        return self.embed_dim * (2 if self.loop.low_cycles else 1)

    @property
    def start_scale(self) -> float:
        """Noise of the initial state over that of the paper, whose standard deviation is sqrt(2 / 5)."""
        return 1.0 if self.loop.start_std is None else self.loop.start_std / 0.4**0.5

    @property
    def kv_heads(self) -> int:
        """Key/value heads K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def key_value_widths(self) -> tuple[int, int]:
        """Elements of one token's keys and of its values in one layer's cache.

        With `qk_bias` there is a key per query head, because the bias on keys is per query head (docs/model.md, Block).
        """
        return (self.num_heads if self.qk_bias else self.kv_heads) * self.head_dim, self.kv_heads * self.head_dim

    @property
    def rows(self) -> int:
        """Rows of the embedding, and columns V of the logits."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size

    def for_vocabulary(self, size: int) -> ModelConfig:
        """The same model for a tokenizer of `size` entries: ids that it does not have become padding rows."""
        if size >= self.vocab_size:
            return self
        return dataclasses.replace(self, vocab_size=size, padded_vocab_size=self.rows)


ExitName = Literal[
    "kl", "gated_kl", "min_p_kl", "entropy_diff", "latent_diff", "cosine", "argmax_stability", "gate", "acceleration"
]
"""Names of exit rules on command lines (`rdlm.exits.named`)."""


def check_threshold(exit: str, threshold: float | None) -> None:
    """Refuse a threshold together with `--exit none`, and one that no rule can have. Raises InputError."""
    if exit == "none" and threshold is not None:
        raise InputError(f"--threshold {threshold:g}: --exit none has no threshold; leave one of them out")
    fine = threshold is None or 0 <= threshold < math.inf
    require(fine, "--threshold", threshold, "must be a finite number, not negative")


def is_count(value: object) -> bool:
    """Whether a value is an integer in [1, 2**31), of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 1 <= int(value) < 2**31


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """Which keys and values of earlier tokens a core query sees (docs/semantics.md, Cache policy).

    At recurrence i, from 0, a token writes set i mod `recurrences`; `recurrences=None` keeps a set for every one. If an
    earlier token exited before it wrote the set, "latest" reads its highest set below, and "skip" hides the token.

    dtype: "int8" rounds every key and value vector to 8 bits an element, with one scale per head (docs/quantize.md).
    None: that of activations.
    """

    recurrences: int | None = None
    lookup: Literal["latest", "skip"] = "latest"
    dtype: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        check_types(self, "CachePolicy.")
        require(
            self.recurrences is None or is_count(self.recurrences),
            "CachePolicy.recurrences",
            self.recurrences,
            "must be None (keep every recurrence) or at least 1",
        )
        require(
            self.lookup == "latest" or self.recurrences is None,
            "CachePolicy.lookup",
            self.lookup,
            f"'skip' needs the sets of all recurrences: set recurrences=None instead of {self.recurrences}",
        )

    def sets(self, num_steps: int) -> int:
        """Key/value sets per core layer when at most `num_steps` recurrences run."""
        return num_steps if self.recurrences is None else min(self.recurrences, num_steps)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen (docs/semantics.md, Generate). Every field: a value, or one per prompt.

    temperature 0 is greedy; top_k 0, top_p 1.0, min_p 0.0, repetition_penalty 1.0, presence_penalty 0.0,
    frequency_penalty 0.0, min_tokens 0, logit_bias () and stop_tokens () are off.
    `stop_tokens`: a tuple of ids, or one tuple per prompt. `logit_bias`: a tuple of pairs (id, number to add to its
    logit), or one tuple per prompt. `min_tokens`: new tokens before which none of `stop_tokens` is chosen.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    repetition_penalty: float | Sequence[float] = 1.0
    stop_tokens: Sequence[Any] = ()
    presence_penalty: float | Sequence[float] = 0.0
    frequency_penalty: float | Sequence[float] = 0.0
    min_tokens: int | Sequence[int] = 0
    logit_bias: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Drafts by the same model at fewer recurrences, verified at full depth from the states of the drafts.

    draft_steps: recurrences per drafted token. lookahead: tokens drafted before each verification. threshold: 1.0
    accepts exactly the tokens of greedy decoding at full depth; a lower one also accepts drafts whose verified
    probability is at least threshold times the largest (greedy rows only; sampled rows always keep their distribution).
    """

    draft_steps: int
    lookahead: int
    threshold: float = 1.0

    def __post_init__(self) -> None:
        check_types(self, "Speculative.")
        for name in ("draft_steps", "lookahead"):
            value = getattr(self, name)
            require(is_count(value), f"Speculative.{name}", value, "must be an integer, at least 1")
        real = isinstance(self.threshold, numbers.Real)
        require(real and 0 < self.threshold <= 1, "Speculative.threshold", self.threshold, "must be in (0, 1]")


FreezeRule = Literal["latent_diff", "cosine", "acceleration", "argmax_stability", "fixed"]
"""Exit rules that `Parallel` names; any other is given as `exit_rule`."""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A window of unfinished tokens, refined together (docs/parallel.md).

    window: unfinished positions per prompt, the one whose token is the last final one included. inner: recurrences of
    an outer step, after which every token is drawn again and the rule is asked. headway: positions that enter per outer
    step. rule, threshold: when a position is done; None: `exit_rule` if it is given, else latent_diff at 0.03. fixed:
    after `threshold` recurrences (None: num_steps), whatever its token did. freeze: "prefix" lets positions leave in
    order, at the latest num_steps recurrences after their token changed; "last" is the published code's way: a position
    that is done makes all tokens up to its own final.
    noise: share of fresh noise mixed into a state before every outer step, divided by 1 + its recurrences
    (schedule "damped") or not ("constant"). ema: share of the earlier embeddings in the injected one.
    """

    window: int = 32
    inner: int = 4
    headway: int = 1
    threshold: float | None = None
    rule: FreezeRule | None = None
    freeze: Literal["prefix", "last"] = "prefix"
    noise: float = 0.0
    schedule: Literal["damped", "constant"] = "damped"
    ema: float = 0.0

    def __post_init__(self) -> None:
        check_types(self, "Parallel.")
        for name in ("window", "inner", "headway"):
            value = getattr(self, name)
            require(is_count(value), f"Parallel.{name}", value, "must be an integer, at least 1")
        require(
            self.headway <= self.window, "Parallel.headway", self.headway, f"must be at most window = {self.window}"
        )
        require(
            self.freeze == "prefix" or self.window > 1,
            "Parallel.window",
            self.window,
            "must be at least 2 with freeze = 'last', where a position that is done stays in the window",
        )
        for name in ("noise", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"Parallel.{name}", value, "must be in [0, 1)")
        threshold = self.threshold
        require(threshold is None or threshold >= 0, "Parallel.threshold", threshold, "must not be negative")
