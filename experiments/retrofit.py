"""Make a recurrent-depth model of a plain pretrained one: its layers become prelude, core and coda.

    python experiments/retrofit.py models/smollm2 models/smollm2-deep --layers 7/16/7
    python experiments/retrofit.py meta-llama/Llama-3.2-1B models/llama-deep --drop --adapter random

SRC is a Hugging Face folder or a run folder of a plain transformer (Llama, SmolLM2, OLMo-2, Qwen, Gemma), or the name
of a model on the hub. With all layers kept and the identity adapter, which are the defaults, DST has the logits of SRC
at every depth. DST is a Hugging Face folder in the format of published retrofits where that can hold the model (blocks
as in Llama or OLMo-2), otherwise a run folder. Tokenizer and chat template come along.

Published cuts (arXiv 2511.07384), all with --drop: TinyLlama-1.1B (22 layers) 4/8/4, Llama-3.2-1B and OLMo-2-1B
(16 layers) 4/6/4. Exit codes: 0 done, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rdlm.config import InputError, local_path
from rdlm.runtime import complete_folder, parse_arguments, require_empty, run_command

PUBLISHED = {22: (4, 8, 4), 16: (4, 6, 4)}
"""Layers of the source -> published cut."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Cut the plain model SRC into prelude, core and coda, and write DST."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Hugging Face folder or run folder of a plain model, or its name on the hub."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to write; must not exist, or be empty."""
    layers: Annotated[str | None, tyro.conf.arg(metavar="P/C/D")] = None
    """Layers of prelude, core and coda. Default: all layers, a quarter of them each in prelude and coda; with --drop
    the published cut of a model with 16 or 22 layers."""
    drop: bool = False
    """Leave out the layers between the first P and the last C + D."""
    adapter: Literal["identity", "random"] = "identity"
    """What mixes state and embedded input before the core. identity: [0 I], which passes the input on; random: uniform,
    as published, which makes another model of it until it is trained."""
    seed: int = 0
    """Of the random adapter."""


def main() -> int:
    args = parse_arguments(Args, prog="retrofit.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    asked = None if args.layers is None else sizes(args.layers)
    if not 0 <= args.seed < 2**31:
        raise InputError(f"--seed = {args.seed}: must be in [0, 2**31)")
    target = local_path(args.dst)
    require_empty(target)
    if Path(args.src).is_file():
        raise InputError(f"{args.src}: is a file; convert a GGUF file with experiments/convert_huggingface.py first")
    import jax

    from rdlm.folders import (
        broken,
        check_model_folder,
        describe,
        local_folder,
        one_dtype,
        read_model,
        write_huggingface,
        write_run,
    )
    from rdlm.hf import is_exportable
    from rdlm.model import retrofit
    from rdlm.model.retrofit import cut

    source = local_folder(args.src)
    check_model_folder(source)
    before, plain = read_model(source)
    layers = len(plain.layers)
    prelude, core, coda = chosen(layers, args.drop) if asked is None else asked
    parts = cut(layers, prelude, core, coda, args.drop)
    key = jax.random.key(args.seed)
    params, config = retrofit(
        before, plain, prelude=prelude, core=core, coda=coda, adapter=args.adapter, drop=args.drop, key=key
    )
    print(f"read {source}: {describe(before)}")
    for line in broken(before):
        print(line)
    for name in ("prelude", "core", "coda", "dropped"):
        print(f"  {name:8} {shown(getattr(parts, name))}")
    untied = ", head a copy of the embedding" if plain.tie_embeddings else ""
    print(f"  adapter  {args.adapter}{untied}")
    notes: list[str] = []
    if is_exportable(config):
        with complete_folder(target, alike=False) as partial:
            write_huggingface(partial, params, config, source)
    else:
        params, config, notes = one_dtype(params, config)
        notes += write_run(target, params, config, source)
    for line in notes:
        print(line)
    print(f"wrote {'Hugging Face' if is_exportable(config) else 'run'} folder {target}: {describe(params)}")
    return 0


def sizes(text: str) -> tuple[int, int, int]:
    """'7/16/7' as numbers."""
    if not re.fullmatch(r"\d{1,5}/\d{1,5}/\d{1,5}", text):
        raise InputError(f"--layers = {text!r}: must be the layers of prelude, core and coda, such as 7/16/7")
    prelude, core, coda = map(int, text.split("/"))
    return prelude, core, coda


def chosen(layers: int, drop: bool) -> tuple[int, int, int]:
    """The cut of a model with `layers` layers where none is asked for."""
    if not drop:
        return layers // 4, layers - 2 * (layers // 4), layers // 4
    if layers not in PUBLISHED:
        raise InputError(f"--drop: no cut of a model with {layers} layers is published; give --layers P/C/D too")
    return PUBLISHED[layers]


def shown(layers: range) -> str:
    """'layers 7 to 22 (16)', as the source counts them."""
    return f"layers {layers[0]} to {layers[-1]} ({len(layers)})" if layers else "none"


if __name__ == "__main__":
    run_command(main)
