"""The run folder as training writes it: who may use it, what makes it complete, and when the run in it is finished."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from rdlm.checkpoint import Checkpoints, read_config, write_config
from rdlm.config import InputError, RunConfig, differences, local_path
from rdlm.evaluation.depth import DepthCurve
from rdlm.runtime import complete_folder, exchange, is_first, owned, together, write_atomically
from rdlm.tokenizer import Tokenizer
from rdlm.train.metrics import MetricsWriter

MAY_CHANGE = (
    "steps",
    "tensorboard",
    "run_dir",
    "init",
    "mesh.",
    "checkpoint.",
    "faults.",
    "evaluation.",
    "alarms.",
    "recurrence.remat",
    "data.folder",
    "data.prepared",
    "data.stream",
)
"""Fields that a resumed run may change: its length, its name, the hardware it runs on, and where its data and first
weights lie: these are known again by their digests (`PackedData.check`, `weights_digest`)."""


_BEFORE_CONFIG = (".owner", ".shared", ".config.json.partial-")
"""What a run that is killed right at its start leaves."""


class RunFolder:
    """The folder of a run: config.json, metrics.jsonl, checkpoints/, tokenizer/ and, at the end, loss_by_depth.json."""

    def __init__(self, config: RunConfig):
        """Check the folder; `begin` creates it.

        Raises:
          InputError: it holds another run, or is not a run folder.
        """
        self.config, self.path = config, local_path(config.folder, "run_dir")
        self._check()

    def _check(self) -> None:
        if (self.path / "config.json").exists():
            self._check_same_run()
        elif self.path.exists() and not (self.path.is_dir() and all(map(_is_left_over, self.path.iterdir()))):
            raise InputError(f"run folder {self.path}: exists and is not a run folder; choose another --run-dir")

    def _check_same_run(self) -> None:
        own_depths = self.config.recurrence.draw == "microbatch"  # then other microbatches are another run
        free = MAY_CHANGE if own_depths else (*MAY_CHANGE, "data.microbatches")
        saved = read_config(self.path)
        if saved.weights_digest != self.config.weights_digest:
            began, given = (
                f"the weights of {run.init} (digest {run.weights_digest[:16]})"
                if run.init
                else "its seed, without --init"
                for run in (saved, self.config)
            )
            raise InputError(
                f"run folder {self.path}: holds a run that began from {began}, not from {given}; give the same, or "
                "another --run-dir"
            )
        for name, (old, new) in differences(saved, self.config).items():
            if not name.startswith(free):
                raise InputError(
                    f"run folder {self.path}: holds a run with {name} = {old!r}, not {new!r}; choose another --run-dir"
                )

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer that the run began with; None: it has not begun."""
        saved = self.path / "tokenizer"
        return saved if saved.exists() else None

    def check_tokenizer(self, tokenizer: Tokenizer, prepared: Path) -> None:
        """Refuse data in `prepared` whose tokenizer is not the one that the run began with. Raises InputError."""
        saved = self.path / "tokenizer"
        if saved.exists() and Tokenizer.load(saved).hash != tokenizer.hash:
            raise InputError(
                f"{saved}: the run has another tokenizer than {prepared}; restore that data, or start a new run"
            )

    @contextlib.contextmanager
    def begin(self, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
        """Own the folder until the block ends; create it and config.json if needed.

        So two runs cannot write into one folder, and the same command resumes, whenever the run is killed.

        Args:
          say: prints a line.

        Yields:
          A check that raises RunError when the folder is another process's by now.

        Raises:
          InputError: the folder cannot be created, is used by another process, or hosts have separate folders, so that
            each would save only its own part of the state.
        """
        with contextlib.ExitStack() as stack:
            check = together(lambda: self._own(stack, say))
            if jax.process_count() > 1:
                self._check_shared()
            together(self._check)  # another run may have begun here, and ended, since the first look
            if is_first() and not (self.path / "config.json").exists():
                write_config(self.path, self.config)
            yield check

    def _own(self, stack: contextlib.ExitStack, say: Callable[[str], None]) -> Callable[[], None]:
        """Create the folder, and own it on the first process."""
        if is_first():
            return stack.enter_context(owned(self.path, "choose another --run-dir", say))
        with contextlib.suppress(OSError):  # a folder that is not there is not shared: `_check_shared` says so
            self.path.mkdir(parents=True, exist_ok=True)
        return lambda: None

    def _check_shared(self) -> None:
        token = exchange(secrets.token_hex(8))[0]
        note = self.path / ".shared"
        if is_first():
            note.write_text(token)
        exchange("written")
        seen = exchange(str(note.exists() and note.read_text() == token))
        if is_first():
            note.unlink()
        if "False" in seen:
            raise InputError(
                f"run folder {self.path}: process {seen.index('False')} does not see what process 0 wrote there; "
                "use a folder that all hosts share (tpu_setup/mount.sh mounts a bucket as runs/)"
            )

    def open(self, tokenizer: Tokenizer, step: int, say: Callable[[str], None]) -> MetricsWriter | None:
        """Write tokenizer and config, and open the metrics for rows from `step` on; None on all but the first process.

        Raises:
          InputError: see `MetricsWriter`.
        """
        if not is_first():
            return None
        if not (self.path / "tokenizer").exists():
            with complete_folder(self.path / "tokenizer") as partial:
                tokenizer.save(partial)
        write_config(self.path, self.config)
        return MetricsWriter(self.path, step, self.config.tensorboard, say)

    def is_finished(self, checkpoints: Checkpoints) -> bool:
        """Whether the last step is saved, and loss_by_depth.json was written after it for the configured depths."""
        curve = self.path / "loss_by_depth.json"
        if checkpoints.latest != self.config.steps or not curve.is_file():
            return False
        try:
            depths = [int(r) for r in json.loads(curve.read_text())]
        except (ValueError, TypeError):
            return False
        newer = curve.stat().st_mtime >= checkpoints.saved_at(self.config.steps)
        return newer and depths == list(self.config.evaluation.depths)


def _is_left_over(path: Path) -> bool:
    return path.name.startswith(_BEFORE_CONFIG)


def write_curve(path: Path, curve: DepthCurve) -> None:
    """Write {"1": nats, "2": nats, ...}."""
    nats = {str(r): x for r, x in zip(curve.depths, curve.nats, strict=True)}
    write_atomically(path, json.dumps(nats, indent=2) + "\n")
