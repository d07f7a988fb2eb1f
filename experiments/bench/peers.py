"""This project beside transformers and the public reference: who is faster, when both compute the same?

    python experiments/bench/peers.py                                # a small model of Llama's type, made for it
    python experiments/bench/peers.py --model models/smollm2 --batch-size 1 --work prefill decode
    python experiments/bench/peers.py --reference reference/recpre   # the reference's modelling code too

Every peer is a process of its own that stays up. They are asked in turns, so only one of them works at a time, all with
the same number of threads, and loading and compiling is not measured. First both must compute the same: the logits of a
prompt, the greedy tokens behind it, with exits the recurrences too, and the loss of a training step. Work:

  prefill   the first token after a prompt of --prompt-tokens
  decode    --new-tokens greedy tokens after 16, one sequence, with a recurrent model at its mean depth
  adaptive  the same with the exit rule KL below 5e-4, checked after every recurrence (only with --reference)
  train     a step on --batch-size rows of --sequence-length tokens: forward, backward, AdamW

A ratio is their time over ours within one turn: above 1, this project is faster. The table has the median of the turns
and their range, and beside it the load: cores that were busy with anything else meanwhile. With more of it than
--max-load nothing is judged: the exit code is 1 at once, or after the table where the load came later. Where the load
cannot be read, so that nobody knows, it is 1 too, unless --max-load is given.

torch and transformers live in an environment of their own, in --folder. Where it does not exist, it is made, and what
that downloads is said first. Hardware: a CPU with Linux, which tells the load; two cores take some ten minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rdlm.config import InputError, ModelConfig, one_line, require
from rdlm.runtime import RunError, parse_arguments, run_command, write_output

PACKAGES = ("torch==2.14.1", "transformers==4.57.3", "tokenizers==0.22.2", "huggingface-hub==0.36.2", "numpy==2.4.6")
DOWNLOADS = (
    "{} and what they need: from PyPI 3.1 GB on Linux x86-64, whose wheels bring CUDA, and 5.6 GB in the folder; "
    "less than 0.3 GB elsewhere, or with PIP_INDEX_URL set to an index of CPU wheels"
)
SHORT = 16
"""Tokens of the prompt that is decoded from."""
PAUSE = 0.3
"""Seconds before a turn, in which threads of the other peer stop waiting for work."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference of logits over the largest logit, and of losses over their value."""
PROCESS = Path(__file__).with_name("peer_process.py")

Work = Literal["prefill", "decode", "adaptive", "train"]
Dtype = Literal["float32", "bfloat16"]
Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare."""

    model: Path | None = None
    """Hugging Face folder that both this project and transformers read; None: a model of 8 layers and D = 256."""
    reference: Path | None = None
    """Folder with the reference's raven_modeling_minimal.py and raven_config_minimal.py, which are run, perhaps with
    config.json and weights; without these, a model of D = 256 and 2/4/2 layers. None: without the reference."""
    folder: Path = Path("runs/peers")
    """For environment/, which is made where it does not exist, small models, and what the peers print."""
    work: tuple[Work, ...] = get_args(Work)
    dtypes: tuple[Dtype, ...] = get_args(Dtype)
    """Of weights and products; a training step keeps its weights in float32."""
    threads: int | None = None
    """Cores of each peer; None: all."""
    max_load: float | None = None
    """Cores that may be busy with something else; None: a tenth of all. Given, an unknown load is accepted too."""
    prompt_tokens: int = 256
    new_tokens: int = 64
    batch_size: int = 4
    sequence_length: int = 256
    turns: int = 5
    json: Path | None = None
    """Write all rows to this file too."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "batch_size", "sequence_length", "turns", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        for name in ("work", "dtypes"):
            require(bool(getattr(self, name)), name, (), "name at least one")
        require(self.max_load is None or self.max_load >= 0, "max_load", self.max_load, "must not be negative")

    @property
    def load(self) -> float:
        """Cores that may be busy with something else."""
        return 0.1 * cores() if self.max_load is None else self.max_load


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The machine


class Load:
    """Cores that have been busy, on average since the start, with anything but these processes and this one.

    Time that a virtual machine waits for its host counts as busy.
    """

    def __init__(self, *processes: int):
        self.processes = (os.getpid(), *processes)
        self.began = self._now()

    def others(self) -> float | None:
        """The load since the start; None where it cannot be read."""
        now = self._now()
        if now is None or self.began is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self.began, strict=True))
        return max(busy - own, 0.0) / max(wall, 1e-9)

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all cores, of our processes. None without /proc."""
        try:
            tick = os.sysconf("SC_CLK_TCK")
            user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
            own = 0
            for process in self.processes:
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])
            return time.monotonic(), (user + nice + system + sum(rest)) / tick, own / tick
        except OSError:
            return None


def require_quiet(o: Options, loads: list[float | None], then: str) -> None:
    """Raise RunError if one of these loads is too high, or unknown where the user gave no limit. then: what to do."""
    if None in loads and o.max_load is None:
        raise RunError(
            "the load cannot be read from /proc, and an unknown one judges nothing: give --max-load to compare anyway"
        )
    worst = max((load for load in loads if load is not None), default=0.0)
    if worst > o.load:
        raise RunError(
            f"{worst:.2f} of {cores()} cores were busy with something else, and more than --max-load {o.load:g} judges "
            f"nothing: {then}"
        )


def load_of_a_second() -> float | None:
    """The load now."""
    load = Load()
    time.sleep(1)
    return load.others()


def environment(folder: Path) -> Path:
    """The Python of an environment with torch and transformers, which is made if the folder does not exist."""
    python = folder / "bin/python"
    if python.exists():
        return python
    if folder.exists():
        raise InputError(f"{folder}: is no virtual environment (no bin/python); remove it, or give another --folder")
    print(f"making {folder}: pip downloads {DOWNLOADS.format(', '.join(PACKAGES))}", flush=True)
    pip = ["-m", "pip", "install", "--disable-pip-version-check", *PACKAGES]
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), *pip]):
        done = False
        try:
            done = subprocess.run(command, stdout=2, check=False).returncode == 0
        finally:
            if not done:
                shutil.rmtree(folder, ignore_errors=True)
        if not done:
            raise InputError(f"{folder}: could not be made (its reason is above); is there a network?")
    return python


# Models


def toy(folder: Path, config: ModelConfig, code: Path | None = None) -> Path:
    """A Hugging Face folder with random weights, made if it does not exist, and the modelling code beside them."""
    import jax

    import rdlm

    if not folder.exists():
        rdlm.save_huggingface(folder, rdlm.init_params(config, jax.random.key(0)), config)
    for file in code.glob("*.py") if code else ():
        shutil.copy(file, folder)
    return folder


def plain_toy(o: Options) -> Path:
    """A model of Llama's type."""
    from rdlm.hf import model_config

    fields = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704}
    fields |= {"num_attention_heads": 8, "num_hidden_layers": 8, "max_position_embeddings": 4096}
    return toy(o.folder / "llama", model_config({**fields, "tie_word_embeddings": True}))


def recurrent(o: Options, folder: Path) -> Path:
    """The reference's folder, or a small model beside a copy of its code."""
    if not (folder / "raven_modeling_minimal.py").is_file():
        raise InputError(f"reference = {folder}: has no raven_modeling_minimal.py; give the folder of the code")
    if (folder / "config.json").exists():
        return folder
    shape = ModelConfig(vocab_size=4096, embed_dim=256, num_heads=8, mlp_dim=704, mean_recurrence=16)
    return toy(o.folder / "recurrent", shape, folder)


# Peers


class Peer:
    """A process that is asked over pipes."""

    def __init__(self, name: str, command: list[str], log: Path):
        self.name, self.log = name, log
        hub = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(log.with_name("modules"))}
        pipe = subprocess.PIPE
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=os.environ | hub
            )

    def ask(self, do: str, **given: Any) -> Answer:
        """What the peer answers.

        Raises:
          RunError: an error of the peer, or its end.
        """
        into, out = self.process.stdin, self.process.stdout
        assert into is not None
        assert out is not None
        with contextlib.suppress(BrokenPipeError):
            into.write(json.dumps({"do": do, **given}) + "\n")
            into.flush()
        line = out.readline()
        if not line.endswith("\n"):
            said = self.log.read_text(errors="replace").strip().splitlines()
            last = one_line(said[-1]) if said else "it said nothing"
            raise RunError(
                f"{self.name}: ended with code {self.process.wait()} when asked to {do}: {last} ({self.log})"
            )
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise RunError(f"{self.name}: cannot {do}: {answer['error']} ({self.log})")
        return answer

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class Pair:
    """This project and a peer, with one model."""

    ours: Peer
    theirs: Peer
    folder: Path

    @property
    def both(self) -> tuple[Peer, Peer]:
        """Ours first."""
        return self.ours, self.theirs

    def ask(self, do: str, **given: Any) -> tuple[Answer, Answer]:
        """Ask one after the other."""
        time.sleep(PAUSE)
        ours = self.ours.ask(do, **given)
        time.sleep(PAUSE)
        return ours, self.theirs.ask(do, **given)


@contextlib.contextmanager
def started(o: Options, name: str, folder: Path, python: Path) -> Iterator[Pair]:
    """A pair, ended at the end."""
    threads, logs = o.threads or cores(), o.folder
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:

        def peer(name: str, python: str, kind: str) -> Peer:
            made = Peer(name, [python, str(PROCESS), kind, str(threads)], logs / f"{name}.log")
            stack.callback(made.end)
            return made

        yield Pair(peer("rdlm", sys.executable, "rdlm"), peer(name, str(python), "transformers"), folder)


# Do both compute the same?


def require_close(pair: Pair, dtype: Dtype, what: str, answers: tuple[Answer, Answer]) -> None:
    """Raise RunError unless both results of that name agree."""
    ours, theirs = (np.asarray(answer[what]) for answer in answers)
    if ours.shape != theirs.shape:
        raise RunError(
            f"{pair.theirs.name}: {what}: {theirs.size} numbers, and rdlm has {ours.size}; nothing is compared"
        )
    size, apart = float(np.abs(ours).max()), float(np.abs(ours - theirs).max())
    if not apart <= TOLERANCE[dtype] * size:  # NaN too
        raise RunError(
            f"{pair.theirs.name}: {what} and rdlm's are {apart:.2g} of {size:.2g} apart in {dtype}, more than "
            f"{TOLERANCE[dtype]:g} of it: they do not compute the same, so nothing is compared"
        )


def require_same_tokens(pair: Pair, dtype: Dtype, prompt: list[int], answers: tuple[Answer, Answer]) -> None:
    """Raise RunError where tokens or depths differ.

    The texts may part where two logits are closer than the dtype can tell; what follows is not compared.
    """
    ours, theirs = answers
    a, b = ours["tokens"], theirs["tokens"]
    if len(a) != len(b):
        raise RunError(f"{pair.theirs.name}: makes {len(b)} tokens, and rdlm {len(a)}; nothing is compared")
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    if same < len(a):
        logits = np.asarray(pair.ours.ask("logits", tokens=prompt + a[:same])["logits"])
        apart, size = abs(logits[a[same]] - logits[b[same]]), np.abs(logits).max()
        if apart > 2 * TOLERANCE[dtype] * size:
            raise RunError(
                f"{pair.theirs.name}: greedy token {same} is {b[same]} and rdlm's {a[same]} in {dtype}, whose logits "
                f"are {apart:.2g} apart: they do not compute the same, so nothing is compared"
            )
    if theirs["steps"] and same:
        depths = [float(np.mean(x["steps"][:same])) for x in (ours, theirs)]
        if abs(depths[0] - depths[1]) > 0.05 * depths[0]:
            raise RunError(
                f"{pair.theirs.name}: exits after {depths[1]:.2f} recurrences in the mean and rdlm after "
                f"{depths[0]:.2f} in {dtype}: they do not compute the same, so nothing is compared"
            )


# Measuring


@dataclasses.dataclass(frozen=True)
class Row:
    """Some work of a pair. ours, theirs: tokens/s, medians of the turns. least, most: of the ratio."""

    peer: str
    dtype: Dtype
    work: Work
    ours: float
    theirs: float
    ratio: float
    least: float
    most: float
    load: float | None  # None: unknown


def task(o: Options, work: Work, vocab: int) -> tuple[str, dict[str, Any]]:
    """What a peer is asked for one turn of some work: the method and its arguments."""
    rng = np.random.default_rng(0)
    if work == "train":
        return "train", {"rows": rng.integers(0, vocab, (o.batch_size, o.sequence_length + 1)).tolist()}
    length, new = (o.prompt_tokens, 1) if work == "prefill" else (SHORT, o.new_tokens)
    tokens = rng.integers(0, vocab, length).tolist()
    return "generate", {"tokens": tokens, "new_tokens": new, "adaptive": work == "adaptive"}


def tokens_of(o: Options, work: Work) -> int:
    """Tokens whose time is measured in one turn."""
    return {"prefill": o.prompt_tokens, "train": o.batch_size * o.sequence_length}.get(work, o.new_tokens)


def compare(o: Options, pair: Pair, dtype: Dtype) -> Iterator[Row]:
    """One row for each kind of work, after both have shown that they compute the same."""
    ours, theirs = pair.ask("load", folder=str(pair.folder), dtype=dtype, trusted=pair.theirs.name == "reference")
    vocab = min(ours["vocab"], theirs["vocab"])
    prompt = np.random.default_rng(1).integers(0, vocab, SHORT).tolist()
    logits = pair.ask("logits", tokens=prompt)
    require_close(pair, dtype, "logits", logits)
    for work in sorted(o.work, key=get_args(Work).index):  # a training step changes the weights, so it comes last
        if work == "adaptive" and pair.theirs.name != "reference":
            continue
        do, given = task(o, work, vocab)
        first = pair.ask(do, **given)  # this one compiles, so its time does not count
        if work == "train":
            require_close(pair, dtype, "loss", first)
        else:
            require_same_tokens(pair, dtype, given["tokens"], first)
        seconds: list[tuple[float, float]] = []
        load = Load(*(peer.process.pid for peer in pair.both))
        for _ in range(o.turns):
            ours, theirs = pair.ask(do, **given)
            seconds.append((ours["seconds"], theirs["seconds"]))
        ratios, count = [theirs / ours for ours, theirs in seconds], tokens_of(o, work)
        yield Row(
            pair.theirs.name,
            dtype,
            work,
            ours=count / statistics.median(ours for ours, _ in seconds),
            theirs=count / statistics.median(theirs for _, theirs in seconds),
            ratio=statistics.median(ratios),
            least=min(ratios),
            most=max(ratios),
            load=load.others(),
        )


def show(rows: list[Row]) -> None:
    """A table on standard output."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        return "unknown" if value is None else str(value)

    table = [list(dataclasses.asdict(rows[0])), *([cell(x) for x in dataclasses.astuple(row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  " + "  ".join(text.rjust(width) for text, width in zip(cells, widths, strict=True)), flush=True)


def main() -> int:
    o = parse_arguments(Options, prog="peers.py", description=__doc__)
    for name in ("model", "reference"):
        folder = getattr(o, name)
        if folder is not None and not folder.is_dir():
            raise InputError(f"{name} = {folder}: is no folder; give one with a model")
    require(o.reference is not None or o.work != ("adaptive",), "work", "adaptive", "only with --reference FOLDER")
    require_quiet(o, [load_of_a_second()], "wait, or raise it")
    python = environment(o.folder / "environment")
    folders = {"transformers": plain_toy(o) if o.model is None else o.model}
    if o.reference is not None:
        folders["reference"] = recurrent(o, o.reference)
    rows: list[Row] = []
    for name, folder in folders.items():
        with started(o, name, folder, python) as pair:
            for dtype in o.dtypes:
                rows += compare(o, pair, dtype)
    print(f"{o.threads or cores()} threads, {o.turns} turns; tokens/s; ratio: their time over ours, least and most")
    show(rows)
    if o.json is not None:
        write_output(o.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    require_quiet(o, [row.load for row in rows], "repeat the table above when the machine is quiet, or raise it")
    return 0


if __name__ == "__main__":
    run_command(main)
