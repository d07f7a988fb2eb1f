"""Options of a batch of prompts: checked, and spread over rows as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Int32, Key

from rdlm.config import InputError, ModelConfig, Sampling
from rdlm.decode.passes import check_prefill_exit, next_power
from rdlm.decode.program import host
from rdlm.decode.sampling import SamplingArrays, as_arrays, per_row
from rdlm.exits import Counts, Depth, ExitRule
from rdlm.model import check_depth, check_ids, check_rule, check_shape, typed_key
from rdlm.model.inputs import as_array, check_integers, check_type, shown

Prompt = Sequence[int] | np.ndarray
_SAMPLES = 0x73616D70  # separates the samples of a prompt from the other uses of its key
_ADJUSTING = ("presence_penalty", "frequency_penalty", "min_tokens")  # of Sampling
WarmStart = Literal[False, "normalized", "raw"]
"""From where a token's state starts, if not from noise: its predecessor's last one, after ln_f or before."""


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """How `generate` and the engine serve requests; the fields are arguments of `rdlm.generate`."""

    num_steps: Counts | None = None
    exit_rule: ExitRule | None = None
    prefill_exit: str = "per_token"
    min_steps: Counts = 0
    check_every: int = 1
    sampling: Sampling = Sampling()
    warm_start: WarmStart = False
    init_scale: float = 1.0
    key: ArrayLike | None = None
    prefix: bool | Sequence[bool] = False
    any_shape: bool = False  # one shape for requests with and without biases and constraints
    likeliest: bool = False  # also find the likeliest tokens at every position; the engine alone gives them


class Constraint(Protocol):
    """Says which tokens may come next in the output of one request, such as those of a grammar.

    Every request needs one of its own. `generate` raises what either method raises. `Engine.submit` raises what the
    first `allowed()` raises; later, what either method raises ends the request with that error.
    """

    def allowed(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 is set if token i may come next; V = vocab_size."""

    def accept(self, token: int) -> None:
        """Called with every token of the output that does not end the request."""


class Request(NamedTuple):
    """Options of a batch of prompts, as arrays with one row per prompt: no value recompiles."""

    depth: Depth  # of every token
    init_scale: Array  # f32 [B]
    keys: Array  # [B]
    sampling: SamplingArrays
    prefix: Array  # bool [B], whether the tokens of the prompt see each other in both directions
    likeliest: Array  # bool [B], see `RequestOptions`


def as_requests(
    config: ModelConfig,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    options: RequestOptions = RequestOptions(),
    samples: int = 1,
) -> tuple[Request, list[Int32[np.ndarray, "_"]]]:
    """Check everything, with messages that name the prompt: (request of len(prompts) rows, the prompts).

    With several samples, those of a prompt are rows that follow each other.

    Raises:
      InputError: see `rdlm.generate`.
    """
    check_type("config", config, ModelConfig)
    check_type("sampling", options.sampling, Sampling)
    if not isinstance(prompts, (Sequence, np.ndarray, Array)) or isinstance(prompts, (str, bytes)):
        raise InputError(f"prompts = {shown(prompts)}: must be a list of prompts, each a sequence of token ids")
    if len(prompts) == 0:
        raise InputError("prompts: at least one is needed")
    check_shape("max_new_tokens", max_new_tokens, ())
    check_integers("max_new_tokens", max_new_tokens, 1)
    max_new_tokens = int(max_new_tokens)
    rows = [_ids(config, prompt, f"prompts[{i}]", max_new_tokens) for i, prompt in enumerate(prompts)]
    check_prefill_exit(options.prefill_exit)
    if options.warm_start not in (False, "normalized", "raw"):
        raise InputError(f"warm_start = {options.warm_start!r}: must be False, 'normalized' or 'raw'")
    B, rule = len(rows), options.exit_rule
    check_rule(rule, B, options.min_steps, options.check_every)
    num_steps = config.mean_recurrence if options.num_steps is None else options.num_steps
    check_depth(num_steps)
    num_steps = per_row(num_steps, B, "num_steps", np.int32)
    min_steps = per_row(options.min_steps, B, "min_steps", np.int32)
    sampling = as_arrays(options.sampling, B, config.vocab_size if options.any_shape else None)
    if (largest := int(np.max(sampling.bias_tokens, initial=-1))) >= config.vocab_size:
        raise InputError(f"Sampling.logit_bias: {largest} is no token; ids are below {config.vocab_size}")
    if options.key is None and np.any(np.asarray(options.sampling.temperature) > 0):
        raise InputError("Sampling.temperature > 0 needs key=jax.random.key(seed)")
    keys = typed_key(options.key)
    if keys.ndim > 1 or (keys.ndim == 1 and len(keys) != B):
        raise InputError(f"key: expected one key or {B}, got shape {keys.shape}")
    check_shape("samples", samples, ())
    check_integers("samples", samples, 1)
    check_every = per_row(options.check_every, B, "check_every", np.int32)
    scale = per_row(options.init_scale, B, "init_scale", np.float32)

    prefix = np.asarray(as_array(options.prefix))
    if prefix.dtype != bool or prefix.shape not in ((), (B,)):
        raise InputError(f"prefix = {shown(options.prefix)}: must be true or false, or one of them per prompt")
    if prefix.any() and not config.prefix_attention:
        raise InputError("prefix: every token of this model sees only those before it (prefix_attention is false)")

    def each(values: ArrayLike) -> Array:
        return host(np.repeat(np.asarray(values), samples, axis=0))

    # Thresholds always have a row each, so that one for all and one per prompt share a compiled program.
    by_row = None if rule is None else rule.by_row(B * samples)
    depth = Depth(each(num_steps), by_row, each(min_steps), each(check_every))
    keys = sample_keys(jnp.broadcast_to(keys, (B,)), samples)
    sampling = jax.tree.map(each, sampling)
    prefix = np.broadcast_to(prefix, (B,))
    likeliest = each(np.full(B, options.likeliest))
    arrays = each(scale), keys, sampling, each(prefix), likeliest
    return Request(depth, *arrays), [row for row in rows for _ in range(samples)]


def stacked(rows: Sequence[Request]) -> Request:
    """Requests of one row each as one of many."""
    return jax.tree.map(lambda *x: (np if isinstance(x[0], np.ndarray) else jnp).concatenate(x), *rows)


def check_rows(depth: Depth, rows: int) -> None:
    """Refuse a rule of which every row cannot have its own. Raises InputError."""
    if any(np.shape(leaf)[:1] != (rows,) for leaf in jax.tree.leaves(depth)):
        kind = depth.rule and depth.rule.kind
        raise InputError(
            f"exit_rule: {kind!r} has weights without an axis of rows, so requests cannot have their own; override its "
            "by_row"
        )


def check_alike(row: Request, idle: Request) -> None:
    """Refuse a request that an engine's programs do not serve: of other shapes or dtypes than `idle`, its own."""
    theirs, ours = row.depth, idle.depth
    kinds: list[object] = [jax.tree.structure(depth) for depth in (theirs, ours)]
    if kinds[0] != kinds[1]:
        other, kind = (None if depth.rule is None else depth.rule.kind for depth in (theirs, ours))
        raise InputError(f"exit_rule: this engine serves {kind!r}; another kind, {other!r}, needs another engine")
    for leaf, other_leaf in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        if (leaf.shape, leaf.dtype) != (other_leaf.shape, other_leaf.dtype):
            raise InputError(
                f"exit_rule: weights of {leaf.dtype} {list(leaf.shape[1:])}, but this engine serves those of "
                f"{other_leaf.dtype} {list(other_leaf.shape[1:])}"
            )
    if row.sampling.stop_tokens.shape != idle.sampling.stop_tokens.shape:
        width = idle.sampling.stop_tokens.shape[1]
        raise InputError(f"Sampling.stop_tokens: the engine serves at most {width} per request")
    if row.keys.dtype != idle.keys.dtype:
        raise InputError(f"key: {row.keys.dtype}, but this engine's are {idle.keys.dtype}")


def check_unadjusted(option: str, sampling: Sampling) -> None:
    """Refuse what changes logits by the tokens of the row so far, for a sampler that chooses several at once."""
    used = {name: bool(np.any(np.asarray(getattr(sampling, name)) != 0)) for name in _ADJUSTING}
    used["logit_bias"] = any(len(x) for x in sampling.logit_bias)
    for name in (name for name, is_used in used.items() if is_used):
        raise InputError(f"{option}: cannot be combined with Sampling.{name}; leave one of them out")


def sample_keys(keys: Key[Array, "B"], samples: int) -> Key[Array, "B*{samples}"]:
    """A key for every sample of every row: the row's own for its first, so that one sample is as without."""
    if samples == 1:
        return keys
    many = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, _SAMPLES), samples))(keys)
    return many.at[:, 0].set(keys).ravel()


def _ids(config: ModelConfig, prompt: Prompt, name: str, max_new_tokens: int) -> Int32[np.ndarray, "_"]:
    try:
        row = np.asarray(prompt)
    except (ValueError, OverflowError) as error:  # lists of different lengths
        raise InputError(f"{name}: must be a non-empty 1-D sequence of token ids, not nested lists") from error
    if row.ndim != 1 or row.size == 0:
        raise InputError(f"{name}: must be a non-empty 1-D sequence of token ids, got shape {row.shape}")
    if not np.issubdtype(row.dtype, np.integer):
        raise InputError(f"{name}: token ids must be integers, got {row.dtype}")
    check_ids(name, row, config)
    if row.size + max_new_tokens > config.max_length:
        raise InputError(
            f"{name}: {row.size} tokens + max_new_tokens = {max_new_tokens} exceed "
            f"config.max_length = {config.max_length}"
        )
    return row.astype(np.int32)


def check_constraint(constraint: object, sampling: Sampling) -> None:
    """Refuse what is no `Constraint`, or contradicts it. Raises InputError."""
    methods = (getattr(constraint, name, None) for name in ("allowed", "accept"))
    if isinstance(constraint, type) or not all(map(callable, methods)):
        raise InputError(f"constraint = {constraint!r}: must be an object with the methods allowed() and accept(token)")
    if np.any(np.asarray(sampling.min_tokens) != 0):
        raise InputError("constraint: cannot be combined with Sampling.min_tokens; leave one of them out")


def allowed_next(constraint: Constraint, vocab_size: int) -> np.ndarray:
    """What a constraint allows, uint32 [ceil(V / 32)].

    Raises:
      InputError: another shape or dtype, or no token at all.
    """
    words = np.asarray(constraint.allowed())
    shape = (-(-vocab_size // 32),)
    if words.dtype != np.uint32 or words.shape != shape:
        raise InputError(f"constraint: allows {words.dtype} {list(words.shape)}; must be uint32 {list(shape)}")
    known = words.copy()
    known[-1] &= np.uint32((1 << ((vocab_size - 1) % 32 + 1)) - 1)
    if not known.any():
        raise InputError("constraint: allows no token; it must allow one, such as an end of the text")
    return known


class Constraints:
    """The constraints of a batch.

    Args:
      given: one for each row, or None for those without; for one row, it alone.
      rows: of the batch.
      options: of the batch.

    Raises:
      InputError: not as many as there are rows, or what `Engine.submit` refuses.
    """

    def __init__(self, given: Constraint | Sequence[Constraint | None], rows: int, options: RequestOptions):
        self._each: list[Constraint | None] = list(given) if isinstance(given, Sequence) else [given]
        found = [each for each in self._each if each is not None]
        for each in found:
            check_constraint(each, options.sampling)
        if len(self._each) != rows or len({id(each) for each in found}) < len(found):
            raise InputError(f"constraint: give a list of {rows}, one object or None for each new text")

    def follow(self, request: Request, tokens: Mapping[int, int], vocab_size: int) -> Request:
        """Take note of these tokens, by row, and let only such tokens come next in these rows as may."""
        for row, token in tokens.items():
            if (constraint := self._each[row]) is not None:
                constraint.accept(token)
        return self.restrict(request, tokens, vocab_size)

    def restrict(self, request: Request, rows: Iterable[int], vocab_size: int) -> Request:
        """Let only such tokens come next in these rows as may; the others need none."""
        count = len(request.keys)  # rows that fill up a batch are free
        allowed, constrained = np.zeros((count, -(-vocab_size // 32)), np.uint32), np.zeros(count, bool)
        constrained[: len(self._each)] = [constraint is not None for constraint in self._each]
        for row in rows:
            if (constraint := self._each[row]) is not None:
                allowed[row] = allowed_next(constraint, vocab_size)
        sampling = request.sampling._replace(constrained=host(constrained), allowed=host(allowed))
        return request._replace(sampling=sampling)


def not_finite(name: str, made: int) -> InputError:
    """For a request that has no next token, after `made`: its logits are NaN or infinite."""
    return InputError(
        f"{name}: the logits of new token {made + 1} are not finite; either weights are NaN or infinite, or sums "
        "overflow: try rdlm.cast(params, 'float32')"
    )


def padded(
    rows: Sequence[Int32[np.ndarray, "_"]], max_length: int
) -> tuple[Int32[np.ndarray, "{len(rows)} L"], list[int]]:
    """Prompts as one array, padded on the right to a length that many batches share, and their lengths."""
    lengths = [row.size for row in rows]
    tokens = np.zeros((len(rows), min(next_power(max(lengths), 16), max_length)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths
