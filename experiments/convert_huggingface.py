"""Convert a Hugging Face folder of the public reference to a run folder, or a run folder to a Hugging Face folder.

    python experiments/convert_huggingface.py path/to/huginn-0125 runs/huginn --verify
    python experiments/convert_huggingface.py runs/quickstart exported/quickstart --verify
    python experiments/convert_huggingface.py model.gguf models/mine

A GGUF file of Llama's type becomes a Hugging Face folder (with the extra gguf). SRC can also be the name of a model
on the hub (ORGANISATION/NAME), if huggingface_hub is installed. Tokenizer files and generation_config.json are copied
too. Values keep their dtype and bits. Exit codes: 0 done, 1 --verify found a difference, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rdlm.config import DataConfig, InputError, RunConfig, differences, local_path, one_line, require
from rdlm.runtime import complete_folder, parse_arguments, run_command, set_aside

if TYPE_CHECKING:
    import numpy as np

    from rdlm.config import ModelConfig
    from rdlm.model import Params
    from rdlm.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Convert SRC to DST. The kind of folder SRC is decides the direction."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Hugging Face folder, run folder, GGUF file, or name on the hub."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist, or be empty. In an earlier export the model is replaced, other files stay."""
    verify: bool = False
    """Load the result and compare its logits on random tokens with those of SRC."""
    threshold: float = 1e-4
    """--verify fails if any logit differs by more."""
    recurrences: int = 4
    """Recurrences r at which --verify compares, at least 1."""
    step: int | None = None
    """Checkpoint of the run folder to convert; None: the newest."""


def main() -> int:
    args = parse_arguments(
        Args, prog="convert_huggingface.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    require(args.recurrences >= 1, "--recurrences", args.recurrences, "must be at least 1, so that the core runs")
    require(0 <= args.threshold < math.inf, "--threshold", args.threshold, "must be a finite number, not negative")
    from rdlm.hf import is_huggingface
    from rdlm.hf.gguf import is_gguf

    if is_gguf(local_path(args.src)):
        return convert_file(args, local_path(args.src))
    source, target = local_folder(args.src), args.dst
    if source.resolve() == target.resolve():
        raise InputError(f"{target}: source and destination are the same folder")
    to_run = is_huggingface(source)
    if not to_run and not (source / "checkpoints").is_dir():
        raise InputError(
            f"{source}: neither a Hugging Face model folder (config.json with model_type) nor a run folder"
        )
    if to_run and args.step is not None:
        raise InputError(f"--step = {args.step}: SRC is a Hugging Face folder, which has no steps; leave it out")
    params, config = load(source, args.step)
    print(f"read {source}: {describe(params)}")
    for line in broken(params):
        print(line)
    if to_run:
        params, config = one_dtype(params, config)
    names = set(target.iterdir()) if target.is_dir() else set()
    try:
        (write_run if to_run else write_huggingface)(target, params, config, source)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
    for path in sorted(set(target.iterdir()) - names):
        if path.suffix.startswith(".replaced"):
            print(f"note: {path.stem} was there and is not of an earlier export; it is now {path.name}")
    print(f"wrote {'run' if to_run else 'Hugging Face'} folder {target}")
    if not args.verify:
        return 0
    before = logits(params, config, args.recurrences)
    del params  # one copy of the model in memory at a time
    return 0 if verified(before, config, target, args) else 1


def convert_file(args: Args, file: Path) -> int:
    """Write the Hugging Face folder DST from a GGUF file."""
    from rdlm.hf.gguf import convert_gguf

    for name in ("verify", "step"):
        if getattr(args, name):
            raise InputError(f"--{name}: SRC is a GGUF file; leave it out, and convert DST to a run folder with it")
    convert_gguf(file, args.dst)
    params, _ = load(args.dst)
    print(f"read {file}: {describe(params)}")
    for line in broken(params):
        print(line)
    print(f"wrote Hugging Face folder {args.dst}")
    return 0


def local_folder(name: str) -> Path:
    """The folder called `name`, or a local copy of the hub's model of that name.

    Raises:
      InputError: neither a folder nor a model on the hub, or huggingface_hub is not installed.
    """
    folder = local_path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or folder.exists():
        raise InputError(f"{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{name}: no such folder; to fetch a model of that name install huggingface_hub (pip install 'rdlm[hf]')"
        ) from error
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # its own errors, and those of the HTTP library beneath it
        raise InputError(f"{name}: no such folder, and the hub does not provide it ({one_line(error)})") from error


def load(folder: Path, step: int | None = None) -> tuple[Params, ModelConfig]:
    """(params, config) of either kind of folder."""
    from rdlm.checkpoint import load_checkpoint
    from rdlm.hf import is_huggingface, load_huggingface

    return load_huggingface(folder) if is_huggingface(folder) else load_checkpoint(folder, step)


def describe(params: Params) -> str:
    """'75 tensors, 0.16 M parameters, float32'."""
    import jax

    leaves = jax.tree.leaves(params)
    dtypes = "/".join(sorted({str(x.dtype) for x in leaves}))
    return f"{len(leaves)} tensors, {sum(x.size for x in leaves) / 1e6:,.2f} M parameters, {dtypes}"


def broken(params: Params) -> list[str]:
    """A line for the human if values are not finite: such a model computes nothing."""
    import jax
    import jax.numpy as jnp

    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [jax.tree_util.keystr(where) for where, x in leaves if not jnp.isfinite(x).all()]
    return [f"note: NaN or infinity in {len(found)} of {len(leaves)} tensors, first {found[0]}"] if found else []


def one_dtype(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """Params in the smallest dtype that holds all of their values, since a run folder has one, and the config."""
    import jax
    import jax.numpy as jnp

    from rdlm.model import cast

    found = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
    if len(found) == 1:
        return params, config
    wide = str(jnp.result_type(*found))
    print(f"note: the tensors are of {' and '.join(found)}; the run folder holds {wide}, in which no value changes")
    return cast(params, wide), dataclasses.replace(config, param_dtype=wide)  # type: ignore[arg-type]


def write_run(folder: Path, params: Params, config: ModelConfig, source: Path) -> None:
    """Write a run folder with parameters only, and the tokenizer of `source`."""
    from rdlm.checkpoint import save_parameters

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder; choose another")
    with complete_folder(folder.resolve(), alike=False) as partial:
        copy_tokenizer(source, partial / "tokenizer")
        tokenizer = fitting_tokenizer(partial / "tokenizer", config, source)
        size = config.vocab_size if tokenizer is None else tokenizer.vocab_size
        data = DataConfig(tokenizer_size=size, sequence_length=min(256, config.max_length))
        run = RunConfig(model=config, data=data, steps=1, run_dir=str(folder))
        identity = None if tokenizer is None else tokenizer.hash
        meta = {"config": dataclasses.asdict(run), "tokenizer": identity, "step": 0, "source": str(source)}
        save_parameters(partial, params, run, json.loads(json.dumps(meta)))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that `source` has; others of these names in `target` are set aside."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            continue
        content = (source / name).read_bytes()
        if os.path.lexists(target / name):
            if (target / name).is_file() and (target / name).read_bytes() == content:
                continue
            set_aside(target / name)
        (target / name).write_bytes(content)


def fitting_tokenizer(folder: Path, config: ModelConfig, source: Path) -> Tokenizer | None:
    """A copied tokenizer; None if there is none, or none that rdlm can use.

    Raises:
      InputError: it has more entries than the model.
    """
    from rdlm.tokenizer import Tokenizer

    try:
        found = Tokenizer.load(folder)
    except InputError as error:
        print(f"note: no tokenizer that rdlm can use was copied ({str(error).partition(': ')[2]})")
        return None
    found.check_fits(config.vocab_size, source)
    if found.vocab_size < config.vocab_size:
        print(f"note: the tokenizer has {found.vocab_size} entries, the model {config.vocab_size}: the rest is masked")
    return found


def write_huggingface(folder: Path, params: Params, config: ModelConfig, source: Path) -> None:
    """Write a Hugging Face folder with the run's tokenizer files beside the weights."""
    from rdlm.hf import save_huggingface
    from rdlm.tokenizer import Tokenizer

    if (source / "tokenizer" / "tokenizer.json").exists():
        Tokenizer.load(source / "tokenizer").check_fits(config.vocab_size, source)
    save_huggingface(folder, params, config)
    copy_tokenizer(source / "tokenizer", folder)


def logits(params: Params, config: ModelConfig, recurrences: int) -> np.ndarray:
    """f32 [2, L, V] on fixed random tokens, from a fixed initial state."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from rdlm.model import compute_dtype, context, core_step, embed, inject, readout
    from rdlm.recurrence import initial_state

    length = min(16, config.max_length)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, length), np.int32))
    positions = jnp.arange(length)
    ctx = context(config, positions, None)
    s = initial_state(jax.random.key(0), positions, config.embed_dim, compute_dtype(params, config))
    s = jnp.broadcast_to(s, (*tokens.shape, config.embed_dim))

    # Not jitted: in one program XLA on CPU would convert all bf16 weights to f32 at once.
    injected = inject(params, config, embed(params, config, tokens, ctx)[0])
    for _ in range(recurrences):
        s, _ = core_step(params, config, s, injected, ctx)
    return np.asarray(readout(params, config, s, ctx)[0])


def verified(before: np.ndarray, config: ModelConfig, target: Path, args: Args) -> bool:
    """Compare the logits of the source with those of the written folder, and print the result."""
    import jax
    import numpy as np

    params, written = load(target)
    # A Hugging Face folder does not hold the compute dtype.
    written = dataclasses.replace(written, compute_dtype=config.compute_dtype)
    changed = differences(config, written)
    if changed:
        print("config differs: " + ", ".join(f"{name} {a!r} -> {b!r}" for name, (a, b) in changed.items()))
        return False
    after = logits(params, written, args.recurrences)
    p, q = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    kl = np.asarray((np.exp(p) * (p - q)).sum(-1))
    top = np.argsort(-before)[..., :5], np.argsort(-after)[..., :5]
    top5 = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*(t.reshape(-1, t.shape[-1]) for t in top), strict=True)])
    worst = float(np.abs(before - after).max())
    print(
        f"verify: r = {args.recurrences}, {p.shape[0] * p.shape[1]} tokens: max |logit difference| {worst:.3g}, "
        f"KL mean {kl.mean():.3g} max {kl.max():.3g}, top-1 agreement {np.mean(top[0][..., 0] == top[1][..., 0]):.2%}, "
        f"top-5 agreement {top5:.2%}"
    )
    if not worst <= args.threshold:
        print(f"verify: FAILED, {worst:.3g} is more than the threshold of {args.threshold:g}")
        return False
    print("verify: passed")
    return True


if __name__ == "__main__":
    run_command(main)
