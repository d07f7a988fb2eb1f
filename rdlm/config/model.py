"""The shape of the model, and the options of cache, sampling and speculative decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from rdlm.config.errors import InputError, require

DTYPES = ("float32", "bfloat16", "float16")
NOISES = ("fixed", "geom", "sqrt", "line", "chi")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a recurrent-depth model (docs/model.md, Block). Hashable, so it can be a static argument of `jit`."""

    vocab_size: int
    """Number of tokens in the tokenizer."""
    embed_dim: int
    """Width D of the residual stream and the latent state."""
    num_heads: int
    """Query heads H; must divide embed_dim."""
    mlp_dim: int
    """Width F of the gated MLP."""
    prelude_layers: int = 2
    """Blocks of the prelude, run once."""
    core_layers: int = 4
    """Blocks of the core, run in every recurrence with the same weights."""
    coda_layers: int = 2
    """Blocks of the coda, run once."""
    num_kv_heads: int | None = None
    """Key/value heads K; must divide num_heads. None: as many as query heads."""
    padded_vocab_size: int | None = None
    """Rows of the embedding (and columns of the logits). None: vocab_size."""
    max_length: int = 4096
    """Maximum number of positions."""
    rope_base: float = 50000.0
    """Base of the rotary frequencies."""
    attention_window: int | None = None
    """Tokens that a query sees: itself and those directly before it. None: all before it."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    qk_bias: bool = True
    """Learned bias on queries and keys, per query head, before rotary."""
    tie_embeddings: bool = True
    """The head is the transposed embedding."""
    mean_recurrence: int = 32
    """Mean r of training, and the default depth at test time."""
    backprop_depth: int = 8
    """b: the recurrences with gradient in a training step are at most b, or 2 b with some schemes of drawing them."""
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype in which parameters are initialised and stored."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of matrix products and activations. None: that of the parameters."""
    test_time_noise: float = 0.0
    """Noise mixed into the state before each recurrence at test time (docs/model.md, Test-time noise); 0 is off."""
    test_time_noise_type: Literal["fixed", "geom", "sqrt", "line", "chi"] = "fixed"
    """Schedule of the test-time noise over recurrences."""

    def __post_init__(self) -> None:
        # An explicit default is stored as None, so that equal shapes compare equal, and overriding only num_heads or
        # vocab_size also changes what follows from it.
        if self.num_kv_heads == self.num_heads:
            object.__setattr__(self, "num_kv_heads", None)
        if self.padded_vocab_size == self.vocab_size:
            object.__setattr__(self, "padded_vocab_size", None)
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
        checks = {
            "embed_dim": (above == self.embed_dim, f"must be a multiple of num_heads = {self.num_heads} (try {above})"),
            "num_kv_heads": (divides, f"must divide num_heads = {self.num_heads}"),
            "padded_vocab_size": (self.rows >= self.vocab_size, f"must be at least vocab_size = {self.vocab_size}"),
            "rope_base": (self.rope_base > 0, "must be positive"),
            "attention_window": (sees, "must be an integer of at least 1, or None to see every earlier token"),
            "norm_eps": (self.norm_eps > 0, "must be positive"),
            "test_time_noise": (self.test_time_noise >= 0, "must not be negative"),
            "test_time_noise_type": (self.test_time_noise_type in NOISES, f"must be one of {', '.join(NOISES)}"),
            "param_dtype": (self.param_dtype in DTYPES, f"must be one of {DTYPES}"),
            "compute_dtype": (
                self.compute_dtype in (None, *DTYPES),
                f"must be one of {DTYPES}, or None for the dtype of the parameters",
            ),
        }
        for name, (fulfilled, fix) in checks.items():
            require(fulfilled, name, getattr(self, name), fix)
        require(self.head_dim % 2 == 0, "embed_dim / num_heads", self.head_dim, "must be even for rotary positions")

    @property
    def head_dim(self) -> int:
        """Width Q of one head."""
        return self.embed_dim // self.num_heads

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


ExitName = Literal["kl", "gated_kl", "min_p_kl", "entropy_diff", "latent_diff", "cosine", "argmax_stability"]
"""Names of exit rules on command lines (`rdlm.exits.named`)."""


def check_threshold(exit: str, threshold: float | None) -> None:
    """Refuse a threshold together with `--exit none`. Raises InputError."""
    if exit == "none" and threshold is not None:
        raise InputError(f"--threshold {threshold:g}: --exit none has no threshold; leave one of them out")


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """Which keys and values of earlier tokens a core query sees (docs/semantics.md, Cache policy).

    At recurrence i, from 0, a token writes set i mod `recurrences`; `recurrences=None` keeps a set for every one. If an
    earlier token exited before it wrote the set, "latest" reads its highest set below, and "skip" hides the token.
    """

    recurrences: int | None = None
    lookup: Literal["latest", "skip"] = "latest"

    def __post_init__(self) -> None:
        require(
            self.recurrences is None or (isinstance(self.recurrences, int) and self.recurrences >= 1),
            "CachePolicy.recurrences",
            self.recurrences,
            "must be None (keep every recurrence) or at least 1",
        )
        require(self.lookup in ("latest", "skip"), "CachePolicy.lookup", self.lookup, "must be 'latest' or 'skip'")
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

    temperature 0 is greedy; top_k 0, top_p 1.0, min_p 0.0, repetition_penalty 1.0 and stop_tokens () are off.
    `stop_tokens`: a tuple of ids, or one tuple per prompt.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    repetition_penalty: float | Sequence[float] = 1.0
    stop_tokens: Sequence[Any] = ()


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
        require(self.draft_steps >= 1, "Speculative.draft_steps", self.draft_steps, "must be at least 1")
        require(self.lookahead >= 1, "Speculative.lookahead", self.lookahead, "must be at least 1")
        require(0 < self.threshold <= 1, "Speculative.threshold", self.threshold, "must be in (0, 1]")
