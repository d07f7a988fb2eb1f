"""Where the first parameters of a run come from, if not from its seed: the folder `init` (docs/training.md, Start from
weights).

Once the run folder holds a checkpoint, the same command resumes without `init`. Only runs that keep its parameters read
it again: beside frozen ones, and with `loss.teacher` "start".
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from rdlm import sharding
from rdlm.checkpoint import StoredCheckpoint, as_abstract, open_checkpoint, read_config, saved_steps
from rdlm.config import InputError, MeshConfig, ModelConfig, RunConfig, differences, local_path, require
from rdlm.data import prepared_tokenizer
from rdlm.hf import StoredModel, is_huggingface, load_huggingface, open_huggingface
from rdlm.model import Params, cast, init_params
from rdlm.model.split import AXES
from rdlm.model.tensor_parallel import load_split, tensor_parallel
from rdlm.runtime import together
from rdlm.tokenizer import Tokenizer
from rdlm.tune import combine, divide, merge

FREE = (
    "mean_recurrence",
    "backprop_depth",
    "max_length",
    "rope_base",
    "rope_scaling",
    "window_rope_base",
    "attention_window",
    "full_attention_layers",
    "param_dtype",
    "compute_dtype",
    "test_time_noise",
    "loop.start_std",
)
"""Fields of the model that may differ from those of `init`: they change no tensor, and not what a tensor is."""


class Weights:
    """The folder `init` of a run: its model, tokenizer and parameters, each read when it is asked for."""

    def __init__(self, run: RunConfig):
        """Raises InputError: not a local path, or a run folder whose run began without `init`."""
        self.folder, self.ema, self.run = local_path(run.init, "init"), run.init_ema, run
        self.settled = _settled(run)
        """The run's own config.json, once the run goes on without `init`."""

    @functools.cached_property
    def source(self) -> StoredModel | StoredCheckpoint:
        """The stored parameters. Raises InputError: there are none, or what is there is damaged."""
        if not self.folder.is_dir():
            given = "is a file" if self.folder.exists() else "no such folder"
            fix = (
                "give a run folder or a Hugging Face folder (convert_huggingface.py makes one of a GGUF file or of a "
                "model on the hub)"
            )
            raise self._unusable(given, fix)
        try:
            return self._opened()
        except InputError as error:
            if self.settled is None:
                raise
            raise self._unusable(str(error), "") from error

    def _opened(self) -> StoredModel | StoredCheckpoint:
        if not is_huggingface(self.folder):
            stored = open_checkpoint(self.folder, ema=self.ema)
            stored.require_whole()
            stored.require_float()
            return stored
        require(
            not self.ema, "init_ema", self.ema, f"must be false: {self.folder}, a Hugging Face folder, has no average"
        )
        return open_huggingface(self.folder)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer of the parameters lies."""
        return self.folder if isinstance(self.source, StoredModel) else self.folder / "tokenizer"

    @functools.cached_property
    def _own_tokenizer(self) -> Tokenizer:
        folder = self.tokenizer_folder
        if not (folder / "tokenizer.json").exists():
            raise InputError(f"init = '{self.folder}': has no tokenizer; put the model's tokenizer.json into {folder}")
        tokenizer = Tokenizer.load(folder)
        tokenizer.check_fits(self._stored_model.vocab_size, self.folder)
        return tokenizer

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder, or that of the data if it only has more special tokens.

        Raises:
          InputError: the folder has none, so that nobody knows which token a row of the embedding is; or another
            model's. The data are missing.
        """
        given = prepared_tokenizer(self.run.data) or self._own_tokenizer
        return self._own_tokenizer if given.added_to(self._own_tokenizer) is None else given

    @property
    def _stored_model(self) -> ModelConfig:
        return self.source.config if isinstance(self.source, StoredModel) else self.source.run.model

    @functools.cached_property
    def model(self) -> ModelConfig:
        """What the run trains. Parameters are held in float32, in which small updates are not lost; it computes in the
        dtype of the folder. Its tokens are those of the tokenizer, for which there may be more rows than in the folder.
        """
        return self._with_tokens(self.tokenizer.vocab_size)

    def _with_tokens(self, size: int) -> ModelConfig:
        stored = self._stored_model
        held = self.source.dtype.name if isinstance(self.source, StoredModel) else stored.param_dtype
        computed = stored.compute_dtype or held
        model = dataclasses.replace(
            stored,
            vocab_size=size,
            padded_vocab_size=max(size, stored.rows),
            compute_dtype=computed,  # type: ignore[arg-type]
        )
        return _held_in_float32(model)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (hex) of the parameters."""
        return self.source.digest()

    def check(self, model: ModelConfig) -> None:
        """Refuse to train these parameters as another model. Raises InputError."""
        for name, (stored, given) in _other_model(self.model, model).items():
            raise InputError(
                f"model.{name} = {given!r}: {self.folder} has {stored!r}; leave it out (only {', '.join(FREE)} may "
                "differ)"
            )

    def load(self, target: PyTree[jax.ShapeDtypeStruct], digest: str) -> Params:
        """The parameters in the dtypes and shardings of `target`.

        Raises:
          InputError: damaged files, other parameters than those of `digest`, or those of another model than the run's.
        """
        source = together(lambda: self._unchanged(digest))
        dtype = target["wte"].dtype
        stored = jax.eval_shape(lambda: init_params(self._stored_model, jax.random.key(0)))
        # Rows that are still too few need not divide by the mesh.
        held_in = jax.tree.map(
            lambda x, to: to.sharding if x.shape == to.shape else sharding.replicated(to.sharding.mesh), stored, target
        )
        if isinstance(source, StoredModel):
            stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), stored)
            held = together(lambda: source.load(as_abstract(stored, held_in)))
        else:
            held = source.load(held_in)
        same = jax.tree.map(lambda x, to: (x.shape, x.dtype) == (to.shape, to.dtype), held, target)
        if all(jax.tree.leaves(same)):
            return held
        fit = jax.jit(
            lambda params: jax.tree.map(lambda x, to: _with_rows(x, to.shape).astype(dtype), params, target),
            out_shardings=jax.tree.map(lambda to: to.sharding, target),
        )
        return fit(held)

    def _unchanged(self, digest: str) -> StoredModel | StoredCheckpoint:
        fix = "put them back, or choose another --run-dir"
        if self.digest != digest:
            given = f"holds other weights (digest {self.digest[:16]}) than those that the run began from"
            raise self._unusable(f"{given} ({digest[:16]})", fix)
        # Another config.json makes another model of the same weights.
        model = self.run.model
        for name, (now, then) in _other_model(self._with_tokens(model.vocab_size), model).items():
            raise self._unusable(f"its config.json now says {name} = {now!r}, the run began with {then!r}", fix)
        return self.source

    def _unusable(self, problem: str, fix: str) -> InputError:
        """Of a run that has begun, the fix is to find the folder again."""
        if self.settled is None:
            return InputError(f"init = '{self.folder}': {problem}; {fix}")
        run = local_path(self.run.folder, "run_dir")
        return InputError(
            f"run folder {run}: the weights that it began from, init = '{self.folder}': {problem}; put them back, or "
            f"write their new place into init of {run / 'config.json'} (to train on, give it with --init)"
        )

    def __str__(self) -> str:
        """Where the parameters come from, and which rows are for tokens that were added."""
        text = str(self.folder)
        if not isinstance(self.source, StoredModel):
            text += f", step {self.source.step}{', their moving average' if self.ema else ''}"
        if added := self.tokenizer.added_to(self._own_tokenizer):
            new = max(0, self.model.rows - self._stored_model.rows)
            rows = "1 row is added" if new == 1 else f"{new} rows are added, each"
            rows = f"{rows} the mean of the others" if new else "they take rows that were padding"
            text += f"; special tokens beyond the folder's: {', '.join(added)}: {rows}"
        return text


def _other_model(stored: ModelConfig, given: ModelConfig) -> dict[str, tuple[object, object]]:
    """Fields by which the same tensors are another model: {'num_heads': (stored, given)}."""
    fewer = given.rows < stored.rows
    return {
        name: values
        for name, values in differences(stored, given).items()
        if not name.startswith(FREE) and (fewer or name != "padded_vocab_size")
    }


def _with_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """`x` with as many rows as `shape` has; new ones are the mean of those there."""
    if x.shape == shape:
        return x
    mean = x.astype(jnp.float32).mean(0, keepdims=True).astype(x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(mean, (shape[0] - len(x), *shape[1:]))])


def _settled(run: RunConfig) -> RunConfig | None:
    folder = local_path(run.folder, "run_dir")
    if not saved_steps(folder):
        return None
    saved = read_config(folder)
    if not saved.init:
        raise InputError(f"run folder {folder}: holds a run that began without --init; choose another --run-dir")
    same = saved.init_ema == run.init_ema and _absolute(saved.init) == _absolute(run.init)
    return saved if same else None


def _absolute(init: str) -> Path:
    return local_path(init, "init").absolute()


def begin_from(run: RunConfig, mean_recurrence: int | None = None) -> RunConfig:
    """`run` with what follows from the folder `init`: the model, and the defaults of what must fit it.

    Touches no device, so that it can be called before `runtime.start`.

    Args:
      run: its model is replaced.
      mean_recurrence: of the model that is trained; None: that of the folder.

    Raises:
      InputError: `init` is not a folder with weights and tokenizer.
    """
    weights = Weights(run)
    if weights.settled is not None:
        saved = weights.settled
        return dataclasses.replace(
            run,
            model=saved.model,
            recurrence=dataclasses.replace(run.recurrence, scheme=saved.recurrence.scheme),
            data=dataclasses.replace(
                run.data, tokenizer_size=saved.data.tokenizer_size, sequence_length=saved.data.sequence_length
            ),
            evaluation=dataclasses.replace(run.evaluation, depths=saved.evaluation.depths),
        )
    model, recurrence, evaluation = weights.model, run.recurrence, run.evaluation
    if mean_recurrence is not None:
        model = dataclasses.replace(model, mean_recurrence=mean_recurrence)
    if model.loop.injection == "none":
        # Without injection only the draw n = 0 trains the embedding (docs/families.md, The loop).
        model = dataclasses.replace(model, backprop_depth=model.mean_recurrence)
        recurrence = dataclasses.replace(recurrence, scheme="fixed")
        within = [r for r in evaluation.depths if r < model.mean_recurrence]
        evaluation = dataclasses.replace(evaluation, depths=(*within, model.mean_recurrence))
    data = dataclasses.replace(
        run.data,
        tokenizer_size=weights.tokenizer.vocab_size,
        sequence_length=min(run.data.sequence_length, model.max_length),
    )
    return dataclasses.replace(run, model=model, recurrence=recurrence, data=data, evaluation=evaluation)


def identified(run: RunConfig, weights: Weights) -> RunConfig:
    """`run` with the digest of the weights that it began, or begins, from.

    Raises:
      InputError: `run.model` is another model than that of the folder, or `run.weights_digest` is of other weights.
    """
    if weights.settled is not None:
        digest = weights.settled.weights_digest
    else:
        weights.check(run.model)
        digest = weights.digest
    given = run.weights_digest
    require(given in ("", digest), "weights_digest", given, f"'{run.init}' holds other weights; leave it out")
    # A run that keeps them is read from anywhere.
    init = str(_absolute(run.init)) if run.tune.freezes else run.init
    return dataclasses.replace(run, weights_digest=digest, init=init)


def _held_in_float32(model: ModelConfig) -> ModelConfig:
    """It computes in the same dtype as before."""
    computed = model.compute_dtype or model.param_dtype
    return dataclasses.replace(model, param_dtype="float32", compute_dtype=None if computed == "float32" else computed)


def merged_model(run: RunConfig) -> ModelConfig:
    """The model of `read_run`: merged pairs are held in float32, because a small sum A B is lost in bfloat16."""
    return _held_in_float32(run.model) if run.tune.lora_rank else run.model


def read_huggingface(folder: str | Path, mesh: Mesh | None = None) -> tuple[Params, ModelConfig]:
    """(params, config) of a Hugging Face folder, with the values of `rdlm.load_huggingface`, where they will be used.

    That is the first device: programs of an accelerator would copy them from host memory in every call. With `mesh`:
    as in `read_run`.
    """
    if mesh is None and jax.default_backend() == "cpu":
        return load_huggingface(folder)
    source = open_huggingface(folder)
    shapes = source.shapes()
    if mesh is None:
        first = SingleDeviceSharding(jax.local_devices()[0])
        return source.load(as_abstract(shapes, jax.tree.map(lambda _: first, shapes))), source.config
    return load_split(source.config, mesh, shapes, lambda places: source.load(as_abstract(shapes, places)))


def read_run(
    folder: str | Path, step: int | None = None, ema: bool = False, mesh: Mesh | None = None
) -> tuple[Params, ModelConfig]:
    """(params, config) of a run folder, as `rdlm.load_checkpoint`; also of one that holds only what it learnt.

    Then its base is read from where the run says (`init` in config.json), and low-rank pairs are merged in float32.
    With `mesh`, of `tensor_mesh`, the result is that of `rdlm.tensor_parallel`, and every device reads its own part;
    what is merged is read by the first device and then split.

    Raises:
      InputError: as `load_checkpoint` and `tensor_parallel`; no such base, or one with other weights.
    """
    stored = open_checkpoint(folder, step, ema)
    run = dataclasses.replace(stored.run, run_dir=str(folder))
    if not run.tune.freezes:
        if mesh is None:
            return stored.load(), run.model
        return load_split(run.model, mesh, stored.shapes(), stored.load)
    learnt = stored.load()
    here = sharding.replicated(sharding.make_mesh(MeshConfig(1, 1), run.model, jax.local_devices()[:1]))
    shapes = jax.eval_shape(lambda: init_params(run.model, jax.random.key(0)))
    base = Weights(run).load(as_abstract(shapes, jax.tree.map(lambda _: here, shapes)), run.weights_digest)
    model, params = merged_model(run), combine(learnt, divide(base, run.tune)[1], run.tune)
    params = merge(cast(params, model.param_dtype))
    if mesh is None:
        return params, model
    data, tensor = (mesh.shape[axis] for axis in AXES)
    return tensor_parallel(params, model, tensor, data)
