"""Read run folders, as all commands but training do: configuration, steps, parameters, tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from rdlm.checkpoint.integrity import Meta, as_abstract, as_mapping, naming, reader_alone, wrong_sum
from rdlm.config import InputError, ModelConfig, RunConfig, from_json, local_path, to_json
from rdlm.model import Params, init_params, quantize
from rdlm.model.quantize import Quantization
from rdlm.optim import AverageState, average_of, optimizer
from rdlm.runtime import together, write_atomically
from rdlm.tokenizer import Tokenizer
from rdlm.tune import begin


def write_config(folder: Path, run: RunConfig) -> None:
    """Write `folder`/config.json."""
    write_atomically(folder / "config.json", to_json(run))


def read_config(folder: Path) -> RunConfig:
    """The RunConfig of a run folder.

    Raises:
      InputError: no such folder, not a run folder, or a config that is not valid.
    """
    folder = local_path(folder)
    if folder.is_file():
        raise InputError(f"run folder {folder}: is a file; give the folder that holds it, {_run_around(folder)}")
    if not folder.is_dir():
        raise InputError(f"run folder {folder}: does not exist; train a model there first")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"run folder {folder}: has no config.json, so it is not (yet) a run folder{_hint(folder)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); put the run's own config.json back") from error
    if _is_huggingface_config(text):
        raise InputError(f"{folder}: a Hugging Face folder; convert it first (experiments/convert_huggingface.py)")
    return from_json(RunConfig, text, str(path))


def _run_around(path: Path) -> Path:
    """The run folder that `path` lies in, or else the folder that it lies in."""
    around = list(path.absolute().parents)[:3]  # checkpoints/STEP/params is the deepest that somebody may give
    return next((folder for folder in around if (folder / "checkpoints").is_dir()), path.parent)


def _hint(folder: Path) -> str:
    """What a folder is that was given for a run folder."""
    inside = sorted(config.parent.name for config in folder.glob("*/config.json"))
    if (_run_around(folder) / "config.json").is_file():
        return f"; it is a part of {_run_around(folder)}: give that"
    if inside:
        return f"; it holds {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}: give one of them"
    kinds = {"manifest.json": "prepared data", "adapter_config.json": "an adapter", "tokenizer.json": "a tokenizer"}
    return next((f"; it holds {kind}" for name, kind in kinds.items() if (folder / name).is_file()), "")


def _is_huggingface_config(text: str) -> bool:
    """Whether a config.json is that of a Hugging Face folder."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and "model_type" in tree


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a run folder, ascending."""
    path = local_path(folder) / "checkpoints"
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists())


def load_checkpoint(run_folder: str | Path, step: int | None = None, ema: bool = False) -> tuple[Params, ModelConfig]:
    """(params, config) of a run folder, on any number of devices.

    Args:
      run_folder: made by training, or by converting a model.
      step: which checkpoint; None: the newest. If that is damaged, no other is used in its place.
      ema: load the moving average of the parameters, if the run kept one (optimizer.ema_decay).

    Raises:
      InputError: not a run folder, no complete checkpoint, no such step, no average, or damaged files (the message
        names another step that can be loaded).
    """
    stored = open_checkpoint(run_folder, step, ema)
    stored.require_whole()
    return stored.load(), stored.run.model


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """Parameters of a checkpoint, or their moving average, that are not read yet. `open_checkpoint` makes one."""

    run: RunConfig
    folder: Path
    step: int
    ema: bool

    def load(self, shardings: PyTree = None) -> Params:
        """The parameters in their stored dtype, the average in that of the parameters; every process reads its shards.

        Of a run whose base is frozen, those that learn.

        Args:
          shardings: of every parameter; None: the first device.

        Raises:
          InputError: as `load_checkpoint`.
        """
        shapes = self.shapes()
        if shardings is None:
            one = SingleDeviceSharding(jax.local_devices()[0])
            shardings = jax.tree.map(lambda _: one, shapes)
        target = as_abstract(shapes, shardings)
        params = together(lambda: self._read(target))
        # The average has no checksum of its own: the optimizer's is of its whole state.
        if not self.ema and (problem := wrong_sum(self.meta(), params=params)):
            raise InputError(f"checkpoint {self._path}: {problem}; {_way_out(self.folder, self.step)}")
        return params

    def shapes(self) -> Params:
        """Shapes and dtypes of what `load` returns."""
        return jax.eval_shape(self._fresh, jax.random.key(0))

    def require_whole(self) -> None:
        """Refuse a checkpoint that holds only what learns beside a frozen base. Raises InputError."""
        if self.run.tune.freezes:
            raise InputError(
                f"run folder {self.folder}: holds only what it learnt beside the weights of {self.run.init}; read both "
                "with rdlm.load, or write them as one with experiments/merge_adapter.py"
            )

    @property
    def quantized(self) -> Quantization | None:
        """How its parameters are quantized, if they are."""
        found = self.meta().get("quantized")
        return found and Quantization(**found)

    def require_float(self) -> None:
        """Refuse quantized matrices, from which nothing can learn. Raises InputError."""
        if self.quantized:
            raise InputError(
                f"run folder {self.folder}: its matrices are quantized ({self.quantized.dtype}), so it cannot be "
                f"trained; train {self.meta().get('source', 'the model it was made from')}"
            )

    def _fresh(self, key: jax.Array) -> Params:
        """What the run learns, before its first step; of a quantized model, its parameters."""
        params = init_params(self.run.model, key)
        params = quantize(params, self.run.model, *self.quantized) if self.quantized else params
        return begin(params, self.run.tune, key)

    @property
    def _path(self) -> Path:
        return (self.folder / "checkpoints" / str(self.step)).absolute()

    def _read(self, target: PyTree) -> Params:
        """This process's part."""
        with naming(self._path, _way_out(self.folder, self.step)):
            if self.ema:
                return self._read_average(target)
            with reader_alone(ocp.StandardCheckpointHandler) as reader:
                return reader.restore(self._path / "params", args=ocp.args.StandardRestore(target))

    def _read_average(self, target: PyTree) -> Params:
        """The averaged parameters, without the rest of the optimizer's state."""
        run = self.run

        def fresh(key: jax.Array) -> PyTree:
            return optimizer(run.optimizer, run.steps).init(self._fresh(key))

        def wanted(x: PyTree) -> PyTree:
            return AverageState(ocp.PLACEHOLDER, target) if isinstance(x, AverageState) else ocp.PLACEHOLDER

        state = jax.eval_shape(fresh, jax.random.key(0))
        tree = jax.tree.map(wanted, state, is_leaf=lambda x: isinstance(x, AverageState))
        arguments = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
        with reader_alone(ocp.PyTreeCheckpointHandler) as reader:
            return average_of(reader.restore(self._path / "optimizer", args=arguments))

    def meta(self) -> Meta:
        """The JSON beside the arrays."""
        return read_meta(self.folder, self.step)

    def digest(self) -> str:
        """sha256 (hex) of that JSON, which holds a checksum of the arrays, and of whether this is the average."""
        text = json.dumps([self.meta(), self.ema], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def open_checkpoint(run_folder: str | Path, step: int | None = None, ema: bool = False) -> StoredCheckpoint:
    """The parameters of a run folder, to be read later; touches no device.

    Raises:
      InputError: not a run folder, no complete checkpoint, no such step, or no average.
    """
    folder = local_path(run_folder)
    run = read_config(folder)
    if ema and not run.optimizer.ema_decay:
        raise InputError(
            f"run folder {run_folder}: kept no moving average of its weights (optimizer.ema_decay = 0.0); leave out "
            "ema, or train a run with --optimizer.ema-decay 0.999"
        )
    return StoredCheckpoint(run, folder, int(_checkpoint(folder, step).name), ema)


def read_meta(run_folder: str | Path, step: int | None = None) -> Meta:
    """The JSON saved beside the arrays of a checkpoint.

    Raises:
      InputError: no complete checkpoint, no such step, or a file that is damaged.
    """
    path = _checkpoint(run_folder, step)
    way_out = _way_out(run_folder, int(path.name))
    with naming(path, way_out), reader_alone(ocp.JsonCheckpointHandler) as reader:
        return as_mapping(reader.restore(path / "meta"))


def load_tokenizer(run_folder: str | Path, step: int | None = None) -> Tokenizer:
    """The tokenizer of a run folder, checked to be the one that its checkpoint was trained with.

    Raises:
      InputError: no checkpoint, no tokenizer, or one that does not match the checkpoint.
    """
    trained = read_meta(run_folder, step).get("tokenizer")
    folder = local_path(run_folder) / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    if trained is not None and trained != tokenizer.hash:  # None: a model that was converted without one
        raise InputError(
            f"{folder}: this tokenizer ({tokenizer.hash[:8]}) is not the one the checkpoint was trained with "
            f"({trained[:8]}); put that one back"
        )
    return tokenizer


def _checkpoint(run_folder: str | Path, step: int | None) -> Path:
    folder, steps = local_path(run_folder), saved_steps(local_path(run_folder))
    if not steps:
        raise InputError(f"run folder {folder}: has no complete checkpoint yet; train until one is saved")
    if step is not None and step not in steps:
        raise InputError(f"step = {step}: not saved in {folder}; there are {', '.join(map(str, steps))}")
    return (folder / "checkpoints" / str(steps[-1] if step is None else step)).absolute()


def _way_out(run_folder: str | Path, damaged: int) -> str:
    others = [step for step in saved_steps(local_path(run_folder)) if step != damaged]
    before = max((step for step in others if step < damaged), default=max(others, default=None))
    if before is None:
        return "there is no other: restore it from a copy, or train again in another folder"
    return f"ask for step {before}, or resume training, which renames this one"
