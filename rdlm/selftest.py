"""Does this machine compute the right thing, and how fast? The checks of `experiments/selftest.py`.

Numbers are compared with a forward pass in NumPy that shares no code with the model, kernels with their plain twins,
speeds with the chip's datasheet or, where it is not known, with what the machine reaches in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from rdlm import sharding
from rdlm.config import PRESETS, MeshConfig, ModelConfig, RunConfig, one_line, preset
from rdlm.decode import generate
from rdlm.decode.passes import next_power
from rdlm.model import Params, cast, forward, init_params, kernels
from rdlm.model.attention import HIDDEN, KeysValues, causal_bias, softmax_attention
from rdlm.optim import optimizer
from rdlm.perf import flops, hlo
from rdlm.report.page import number
from rdlm.runtime import exchange
from rdlm.runtime.memory import free_memory
from rdlm.train.roofline import lower_train_step, state_bytes
from rdlm.train.step import init_state, state_shardings


@dataclasses.dataclass(frozen=True)
class Check:
    """What was measured, and what it must be. value: None if it was not, NaN after an error; `note` says why."""

    name: str
    value: float | None
    unit: str = ""
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """ok, FAILED, skipped, or "-" where nothing is expected."""
        if self.value is None:
            return "skipped"
        low, high = self.least is None or self.value >= self.least, self.most is None or self.value <= self.most
        return "-" if self.least is self.most is None else "ok" if low and high else "FAILED"

    def cells(self) -> tuple[str, str, str, str]:
        """Name, value, what it must be, and verdict, as text."""
        value = "" if self.value is None else f"{number(self.value)} {self.unit}"
        limits = {"at least": self.least, "at most": self.most}
        expected = ", ".join(f"{words} {number(limit)}" for words, limit in limits.items() if limit is not None)
        return self.name, f"{value} {self.note and f'({self.note})'}".strip(), expected, self.verdict


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of the checks: heads (number, width), tokens, bytes copied, rows decoded, and the preset that trains."""

    dtype: Literal["float32", "bfloat16"]
    heads: tuple[tuple[int, int], ...]
    length: int
    side: int
    copied: int
    batch: int
    new_tokens: int
    preset: str
    speeds: bool = True  # whether they are expected


CHIP = Sizes("bfloat16", ((8, 128), (40, 128), (55, 96)), 2048, 8192, 2**30, 16, 64, "small")
CPU = Sizes("float32", ((8, 128), (11, 96)), 256, 1024, 2**28, 4, 8, "small")
QUICK = Sizes("float32", ((2, 32),), 256, 256, 2**22, 2, 4, "nano", speeds=False)
LEAST = {"matmul": 0.5, "memory": 0.5, "training": 0.2, "decoding": 0.25, "interconnect": 0.6}
"""Shares of what the hardware allows below which something is wrong: chosen, not yet measured on TPUs."""
MOST = {"float32": 1e-4, "bfloat16": 0.05}
"""Relative errors above which numbers are wrong."""
COMPILING = 180.0
"""Seconds to allow for compiling a large preset."""


class Peaks(NamedTuple):
    """FLOP/s and bytes/s of one device: of its datasheet if that is known, otherwise measured."""

    flops: float
    memory: float
    chip: flops.Chip | None


def seconds(run: Callable[[], object]) -> float:
    """Of the fastest of three runs, after one that compiles."""
    jax.block_until_ready(run())
    found = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return min(found)


def error(ours: Any, right: Any) -> float:
    """The largest relative error of arrays, root mean square."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return float(np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in wide]))


# Numbers

Attention = Callable[..., Array]
GOLDEN = ModelConfig(96, 64, 4, 96, 1, 2, 1, num_kv_heads=2, max_length=128, mean_recurrence=4)


def golden_weights() -> Params:
    """Weights of `GOLDEN`, the same everywhere: every one matters, and the recurrence settles."""
    rng = np.random.default_rng(20)

    def draw(path: Any, x: Any) -> np.ndarray:
        name, noise = jax.tree_util.keystr(path), rng.normal(size=x.shape)
        if "scale" in name or "bias" in name:
            return ("scale" in name) + 0.2 * noise
        noise[0] *= 0.5 if "adapter" in name else 1.0  # the half that multiplies the state
        return noise / np.sqrt(x.shape[-1 if "wte" in name else -2])

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(GOLDEN, jax.random.key(0))))


def plain_logits(config: ModelConfig, w: Params, tokens: np.ndarray, r: int) -> np.ndarray:
    """Logits [L, V] of one text at r recurrences from the zero state, by the formulas of docs/model.md in float64."""
    H, K, Q, L = config.num_heads, config.kv_heads, config.head_dim, len(tokens)
    turns = np.exp(1j * np.arange(L)[:, None] * config.rope_base ** (-np.arange(0, Q, 2) / Q))[:, None]

    def norm(x: np.ndarray, weight: Params) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight["scale"]

    def turn(x: np.ndarray) -> np.ndarray:
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    def block(x: np.ndarray, name: str) -> np.ndarray:
        p = w[name]
        qkv = (norm(x, p["norm_1"]) @ p["attn"]["qkv"]).reshape(L, K, H // K + 2, Q)
        k, v = (np.repeat(qkv[:, :, i], H // K, axis=1) for i in (-2, -1))
        q, k = turn(qkv[:, :, :-2].reshape(L, H, Q) + p["attn"]["qk_bias"][0]), turn(k + p["attn"]["qk_bias"][1])
        scores = np.einsum("lhq,thq->hlt", q, k) / np.sqrt(Q)
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tril(np.ones((L, L)))
        mixed = np.einsum("hlt,thq->lhq", weights / weights.sum(-1, keepdims=True), v).reshape(L, H * Q)
        x = norm(mixed @ p["attn"]["proj"] + x, p["norm_2"])
        gate, up = (norm(x, p["norm_3"]) @ part for part in p["mlp"]["fc"])
        return norm((gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["proj"] + x, p["norm_4"])

    prelude, core, coda = ([name for name in config.layers if name.startswith(p)] for p in ("prelude", "core", "coda"))
    e = functools.reduce(block, prelude, w["wte"][tokens] * np.sqrt(config.embed_dim))
    s = np.zeros_like(e)
    for _ in range(r):
        s = functools.reduce(block, core, s @ w["adapter"][0] + e @ w["adapter"][1])
    return norm(functools.reduce(block, coda, norm(s, w["ln_f"])), w["ln_f"]) @ w["wte"].T


def numbers() -> Iterator[Check]:
    """Logits and greedy tokens of every device of this process against NumPy."""
    w, r = golden_weights(), GOLDEN.mean_recurrence
    tokens = np.random.default_rng(21).integers(0, GOLDEN.vocab_size, 96)
    right, text = plain_logits(GOLDEN, w, tokens, r), tokens[:24].tolist()
    for _ in range(12):
        text.append(int(plain_logits(GOLDEN, w, np.array(text), r)[-1].argmax()))
    for device in jax.local_devices():
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            for dtype, most in MOST.items():
                params, zero = cast(w, dtype), np.zeros((1, 96, GOLDEN.embed_dim))
                out = jax.jit(forward, static_argnums=1)(params, GOLDEN, tokens[None], jnp.int32(r), state=zero)
                found = error(out.logits[0], right)
                yield Check(f"logits, {dtype}, device {device.id}", found, "relative error", most=most)
            params = cast(w, "float32")
            made = generate(params, GOLDEN, [text[:24]], max_new_tokens=12, num_steps=r, init_scale=0.0)
            same = sum(a == b for a, b in zip(made.tokens[0].tolist(), text[24:], strict=True))
            yield Check(f"greedy tokens, device {device.id}", same, "of 12 equal", least=12)


def kernel_checks(sizes: Sizes) -> Iterator[Check]:
    """Every function of `rdlm.model.kernels` against its plain twin."""
    on_tpu = jax.default_backend() == "tpu"

    def biased(attend: Attention) -> Attention:
        return lambda q, k, v, ids: attend(q, k, v, causal_bias(ids, q.shape[1]))

    whole: dict[str, Attention] = {
        "attend": biased(kernels.attend),
        "attend_in_training": biased(kernels.attend_in_training),
        "attend_flash": functools.partial(kernels.attend_flash, interpret=not on_tpu),
    }
    cached: dict[str, Attention] = {
        "attend_cached": second_set(kernels.attend_cached),
        "attend_stored": second_set(functools.partial(kernels.attend_stored, interpret=not on_tpu)),
        "attend_copied": second_set(kernels.attend_copied),
        "attend_filled": second_set(kernels.attend_filled),
        "attend_flat": kernels.attend_flat,
    }
    plain = with_gradients(biased(lambda q, k, v, bias: softmax_attention(q, (k, v, bias))))
    pairs = {name: (with_gradients(attend), plain) for name, attend in whole.items()}
    pairs |= {name: (over_cache(attend), over_cache(softmax_attention)) for name, attend in cached.items()}
    for H, Q in sizes.heads:
        shape, keys = (1, sizes.length, H, Q), jax.random.split(jax.random.key(0), 4)
        given = [jax.random.normal(key, shape).astype(sizes.dtype) for key in keys]
        for name, (ours, right) in pairs.items():
            if name == "attend_flash" and jax.default_backend() == "gpu":
                yield Check(name, None, note="runs on TPUs")
                continue
            few = [x[:, :128] for x in given] if name == "attend_flash" and not on_tpu else given  # interpreted: slow
            made = jax.jit(ours)(*few)
            with jax.default_matmul_precision("highest"):
                found = error(made, jax.jit(right)(*(x.astype(jnp.float32) for x in few)))
            yield Check(f"{name}, {H} heads of {Q}", found, "relative error", most=MOST[sizes.dtype])
    x, mask = jnp.arange(4096.0).reshape(2, 2048), jnp.array([True, False])
    moved = jax.jit(lambda x: [kernels.row_major(x), kernels.updated_in_place(x), kernels.after(x, mask)])(x)
    yield Check("row_major, updated_in_place, after", error(moved, [x, x, mask]), "relative error", most=0.0)


def with_gradients(attend: Attention) -> Callable[..., Any]:
    """Output and gradients of an attention over two texts in a row, of q, k, v and what weighs the output."""

    def loss(q: Array, k: Array, v: Array, read: Array) -> tuple[Array, Array]:
        L = q.shape[1]
        out = attend(q, k, v, jnp.where(jnp.arange(L) < 3 * L // 5, 1, 2)[None])
        return (out.astype(jnp.float32) * read.reshape(out.shape).astype(jnp.float32)).sum(), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def second_set(attend: Callable[..., Array]) -> Attention:
    """`attend`, which reads a cache as it is stored, of whose two sets the second holds what counts."""

    def run(q: Array, new: KeysValues, past: KeysValues) -> Array:
        k, v, bias = past
        assert isinstance(k, Array)
        assert isinstance(v, Array)
        more, wide = -k.shape[1] % kernels.STORED_TILE, -(k.shape[2] * k.shape[3]) % kernels.STORED_TILE
        k, v = (jnp.pad(x.reshape(*x.shape[:2], -1), ((0, 0), (0, more), (0, wide))) for x in (k, v))
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, more)), constant_values=HIDDEN)
        return attend(q, new, kernels.Stored(jnp.stack([-k, k]), jnp.stack([-v, v]), jnp.int32(1)), bias)

    return run


def over_cache(attend: Attention) -> Attention:
    """The attention of one token over itself and some of those before it, in two rows: over the first three quarters in
    a text, and over the first quarter in the same text backwards."""

    def run(q: Array, k: Array, v: Array, _: Array) -> Array:
        q, k, v = (jnp.concatenate([x, x[:, ::-1]]) for x in (q, k, v))
        L = q.shape[1]
        filled = jnp.array([3 * L // 4, L // 4])
        seen = jnp.where(jnp.arange(L - 1)[None] < filled[:, None], 0.0, HIDDEN)[:, None]
        return attend(q[:, -1:], (k[:, -1:], v[:, -1:], jnp.zeros((1, 1, 1))), (k[:, :-1], v[:, :-1], seen))

    return run


# Speed


def machine(sizes: Sizes) -> tuple[Peaks, list[Check]]:
    """What one device reaches at matrix products and at copies."""
    side, n = sizes.side, 10
    a, x = jnp.full((side, side), 1 / side, sizes.dtype), jnp.ones(sizes.copied // 4)
    products = jax.jit(lambda a: jax.lax.fori_loop(0, n, lambda _, b: a @ b, a))
    copies = jax.jit(lambda x: jax.lax.fori_loop(0, n, lambda _, x: x + 1, x))
    speed = n * 2 * side**3 / seconds(lambda: products(a))
    bandwidth = n * 2 * sizes.copied / seconds(lambda: copies(x))
    chip = flops.chip(jax.devices()[0].device_kind)
    least = (LEAST["matmul"] * chip.flops / 1e9, LEAST["memory"] * chip.memory / 1e9) if chip else (None, None)
    return Peaks(chip.flops, chip.memory, chip) if chip else Peaks(speed, bandwidth, None), [
        Check(f"matrix product, {side}^3, {sizes.dtype}", speed / 1e9, "GFLOP/s", least=least[0]),
        Check("memory, read and written", bandwidth / 1e9, "GB/s", least=least[1]),
    ]


def as_run(name: str, sizes: Sizes) -> RunConfig:
    """The preset with one sequence for each device, its parameters split over all of them."""
    base, count = preset(name), jax.device_count()
    length = min(base.data.sequence_length, sizes.length)
    data = dataclasses.replace(base.data, batch_size=count, microbatches=1, sequence_length=length)
    model = dataclasses.replace(base.model, compute_dtype=sizes.dtype)
    return dataclasses.replace(base, model=model, data=data, mesh=MeshConfig(1, count))


def training(name: str, sizes: Sizes, peaks: Peaks, twice: bool) -> Iterator[Check]:
    """Three steps of a preset: memory against what the compiler said, model FLOP/s, and the bits of two runs."""
    run, label = as_run(name, sizes), f"training {name}"
    mesh, tx = sharding.make_mesh(run.mesh, run.model), optimizer(run.optimizer, run.steps)
    program = lower_train_step(run, list(mesh.devices.flat)).compile()
    begin = jax.jit(lambda: init_state(run, tx), out_shardings=state_shardings(run, tx, mesh)[1])
    shape, before = (run.data.batch_size, run.data.sequence_length), peak_memory()

    def rows() -> dict[str, Array]:
        at, row = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (1, 0))
        text = jax.random.randint(jax.random.key(1), shape, 0, run.model.vocab_size)
        labels, ones = jnp.roll(text, -1, axis=1), jnp.ones_like(at)
        return {"tokens": text, "labels": labels, "segment_ids": ones, "positions": at, "sequence_ids": row}

    batch = jax.jit(rows, out_shardings=sharding.batch_sharding(mesh))()

    def steps(count: int) -> tuple[list[float], float, int]:
        """(share of the peak in each step, first loss, sum of all bits after the first)."""
        state, shares, loss, found = begin(), [], math.nan, 0
        for i in range(count):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(program(state, batch, frozen={}))
            spent = time.perf_counter() - start
            done = flops.training_flops(run.model, float(metrics["n"]), float(metrics["k"]), shape[1])
            shares.append(done * shape[1] / spent / peaks.flops)
            if i == 0:
                loss, found = float(metrics["loss"]), int(jax.jit(bits)(state.params))
        return shares, loss, found

    shares, loss, found = steps(3)
    yield Check(f"{label}, first loss", loss, "nats per token", least=0.0)
    least = LEAST["training"] if sizes.speeds else None
    yield Check(f"{label}, {shape[1]} tokens a device", max(shares[1:]), "of the peak (MFU)", least=least)
    needed, after = hlo.Program.of(program).peak, peak_memory()
    shown = None if after in (None, before) else after / 2**30
    note = f"predicted {needed / 2**30:.2f} GiB{'' if shown else '; the device does not say'}"
    yield Check(f"{label}, memory", shown, "GiB", most=1.1 * needed / 2**30 + 0.1, note=note)
    if twice:
        yield Check(f"{label}, bits of two runs", float(steps(1)[2] == found), "equal", least=1.0)


def bits(tree: Any) -> Array:
    """The sum of all bits of arrays, each taken as an integer."""
    whole = [jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.add, [x.sum(dtype=jnp.uint32) for x in whole])


def peak_memory() -> int | None:
    """Bytes that this process has had on its first device at most; None: it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def largest(sizes: Sizes, peaks: Peaks, left: float) -> Iterator[Check]:
    """Training of the largest preset that fits in memory, and in `left` seconds."""
    count, free = jax.device_count(), free_memory()
    models = {name: flops.parameters(run.model) for name, run in PRESETS.items() if name != "finetune"}
    larger = sorted(models, key=lambda name: -models[name])

    def fits(name: str) -> bool:
        run = as_run(name, sizes)
        gathered = 4 * flops.core_parameters(run.model) if count > 1 else 0
        needed = state_bytes(run, jax.devices()) + 4 * models[name] / count + gathered
        length, k = run.data.sequence_length, run.model.backprop_depth
        step = length * flops.training_flops(run.model, run.model.mean_recurrence - k + 1, k, length)
        spent = 6 * step / peaks.flops / LEAST["training"] + COMPILING
        return (free is None or needed < 0.9 * free) and spent < left

    found = next(filter(fits, larger[: larger.index(sizes.preset)]), "")
    if name := exchange(found)[0]:  # processes must agree
        yield from training(name, sizes, peaks, twice=False)
    else:
        yield Check("training the largest preset", None, note=f"none above {sizes.preset} fits in memory and time")


def decoding(sizes: Sizes, peaks: Peaks) -> Iterator[Check]:
    """Tokens/s at a fixed depth on one device against what reading weights and cache allows."""
    config = dataclasses.replace(preset(sizes.preset).model, compute_dtype=sizes.dtype)
    B, new, r = sizes.batch, sizes.new_tokens, config.mean_recurrence
    params = jax.jit(lambda: cast(init_params(config, jax.random.key(0)), sizes.dtype))()

    def make(count: int) -> Any:
        return generate(params, config, [list(range(1, 17))] * B, max_new_tokens=count, key=jax.random.key(0))

    spent = (seconds(lambda: make(new + 1).tokens) - seconds(lambda: make(1).tokens)) / new
    token = flops.Decoding(B, r, 1, next_power(16 + new + 1))
    read = token.total(token.parts(config, jnp.dtype(sizes.dtype).itemsize))
    bound = B / max(read / peaks.memory, token.flops(config) / peaks.flops)
    least = LEAST["decoding"] * bound if sizes.speeds else None
    note = f"{B / spent / bound:.2f} of the roofline"
    yield Check(f"decoding {sizes.preset}, {B} rows, r = {r}", B / spent, "tokens/s", least=least, note=note)
    same = np.array_equal(np.array(make(new).log_probs), np.array(make(new).log_probs))
    yield Check("decoding, bits of two runs", float(same), "equal", least=1.0)


def interconnect(sizes: Sizes, peaks: Peaks) -> Iterator[Check]:
    """Bytes/s that a chip receives from the others in an all-gather and in an all-reduce."""
    devices, N = jax.devices(), jax.device_count()
    if N == 1:
        yield Check("interconnect", None, note="one device")
        return
    mesh = jax.make_mesh((N,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    least, chip = None, peaks.chip
    if chip:
        reached = flops.links([device.coords for device in devices], chip.axes)
        least = LEAST["interconnect"] * chip.interconnect * reached / 1e9
    size, whole = sizes.copied // (16 * N) * (4 * N), PartitionSpec()
    ways: dict[str, tuple[PartitionSpec, int, Callable[[Array], Array]]] = {
        "all-gather": (PartitionSpec("all"), 1, lambda x: jax.lax.all_gather(x, "all", tiled=True)),
        "all-reduce": (whole, 2, lambda x: jax.lax.psum(x, "all")),
    }
    for name, (placed, times, body) in ways.items():
        run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=placed, out_specs=whole, check_vma=False))
        x = jax.jit(lambda: jnp.ones(size // 4), out_shardings=NamedSharding(mesh, placed))()
        speed = times * size * (N - 1) / N / seconds(functools.partial(run, x)) / 1e9
        yield Check(f"interconnect, {name} over {N}", speed, "GB/s received", least=least)


def every_check(sizes: Sizes, until: float, say: Callable[[str], None]) -> list[Check]:
    """All checks; one that ends with an error has failed, and the next begins.

    until: value of `time.monotonic` after which no larger preset is tried. say: shows what begins.
    """
    found: list[Check] = []
    peaks = Peaks(1e9, 1e9, None)

    def attempt(name: str, checks: Callable[[], Iterator[Check]]) -> None:
        say(f"{name} ...")
        try:
            found.extend(checks())
        except Exception as problem:  # of any kind: the page must be written
            found.append(Check(name, math.nan, most=0.0, note=f"{type(problem).__name__}: {one_line(problem)}"))

    def measured() -> Iterator[Check]:
        nonlocal peaks
        peaks, checks = machine(sizes)
        yield from checks

    attempt("numbers", numbers)
    attempt("machine", measured)
    attempt(f"training {sizes.preset}", lambda: training(sizes.preset, sizes, peaks, twice=True))
    if sizes.speeds:
        attempt("training the largest preset", lambda: largest(sizes, peaks, until - time.monotonic()))
    attempt("decoding", lambda: decoding(sizes, peaks))
    attempt("kernels", lambda: kernel_checks(sizes))
    attempt("interconnect", lambda: interconnect(sizes, peaks))
    return found
