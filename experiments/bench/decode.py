"""What does adaptive decoding buy in wall-clock time, and what does each of its parts cost?

    python experiments/bench/decode.py                                   # runs/quickstart and runs/s3, everything
    python experiments/bench/decode.py --runs runs/quickstart --sections exits lanes --json bench.json

Needs trained runs: `make quickstart` makes runs/quickstart, `python experiments/studies/depth_scaling.py` makes runs/s3
(a model whose tokens need between 2 and 12 recurrences). All figures of a table are taken side by side in one process,
the variants taking turns; the fastest turn counts. Sections:

  fixed        batch 1 at r = 16 on random weights of D = 256 (8 heads, F = 704, V = 4096, 2/4/2 layers), against the
               time that streaming the weights takes at the matrix-vector bandwidth measured beside it
  exits        fixed r against exit rules at their default thresholds: tokens/s, mean recurrences, and how often the
               most likely next token is that of fixed r on the same text (teacher-forced)
  lanes        the engine with refill from a queue against lock-step batches, for thresholded exits and for tokens whose
               depth is drawn at random (geometric, mean 12 of 32)
  speculative  drafts by the same model: core passes in sequence per token, acceptance, tokens/s
  cache        bytes per cache policy

Hardware: any; two CPU cores take some ten minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import rdlm
from rdlm import exits
from rdlm.config import CachePolicy, InputError, ModelConfig, Speculative, preset
from rdlm.decode import Engine, Usage, generate
from rdlm.exits import ExitRule
from rdlm.model import Params, forward, init_params
from rdlm.perf import flops
from rdlm.runtime import parse_arguments, run_command

R = 32
RULES: dict[str, ExitRule | None] = {
    "fixed r": None,
    "kl": exits.kl(),
    "kl, twice": exits.twice(exits.kl()),
    "gated kl": exits.gated_kl(),
    "latent_diff": exits.latent_diff(),
}
Row = dict[str, object]
Served = tuple[list[list[int]], Usage | None]
"""Steps of every request, and counters of an engine."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    runs: tuple[str, ...] = ("runs/quickstart", "runs/s3")
    sections: tuple[Literal["fixed", "exits", "lanes", "speculative", "cache"], ...] = (
        "fixed",
        "exits",
        "lanes",
        "speculative",
        "cache",
    )
    lanes: tuple[int, ...] = (4, 16, 64)
    new_tokens: int = 64
    """Tokens made per request (in `lanes`: half as many to one and a half times as many)."""
    turns: int = 3
    json: str = ""
    """Write all rows to this file too."""


T = TypeVar("T")


def fastest(variants: Mapping[str, Callable[[], T]], turns: int) -> tuple[dict[str, float], dict[str, T]]:
    """Seconds of each variant's fastest turn, after one that compiles, and what that one returned."""
    results = {name: run() for name, run in variants.items()}
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(turns):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best, results


def fixed(turns: int) -> list[Row]:
    """Batch 1 at r = 16 against the bandwidth bound."""
    config, r, new = (
        ModelConfig(
            vocab_size=4096,
            embed_dim=256,
            num_heads=8,
            mlp_dim=704,
            prelude_layers=2,
            core_layers=4,
            coda_layers=2,
            max_length=256,
            mean_recurrence=16,
        ),
        16,
        64,
    )
    params = init_params(config, jax.random.key(0))
    prompt = np.arange(32) % config.vocab_size
    core = flops.core_bytes(config, 4)
    once = (config.prelude_layers + config.coda_layers) * flops.block_matrices(config) * 4
    once += (config.rows * config.embed_dim + config.embed_dim**2) * 4
    side = int((core / 4) ** 0.5)
    matrix = jnp.ones((side, side)) / side

    @jax.jit
    def products(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 200, lambda _, x: matrix @ x, x)

    best, _ = fastest(
        {
            "one": lambda: generate(params, config, [prompt], max_new_tokens=1, num_steps=r),
            "all": lambda: generate(params, config, [prompt], max_new_tokens=new + 1, num_steps=r),
            "products": lambda: jax.block_until_ready(products(jnp.ones(side))),
        },
        turns,
    )
    bandwidth = 200 * 4 * side**2 / best["products"]
    seconds = (best["all"] - best["one"]) / new
    bound = (r * core + once) / bandwidth
    return [
        {
            "tokens_per_second": 1 / seconds,
            "bound_tokens_per_second": 1 / bound,
            "of_the_bound": bound / seconds,
            "bandwidth_gb_per_second": bandwidth / 1e9,
        }
    ]


def trained(folder: str) -> tuple[Params, ModelConfig]:
    """A run's parameters, with room for long generations."""
    if not Path(folder).is_dir():
        made_by = "make quickstart" if folder == "runs/quickstart" else "python experiments/studies/depth_scaling.py"
        raise InputError(f"runs: {folder} does not exist; {made_by} makes it")
    run = rdlm.load(folder)
    return run.params, dataclasses.replace(run.config, max_length=max(run.config.max_length, 512))


def text(config: ModelConfig, folder: str, rows: int, length: int) -> np.ndarray:
    """Tokens [rows, length] like those the run was trained on."""
    if config.vocab_size < 16:  # the word problems of experiments/studies/depth_scaling.py
        from rdlm.tasks import WordProblem, batch

        return np.asarray(batch(WordProblem("S3", length=length - 1), seed=2_000_000, index=0, size=rows)["tokens"])
    data = rdlm.load(folder).validation()
    found = np.concatenate([batch["tokens"] for batch in data.batches(rows)])  # of one row each at least
    return np.asarray(found[:rows, :length])


def exits_table(params: Params, config: ModelConfig, tokens: np.ndarray, new: int, turns: int) -> list[Row]:
    """Fixed r against exit rules, batch 1."""
    prompt = tokens[0, :16]
    greedy = functools.partial(
        generate, params, config, [prompt], max_new_tokens=new + 1, num_steps=R, prefill_exit="never"
    )
    variants = {name: functools.partial(greedy, exit_rule=rule) for name, rule in RULES.items()}
    best, results = fastest(variants, turns)
    score = jax.jit(forward, static_argnames="config")
    right = np.argmax(score(params, config, tokens, jnp.int32(R)).logits, -1)
    rows = []
    for name, rule in RULES.items():
        out = score(params, config, tokens, jnp.int32(R), exit_rule=rule)
        rows.append(
            {
                "rule": name,
                "tokens_per_second": new / best[name],
                "speed_up": best["fixed r"] / best[name],
                "mean_steps": float(np.mean(results[name].steps[0][1:])),
                "agreement": float(np.mean(np.argmax(out.logits, -1) == right)),
                "mean_steps_teacher_forced": float(np.mean(out.steps)),
            }
        )
    return rows


class RandomDepth(exits.Reached):
    """Every token stops after a number of recurrences drawn from its own initial state: geometric, of mean 12."""

    threshold: exits.Threshold = 1.0

    def init(self, s0: jax.Array, vocab: int) -> jax.Array:
        """The drawn depth."""
        # The initial state is noise keyed by request and position; digits far behind its decimal point are uniform.
        uniform = jnp.mod(jnp.abs(s0[..., 0].astype(jnp.float32)) * 1000, 1.0)
        return jnp.ceil(jnp.log1p(-uniform * 0.999) / jnp.log1p(-1 / 12.0))

    def update(self, depth: jax.Array, seen: exits.Observation) -> tuple[jax.Array, jax.Array]:
        """1 once the depth is reached."""
        return depth, (seen.step >= depth).astype(jnp.float32)


def lanes_table(params: Params, config: ModelConfig, tokens: np.ndarray, o: Options) -> list[Row]:
    """The engine against lock-step batches and fixed-depth batches."""
    rules = {"kl": exits.kl(), "latent_diff": exits.latent_diff(), "random depth": RandomDepth()}
    return [lanes_row(params, config, tokens, o, B, name, rule) for B in o.lanes for name, rule in rules.items()]


def lanes_row(
    params: Params, config: ModelConfig, tokens: np.ndarray, o: Options, lanes: int, name: str, rule: ExitRule
) -> Row:
    """One queue of four requests per lane, served three ways."""
    rng, count, room = np.random.default_rng(0), 4 * lanes, o.new_tokens * 3 // 2 + 1
    prompts = [tokens[i % len(tokens), : rng.integers(4, 16)] for i in range(count)]
    news = rng.integers(o.new_tokens // 2, room, count)
    keys = jax.random.split(jax.random.key(1), count)

    def in_batches(rule: ExitRule | None) -> Served:
        steps: list[list[int]] = []
        for first in range(0, count, lanes):
            batch = slice(first, first + lanes)
            out = generate(
                params,
                config,
                prompts[batch],
                max_new_tokens=int(news[batch].max()),
                num_steps=R,
                exit_rule=rule,
                key=keys[batch],
            )
            steps += [s[:n].tolist() for s, n in zip(out.steps, news[batch], strict=True)]
        return steps, None

    def in_lanes() -> Served:
        engine = Engine(
            params,
            config,
            lanes=lanes,
            max_new_tokens=room,
            num_steps=R,
            exit_rule=rule,
            capacity=16 + room,
            max_queue=count,
        )
        served = [engine.submit(p, max_new_tokens=int(n), key=k) for p, n, k in zip(prompts, news, keys, strict=True)]
        engine.run()
        return [s.steps for s in served], engine.usage

    ways: dict[str, Callable[[], Served]] = {
        "lock-step": functools.partial(in_batches, rule),
        "lanes": in_lanes,
        "fixed r": functools.partial(in_batches, None),
    }
    best, results = fastest(ways, o.turns)
    (steps, usage), total = results["lanes"], int(news.sum())
    assert usage is not None  # the engine's
    mean = float(np.mean(np.concatenate(steps)))
    speed_up = best["fixed r"] / best["lanes"]
    return {
        "lanes": lanes,
        "rule": name,
        "lock_step_tokens_per_s": total / best["lock-step"],
        "lanes_tokens_per_s": total / best["lanes"],
        "over_lock_step": best["lock-step"] / best["lanes"],
        "over_fixed_r": speed_up,
        "ideal": R / mean,
        "of_the_ideal": speed_up * mean / R,
        "mean_steps": mean,
        "utilisation": usage.utilisation,
        "ticks": usage.ticks,
        "ticks_per_flush": usage.ticks / usage.flushes,
        "same_steps": float(np.mean([a == b for a, b in zip(steps, results["lock-step"][0], strict=True)])),
    }


def speculative_table(params: Params, config: ModelConfig, tokens: np.ndarray, new: int, turns: int) -> list[Row]:
    """Plain greedy against drafts of a few recurrences."""
    prompt = tokens[0, :16]
    settings: dict[str, Speculative | None] = {"plain": None}
    settings |= {f"draft {d}, look ahead {a}": Speculative(d, a) for d in (2, 4) for a in (4, 8)}
    greedy = functools.partial(generate, params, config, [prompt], max_new_tokens=new, num_steps=R)
    variants = {name: functools.partial(greedy, speculative=spec) for name, spec in settings.items()}
    best, results = fastest(variants, turns)
    plain, rows = results["plain"].tokens[0], []
    for name, spec in settings.items():
        out = results[name]
        passes = out.core_passes - R  # without the prompt's
        accepted = None
        if spec is not None:
            rounds = passes / (spec.lookahead * spec.draft_steps + R - spec.draft_steps)
            accepted = ((new - 1) / rounds - 1) / spec.lookahead
        rows.append(
            {
                "decoding": name,
                "tokens_per_second": new / best[name],
                "speed_up": best["plain"] / best[name],
                "core_passes_per_token": passes / (new - 1),
                "drafts_kept_per_round": accepted,
                "equal_to_plain": bool(np.array_equal(out.tokens[0], plain)),
            }
        )
    return rows


def cache_table() -> list[Row]:
    """Bytes per cache policy."""
    rows: list[Row] = []
    for name in ("huginn_3p5b", "quickstart"):
        config = preset(name).model
        for kept in (None, 8, 4, 1):
            size = flops.cache_bytes(config, CachePolicy(kept), R, 1, 1024, 2)
            rows.append({"model": name, "recurrences_kept": kept or R, "mib_per_1024_tokens": size / 2**20})
    return rows


def show(title: str, rows: list[Row]) -> None:
    """A table on standard output."""
    print(f"\n{title}")
    names = list(rows[0])

    def cell(value: object) -> str:
        return f"{value:,.3f}" if isinstance(value, float) else str(value)

    widths = [max(len(n), *(len(cell(r[n])) for r in rows)) for n in names]
    print("  " + "  ".join(n.rjust(w) for n, w in zip(names, widths, strict=True)))
    for r in rows:
        print("  " + "  ".join(cell(r[n]).rjust(w) for n, w in zip(names, widths, strict=True)), flush=True)


def main() -> None:
    o = parse_arguments(Options, prog="bench_decode.py", description=__doc__)
    if min(o.new_tokens, o.turns, *o.lanes) < 1:
        raise InputError("new_tokens, turns and lanes: must be at least 1")
    found: dict[str, list[Row]] = {}

    def report(title: str, rows: list[Row]) -> None:
        found[title] = rows
        show(title, rows)

    models = {folder: trained(folder) for folder in o.runs} if set(o.sections) - {"fixed", "cache"} else {}
    print(f"{jax.devices()[0].device_kind}, num_steps = {R}, {o.turns} turns each")
    if "fixed" in o.sections:
        report("fixed r = 16, batch 1, D = 256", fixed(o.turns))
    for folder, (params, config) in models.items():
        tokens = text(config, folder, rows=16, length=17 if config.vocab_size < 16 else 128)
        if "exits" in o.sections:
            report(f"exits: {folder}", exits_table(params, config, tokens, o.new_tokens, o.turns))
        if "speculative" in o.sections:
            report(f"speculative: {folder}", speculative_table(params, config, tokens, o.new_tokens, o.turns))
        if "lanes" in o.sections:
            report(f"lanes: {folder}", lanes_table(params, config, tokens, o))
    if "cache" in o.sections:
        report("cache, bf16", cache_table())
    if o.json:
        Path(o.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
