"""Kinds of engines, requests that come and go, and what `generate` makes of the same requests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from oracle import random_params

from rdlm import exits
from rdlm.config import CachePolicy, ModelConfig, Sampling
from rdlm.decode import Engine, generate
from rdlm.model import cast, tensor_parallel

TINY = ModelConfig(
    vocab_size=40, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1,
    coda_layers=1, max_length=32, mean_recurrence=6,
)  # fmt: skip
LOCAL = dataclasses.replace(TINY, attention_window=3)
NOISY = dataclasses.replace(TINY, test_time_noise=0.05, test_time_noise_type="chi")
R, NEW, MANY = 8, 6, 12  # most recurrences and new tokens, and requests served together


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model, an engine, and the range its thresholds are drawn from."""

    config: ModelConfig
    rule: object  # threshold -> ExitRule, or None
    thresholds: tuple[float, float]
    shared: dict  # options that `generate` knows too
    lanes: int = 8
    every: int = 3
    ticks: int = 5
    dtype: str = "float32"


KINDS = {
    "latest, kl": Kind(TINY, exits.kl, (0.001, 0.1), {"cache": CachePolicy()}),
    "skip, gated kl": Kind(
        TINY, lambda t: exits.gated_kl(t, 20 * t), (0.003, 0.05),
        {"cache": CachePolicy(lookup="skip"), "check_every": 2}, every=1, ticks=9,
    ),
    "3 sets, latent_diff, window": Kind(
        LOCAL, exits.latent_diff, (0.05, 0.4), {"cache": CachePolicy(3), "warm_start": "raw"}, lanes=3, ticks=2
    ),
    "latest, twice, noisy": Kind(
        NOISY, lambda t: exits.twice(exits.latent_diff(t)), (0.1, 0.6),
        {"cache": CachePolicy(), "prefill_exit": "never", "init_scale": 0.5}, lanes=7, every=2, ticks=3,
    ),
}  # fmt: skip


EXACT = list(KINDS)
KINDS["bf16"] = dataclasses.replace(KINDS["latest, kl"], dtype="bfloat16")
KINDS["int8"] = dataclasses.replace(KINDS["latest, kl"], shared={"cache": CachePolicy(dtype="int8")})


@functools.cache
def params(dtype="float32"):
    return cast(random_params(TINY, seed=2), dtype)


def new_engine(kind, tensor=1, data=1, **options):
    k = KINDS[kind]
    model = tensor_parallel(params(k.dtype), k.config, tensor, data)
    rule = None if k.rule is None else k.rule(np.float32(0.1))
    options = k.shared | {"lanes": k.lanes, "flush_every": k.every, "ticks_per_step": k.ticks} | options
    return Engine(*model, max_new_tokens=NEW, num_steps=R, exit_rule=rule, **options)


engine = functools.cache(new_engine)  # one engine serves all examples: lanes are never clean


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request, the step of the engine before which it comes, and the one before which it is cancelled, if at all."""

    prompt: tuple[int, ...]
    new: int = NEW
    threshold: float = 0.1
    depth: int = R
    least: int = 0
    sampling: Sampling = Sampling()
    seed: int = 0
    comes: int = 0
    leaves: int | None = None
    priority: int = 0


def submit(engine, kind, ask, **options):
    rule = KINDS[kind].rule
    return engine.submit(
        ask.prompt, max_new_tokens=ask.new, num_steps=ask.depth, min_steps=ask.least, sampling=ask.sampling,
        exit_rule=rule and rule(np.float32(ask.threshold)), key=jax.random.key(ask.seed), priority=ask.priority,
        **options,
    )  # fmt: skip


def outcome(served):
    """(tokens, steps, prompt steps) of a request, so far."""
    return served.tokens, served.steps, [] if served.prompt_steps is None else served.prompt_steps.tolist()


def serve(kind, batch, engine):
    """What becomes of requests that come and go while the engine runs."""
    served, at, more = [None] * len(batch), 0, True
    while more or at <= max(ask.comes for ask in batch):
        for i, ask in enumerate(batch):
            if ask.comes == at:
                served[i] = submit(engine, kind, ask)
            if ask.leaves == at:
                served[i].cancel()
        more, at = engine.step(), at + 1
    assert all(s.done for s in served)
    return served


def held_by(engine, lane):
    """Keys and values of a lane's finished tokens, in the order of positions, and their depths."""
    cache, pages = engine._running.lanes.cache, np.asarray(engine._running.lanes.pages[lane])
    n, size = int(cache.length[lane]), engine._running.lanes.page_sizes.size
    at = pages[np.arange(n) // size], np.arange(n) % size
    rows = [np.asarray(x)[..., *at, :] for x in jax.tree.leaves((cache.prelude, cache.core, cache.coda))]
    return [*rows, np.asarray(cache.depth)[lane, :n, None]]


def alone(kind, ask, engine):
    return outcome(*serve(kind, [dataclasses.replace(ask, comes=0, leaves=None)], engine))


def generated(kind, batch, **options):
    """What `generate` makes of the same requests in one batch."""
    k = KINDS[kind]
    sampling = {f.name: [getattr(ask.sampling, f.name) for ask in batch] for f in dataclasses.fields(Sampling)}
    out = generate(
        params(k.dtype), k.config, [ask.prompt for ask in batch], max_new_tokens=NEW,
        num_steps=[ask.depth for ask in batch],
        exit_rule=k.rule and k.rule(np.array([ask.threshold for ask in batch], np.float32)),
        min_steps=[ask.least for ask in batch], sampling=Sampling(**sampling),
        key=jnp.stack([jax.random.key(ask.seed) for ask in batch]), **k.shared, **options,
    )  # fmt: skip
    rows = zip(batch, out.tokens, out.steps, out.prompt_steps, strict=True)
    return [(t[: ask.new].tolist(), s[: ask.new].tolist(), p.tolist()) for ask, t, s, p in rows]


def crowd(kind, seed=0):
    """Requests with nothing special about them, more than there are lanes."""
    rng = np.random.default_rng(seed)
    return [
        Ask(
            tuple(rng.integers(0, TINY.vocab_size, rng.integers(1, 17)).tolist()), seed=i, comes=int(rng.integers(4)),
            threshold=float(rng.uniform(*KINDS[kind].thresholds)), depth=int(rng.integers(2, R + 1)),
        )
        for i in range(MANY)
    ]  # fmt: skip
