"""`Run`: a trained model with its config, tokenizer and data. Text in, text out; loss by depth."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdlm.checkpoint import load_tokenizer, read_config, read_meta, saved_steps
from rdlm.config import InputError, ModelConfig, RunConfig, Sampling, local_path, require
from rdlm.data import Batch, Chain
from rdlm.decode import Generation, generate
from rdlm.evaluation.depth import DepthCurve, depth_curve
from rdlm.evaluation.held_out import validation
from rdlm.hf import is_huggingface
from rdlm.model import Params
from rdlm.model.tensor_parallel import tensor_mesh, with_heads
from rdlm.runtime import agree, is_alone
from rdlm.tokenizer import Tokenizer
from rdlm.weights import merged_model, read_huggingface, read_run

Chat = Sequence[Mapping[str, str]]
"""Messages {"role": ..., "content": ...}."""


@dataclasses.dataclass(frozen=True)
class TextGeneration(Generation):
    """A `Generation` with its text: a string for one prompt, a list for a list of prompts."""

    text: str | list[str] = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model in a folder. `load` makes one."""

    folder: Path
    step: int  # of the checkpoint; 0 for a Hugging Face folder, as for a converted one
    ema: bool  # whether parameters are their moving average
    tokenizer: Tokenizer | None  # None where the folder has none
    run_config: RunConfig | None  # how it was trained; None for a Hugging Face folder
    tensor: int = 1  # devices that share a copy of the model, see `rdlm.tensor_parallel`
    data: int = 1  # copies

    @functools.cached_property
    def _model(self) -> tuple[Params, ModelConfig]:
        mesh = None if (self.tensor, self.data) == (1, 1) else tensor_mesh(self.tensor, self.data)
        if self.run_config is None:
            params, config = read_huggingface(self.folder, mesh)
        else:
            params, config = read_run(self.folder, self.step, self.ema, mesh)
        return params, self._masked(config)

    def _masked(self, config: ModelConfig) -> ModelConfig:
        """With ids that the tokenizer does not have as padding rows, which are never chosen."""
        return config if self.tokenizer is None else config.for_vocabulary(self.tokenizer.vocab_size)

    @property
    def params(self) -> Params:
        """The parameters, read on first use."""
        return self._model[0]

    @property
    def config(self) -> ModelConfig:
        """The shape of the model. Ids that the tokenizer does not have count as padding rows."""
        if self.run_config is None:
            return self._model[1]
        return self._masked(with_heads(merged_model(self.run_config), self.tensor))

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          InputError: there is none, or one with more entries than the model.
        """
        if self.tokenizer is None:
            raise InputError(
                f"{self.folder}: no tokenizer.json; put the tokenizer there, or pass token ids to rdlm.generate"
            )
        self.tokenizer.check_fits(self.config.vocab_size, self.folder)
        return self.tokenizer

    def require_config(self) -> RunConfig:
        """How the model was trained, and on what.

        Raises:
          InputError: a Hugging Face folder does not say.
        """
        if self.run_config is None:
            raise InputError(f"{self.folder}: a Hugging Face folder has no data; convert it to a run folder first")
        return self.run_config

    def generate(
        self,
        prompt: str | Sequence[str] | Chat,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        samples: int = 1,
        on_token: Callable[[int, int, int], object] | None = None,
        **options: Any,
    ) -> TextGeneration:
        """Continue a text, each of several texts, or a chat.

        Args:
          prompt: text, a list of texts, or chat messages {"role": ..., "content": ...} to reply to.
          max_new_tokens: maximum per prompt.
          sampling: as in `rdlm.generate`; without stop tokens, generation stops at the tokenizer's `end_ids`.
          stop: texts, or names of special tokens, before the first of which the text ends.
          samples: continuations of each prompt; with several, `text` is a list of all.
          on_token: as in `rdlm.generate`.
          options: other arguments of `rdlm.generate`.

        Raises:
          InputError: no tokenizer, or arguments that `rdlm.generate` refuses.
        """
        tokenizer = self.require_tokenizer()
        given = isinstance(prompt, str) or (isinstance(prompt, Sequence) and len(prompt) > 0)
        require(given, "prompt", prompt, "must be a text, a list of texts, or a list of chat messages")
        tokenizer.decode_stream(stop=stop)  # refuses what is no list of texts
        require(isinstance(sampling, Sampling), "sampling", sampling, "must be an rdlm.Sampling")
        single = isinstance(prompt, str) or isinstance(prompt[0], Mapping)
        prompts: Any = [prompt] if single else prompt
        special = [tokenizer.special_ids[s] for s in stop if s in tokenizer.special_ids]
        ends: Any = sampling.stop_tokens if len(sampling.stop_tokens) else tokenizer.end_ids
        if special:
            rows = ends if np.ndim(ends[0]) else [ends] * len(prompts)
            ends = tuple((*row, *special) for row in rows)
        encoded = [_encode(tokenizer, p) for p in prompts]
        words = [s for s in stop if s not in tokenizer.special_ids]
        streams: Any = collections.defaultdict(lambda: tokenizer.decode_stream(stop=words))

        def listen(i: int, token: int, steps: int) -> bool:
            streams[i].push(token)
            enough = on_token is not None and on_token(i, token, steps)
            return bool(enough) or streams[i].stopped

        out = generate(
            self.params,
            self.config,
            encoded,
            max_new_tokens=max_new_tokens,
            sampling=dataclasses.replace(sampling, stop_tokens=ends),
            samples=samples,
            on_token=listen if words else on_token,
            **options,
        )
        befores = (before for before in encoded for _ in range(samples))
        pairs = zip(out.tokens, befores, strict=True)
        texts = [tokenizer.decode(new, after=before, stop=words) for new, before in pairs]
        return TextGeneration(**vars(out), text=texts[0] if single and len(texts) == 1 else texts)

    def validation(self, folder: str | None = None, prepared: Sequence[str] = ()) -> Chain:
        """The run's validation data.

        Args:
          folder: in which the embedded corpus is prepared; None: where the run's config says (data.folder).
          prepared: where the run's prepared data lie now; empty: where the run's config says (data.prepared).

        Raises:
          InputError: no data, other data, or data made with another tokenizer.
        """
        config = self.require_config().data
        if folder is not None:
            require(
                not config.prepared,
                "data_folder",
                folder,
                "is of the embedded corpus; this run was trained on prepared data",
            )
            config = dataclasses.replace(config, folder=folder)
        return validation(self.folder, self.step, config, self.require_tokenizer(), prepared)

    def evaluate(
        self,
        depths: Sequence[int] | None = None,
        *,
        batches: int | None = None,
        data: Chain | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> DepthCurve:
        """Validation loss at every depth, from one unroll.

        Args:
          depths: recurrences to read the loss at; None: those of the run's config.
          batches: only the first batches; None: all.
          data: from `validation`, if it is there already.
          on_batch: called with the number of batches that are done, and of all.

        Raises:
          InputError: no data, or data made with another tokenizer.
        """
        data = self.validation() if data is None else data
        depths = self.require_config().evaluation.depths if depths is None else depths
        total = data.steps_per_epoch if batches is None else min(batches, data.steps_per_epoch)

        def counted() -> Iterator[Batch]:
            for i, batch in enumerate(data.batches(total)):
                if on_batch is not None:
                    on_batch(i + 1, total)
                yield batch

        ordered = tuple(sorted(set(depths)))
        curve = depth_curve(self.params, self.config, counted(), ordered, self.require_tokenizer().token_bytes)
        assert curve is not None  # it was not asked to stop
        return curve


def _encode(tokenizer: Tokenizer, prompt: str | Chat) -> np.ndarray:
    return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)


def find(folder: str | Path, step: int | None = None, ema: bool = False, tensor: int = 1, data: int = 1) -> Run:
    """As `load`, but parameters are read on first use."""
    folder = local_path(folder)
    if any(n != 1 or type(n) is not int for n in (tensor, data)):
        tensor_mesh(tensor, data)  # refuses what are no numbers of devices
    if not folder.exists():
        needed = "a run folder (train a model there first) or a Hugging Face folder"
        raise InputError(f"run folder {folder}: does not exist; give {needed}")
    if is_huggingface(folder):
        if step is not None or ema:
            raise InputError(f"{folder}: a Hugging Face folder has one set of weights; leave out step and ema")
        found = (folder / "tokenizer.json").exists()
        return Run(folder, 0, False, Tokenizer.load(folder) if found else None, None, tensor, data)
    config = read_config(folder)
    read_meta(folder, step)  # refuses a step that is not saved
    step = saved_steps(folder)[-1] if step is None else step
    found = (folder / "tokenizer" / "tokenizer.json").exists()
    return Run(folder, step, ema, load_tokenizer(folder, step) if found else None, config, tensor, data)


def load(folder: str | Path, step: int | None = None, ema: bool = False, tensor: int = 1, data: int = 1) -> Run:
    """A trained model from a run folder or a Hugging Face folder.

    Args:
      folder: made by training or conversion, or of the reference's kind.
      step: checkpoint of a run folder; None: the newest.
      ema: the moving average of the parameters in their place, if the run kept one.
      tensor: devices that share the model, each with some of its heads and columns (`rdlm.tensor_parallel`).
      data: copies of the model, each on so many devices, for `generate`, the engine and the server. On several hosts
        all processes call this, and `tensor` x `data` are all of their devices.

    Raises:
      InputError: no such folder or checkpoint, damaged files, a tokenizer that is not the checkpoint's, or dimensions
        that do not divide by `tensor`.
    """
    run = find(folder, step, ema, tensor, data)
    if not is_alone() and (tensor, data) != (1, 1):
        agree({"checkpoint": run.step})  # a training run may have saved another one meanwhile
    _ = run.params
    return run
