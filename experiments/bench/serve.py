"""How fast is the server, and how much of its engine's speed reaches its clients?

    python experiments/bench/serve.py runs/quickstart --long-prompt 900
    python experiments/bench/serve.py models/smollm2 --streams 16 --rates 0.5 2 --json bench.json

The server, its clients and the engine that it is compared with share this process and one set of compiled programs. The
clients are sockets that read streams, so their share of the processor counts against the server. Prompts are random
tokens, and no answer ends early. Tables:

  closed loop   so many streams, each asks again as soon as it is answered: the server and its engine alone, fed the
                same requests in the same way, take turns. `of the engine` compares their fastest turns.
  open loop     requests arrive at random, so many per second in the mean, whether or not others are done
  long prompt   one stream less than there are lanes, and prompts of --long-prompt tokens that arrive one after another

TTFT is the time to the first token, TPOT the mean time per token after it, ITL the time from one event of a stream to
the next, in milliseconds; tokens that come together are one event. Hardware: any; two CPU cores take some ten minutes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import jax
import numpy as np
import tyro

from rdlm.config import ExitName, InputError, require
from rdlm.decode import Engine
from rdlm.decode.served import Served
from rdlm.runtime import keep_compiled_programs, parse_arguments, run_command, write_output
from rdlm.serve import ServeOptions, in_thread
from rdlm.serve.server import Background

Row = dict[str, object]
TOGETHER = 1e-3
"""Seconds within which tokens are one event: the engine delivers those of a step at once."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, of the model in FOLDER."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Run folder or Hugging Face folder."""
    streams: tuple[int, ...] = (1, 4, 16, 64)
    """Closed loop: requests in flight; no values: without these tables."""
    rates: tuple[float, ...] = ()
    """Open loop: requests per second."""
    requests: int = 0
    """Requests of a turn; 0: two per stream, at least four."""
    prompt_tokens: tuple[int, int] = (16, 64)
    """Least and most tokens of a prompt."""
    new_tokens: tuple[int, int] = (32, 64)
    """Least and most new tokens."""
    long_prompt: int = 2000
    """Tokens of the long prompts; 0: without this table."""
    turns: int = 3
    lanes: int = 16
    max_context: int | None = None
    """None: as the server chooses."""
    steps: int | None = None
    """Recurrences per token; None: as the server chooses."""
    exit: Literal["none"] | ExitName = "none"
    """Exit rule, with its own threshold."""
    json: Path | None = None
    """Write all rows to this file too."""


@dataclasses.dataclass
class Request:
    """A request and when its tokens came, in seconds."""

    prompt: list[int]
    new_tokens: int
    sent: float = 0.0
    events: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # (time, tokens)

    def heard(self, tokens: int) -> None:
        """So many tokens have come. Those that come together are one event."""
        now = time.perf_counter()
        if self.events and now - self.events[-1][0] < TOGETHER:
            now, before = self.events.pop()
            tokens += before
        self.events.append((now, tokens))

    @property
    def first(self) -> float:
        """When the first token came."""
        return self.events[0][0]

    @property
    def last(self) -> float:
        """When the last token came."""
        return self.events[-1][0]

    @property
    def per_token(self) -> float:
        """Seconds for each token after those of the first event."""
        return (self.last - self.first) / max(sum(n for _, n in self.events[1:]), 1)

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) from each event to the next."""
        times = [at for at, _ in self.events]
        return list(itertools.pairwise(times))


Turn = list[Request]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Draws requests."""

    options: Options
    vocab_size: int

    def draw(self, count: int, seed: int) -> Turn:
        """So many requests, the same ones for the same seed."""
        rng, o = np.random.default_rng(seed), self.options
        lengths = rng.integers(o.prompt_tokens[0], o.prompt_tokens[1] + 1, count)
        new = rng.integers(o.new_tokens[0], o.new_tokens[1] + 1, count)
        return [self.one(rng, int(n), int(k)) for n, k in zip(lengths, new, strict=True)]

    def one(self, rng: np.random.Generator, length: int, new_tokens: int) -> Request:
        """A request with a prompt of this length."""
        return Request(rng.integers(0, self.vocab_size, length).tolist(), new_tokens)


async def ask(url: str, request: Request) -> None:
    """Read one streamed answer.

    Raises:
      RuntimeError: it is no answer, or not complete.
    """
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    body = json.dumps(
        {
            "prompt": request.prompt,
            "max_tokens": request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    )
    head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request.sent = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    last = b""
    async for line in reader:
        if line.startswith(b"data: {"):
            last = line
            if tokens := len(json.loads(line[6:])["choices"][0]["steps"]):
                request.heard(tokens)
        elif not request.events and line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
            raise RuntimeError(f"the server answered {line.decode().strip()}: {(await reader.read()).decode()}")
    writer.close()
    if sum(n for _, n in request.events) != request.new_tokens:
        raise RuntimeError(f"the answer ended early: {last.decode().strip()}")


async def closed_loop(url: str, turn: Turn, streams: int) -> None:
    """So many streams share the requests."""
    waiting = iter(turn)

    async def stream() -> None:
        for request in waiting:
            await ask(url, request)

    await asyncio.gather(*(stream() for _ in range(streams)))


async def open_loop(url: str, turn: Turn, rate: float) -> None:
    """Requests arrive as a Poisson process."""
    pauses = np.random.default_rng(0).exponential(1 / rate, len(turn))

    async def later(request: Request, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await ask(url, request)

    await asyncio.gather(*(later(r, s) for r, s in zip(turn, np.cumsum(pauses).tolist(), strict=True)))


def engine_alone(engine: Engine, num_steps: int, turn: Turn, streams: int) -> None:
    """The same without a server, at its depth: as many requests in flight as there would be streams."""
    waiting, flying = iter(turn), list[Served]()

    def submit(request: Request) -> Served:
        request.sent = time.perf_counter()
        return engine.submit(
            request.prompt,
            max_new_tokens=request.new_tokens,
            num_steps=num_steps,
            on_token=lambda token, steps: request.heard(1),
        )

    while True:
        flying = [served for served in flying if not served.done]
        for _, request in zip(range(streams - len(flying)), waiting, strict=False):
            flying.append(submit(request))
        if not flying:
            return
        engine.step()


async def with_long_prompts(url: str, turn: Turn, long: Turn, streams: int) -> None:
    """Streams, and in the midst of them long prompts, one after another."""

    async def arrive() -> None:
        while not all(request.events for request in turn[:streams]):
            await asyncio.sleep(0.01)
        for request in long:
            await ask(url, request)

    await asyncio.gather(closed_loop(url, turn, streams), arrive())


def percentiles(name: str, seconds: list[float]) -> Row:
    """Median and 99th percentile in milliseconds."""
    found = [float(np.percentile(seconds, q)) * 1e3 if seconds else float("nan") for q in (50, 99)]
    return {f"{name} p50": found[0], f"{name} p99": found[1]}


def speed(turn: Turn) -> float:
    """New tokens per second, from the first request to the last token."""
    tokens = sum(request.new_tokens for request in turn)
    return tokens / (max(r.last for r in turn) - min(r.sent for r in turn))


def latencies(turn: Turn) -> Row:
    """TTFT, TPOT and ITL of a turn."""
    gaps = [end - begin for request in turn for begin, end in request.gaps if end > begin]
    first = percentiles("TTFT", [r.first - r.sent for r in turn])
    return first | percentiles("TPOT", [r.per_token for r in turn]) | percentiles("ITL", gaps)


def default_depth(server: Background) -> int:
    """Recurrences of a request that does not say, or the most of them."""
    return server.service.depths.choose(None, None, None, None).num_steps


def closed_rows(server: Background, work: Workload, streams: int) -> Iterator[Row]:
    """The server and its engine alone, taking turns; each one's fastest."""
    o = work.options
    count = o.requests or max(2 * streams, 4)
    (engine,), depth = server.service.worker.engines.values(), default_depth(server)
    ways: dict[str, Callable[[Turn], None]] = {
        "engine": lambda turn: engine_alone(engine, depth, turn, streams),
        "server": lambda turn: asyncio.run(closed_loop(server.url, turn, streams)),
    }
    best: dict[str, Turn] = {}
    for i in range(o.turns + 1):  # the first compiles, so it does not count
        for name, way in ways.items():
            turn = work.draw(count, seed=i)
            way(turn)
            if i and (name not in best or speed(turn) > speed(best[name])):
                best[name] = turn
    for name, turn in best.items():
        row: Row = {"streams": streams, "": name, "tokens/s": speed(turn)}
        yield row | {"of the engine": speed(turn) / speed(best["engine"])} | latencies(turn)


def open_row(url: str, work: Workload, rate: float) -> Row:
    """The server where requests arrive at random."""
    turn = work.draw(work.options.requests or 32, seed=0)
    asyncio.run(open_loop(url, turn, rate))
    return {"requests/s": rate, "tokens/s": speed(turn)} | latencies(turn)


def split_gaps(turn: Turn, reading: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Seconds from event to event while no long prompt was being read, and while one was."""
    gaps = [gap for request in turn for gap in request.gaps if gap[1] > gap[0]]
    found: tuple[list[float], list[float]] = [], []
    for begin, end in gaps:
        found[any(begin < to and end > since for since, to in reading)].append(end - begin)
    return found


def long_row(url: str, work: Workload) -> Row:
    """What others notice of long prompts: the times between their events, when one is read and when none is."""
    o, streams = work.options, max(work.options.lanes - 1, 1)
    rng = np.random.default_rng(0)
    asyncio.run(ask(url, work.one(rng, o.long_prompt, 2)))  # compiles
    turn = work.draw(max(o.requests, 4 * streams), seed=1)
    long = [work.one(rng, o.long_prompt, 2) for _ in range(o.turns)]
    asyncio.run(with_long_prompts(url, turn, long, streams))
    quiet, beside = split_gaps(turn, [(request.sent, request.first) for request in long])
    if not quiet or not beside:
        raise InputError("requests: too few to tell what a long prompt changes; give more")
    row: Row = {"streams": streams, "prompt": o.long_prompt}
    row |= percentiles("TTFT", [r.first - r.sent for r in long])
    row |= percentiles("ITL", quiet) | percentiles("ITL beside", beside)
    return row | {"p99 beside / p50": float(np.percentile(beside, 99) / np.percentile(quiet, 50))}


def show(title: str, rows: list[Row]) -> None:
    """A table on standard output."""
    print(f"\n{title}")

    def cell(value: object) -> str:
        return f"{value:,.2f}" if isinstance(value, float) else str(value)

    widths = [max(len(name), *(len(cell(row[name])) for row in rows)) for name in rows[0]]
    for cells in (list(rows[0]), *([cell(value) for value in row.values()] for row in rows)):
        print("  " + "  ".join(text.rjust(width) for text, width in zip(cells, widths, strict=True)), flush=True)


def check(o: Options) -> None:
    """Refuse what cannot be measured."""
    require(min((o.turns, *o.streams)) >= 1, "turns, streams", (o.turns, *o.streams), "must be at least 1")
    require(all(rate > 0 for rate in o.rates), "rates", o.rates, "must be positive")
    for name in ("requests", "long_prompt"):
        require(getattr(o, name) >= 0, name, getattr(o, name), "must not be negative")
    for name in ("prompt_tokens", "new_tokens"):
        least, most = getattr(o, name)
        require(1 <= least <= most, name, (least, most), "must be two numbers from 1 on, the smaller one first")


def main() -> int:
    o = parse_arguments(Options, prog="serve.py", description=__doc__)
    check(o)
    from rdlm.run import find  # JAX takes seconds, so only now

    keep_compiled_programs()
    run = find(o.folder)
    queue = max(*o.streams, o.requests, 64)
    options = ServeOptions(
        lanes=o.lanes, max_context=o.max_context, steps=o.steps, exit=(o.exit,), max_queue=queue, access_log=False
    )
    room, most = options.resolved(run.config).max_context or 0, o.prompt_tokens[1] + o.new_tokens[1]
    for name, value in (("prompt_tokens, new_tokens", most), ("long_prompt", o.long_prompt and o.long_prompt + 2)):
        require(value <= room, name, value, f"exceed the context of {room}; lower them")
    found: dict[str, list[Row]] = {}
    with in_thread(run, options) as server:
        server.wait_until_ready()
        depth = default_depth(server)
        work = Workload(o, run.config.vocab_size)
        print(
            f"{run.folder.name}, {jax.devices()[0].device_kind}, {o.lanes} lanes, num_steps = {depth}, {o.turns} turns"
        )

        def report(title: str, rows: list[Row]) -> None:
            found[title] = rows
            show(title, rows)

        for streams in o.streams:
            report(f"closed loop, {streams} streams", list(closed_rows(server, work, streams)))
        if o.rates:
            report("open loop", [open_row(server.url, work, rate) for rate in o.rates])
        if o.long_prompt:
            report("long prompt", [long_row(server.url, work)])
    if o.json is not None:
        write_output(o.json, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
