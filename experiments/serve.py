"""Serve a model over HTTP, as OpenAI's API; every request chooses how many recurrences its tokens take.

    python experiments/serve.py runs/quickstart
    python experiments/serve.py runs/quickstart --port 8080 --lanes 32 --exit kl latent_diff --max-steps 32
    python experiments/serve.py models/smollm2 --host 0.0.0.0 --api-key-file keys.txt

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
      -d '{"prompt": "Geography", "max_tokens": 32, "num_steps": 8}'

FOLDER is a run folder or a Hugging Face folder. A model on several hosts: the same command on all of them, with
--tensor and --data for all their devices, and the first one answers (docs/serve.md). Needs the extra `serve` (pip
install 'rdlm[serve]'). Exit codes: 0 stopped by SIGTERM or Ctrl-C, 1 another host is lost, 2 wrong input.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from rdlm.config import require
from rdlm.runtime import agree, parse_arguments, run_command, start, together
from rdlm.serve import ServeOptions


@dataclasses.dataclass(frozen=True)
class Args:
    """Serve the model in FOLDER."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Run folder or Hugging Face folder."""
    options: Annotated[ServeOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=ServeOptions)
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, so give keys then."""
    port: int = 8000
    """Port to listen on; 0 takes one that is free."""
    ema: bool = False
    """Use the moving average of the weights, if the run kept one (optimizer.ema_decay)."""
    tensor: int = 1
    """Devices that share the model, each with some of its heads and columns."""
    data: int = 1
    """Copies of the model, each on --tensor devices; they divide the lanes."""


def main() -> int:
    args = parse_arguments(Args, prog="serve.py", description=__doc__)
    require(0 <= args.port < 2**16, "--port", args.port, "must be in [0, 65535]")
    from rdlm.run import find  # JAX takes seconds, so only now
    from rdlm.serve import serve

    start(repr(args))
    run = together(lambda: find(args.folder, ema=args.ema, tensor=args.tensor, data=args.data))
    agree({"checkpoint": run.step})  # a training run may have saved another one meanwhile
    return serve(run, args.options, args.host, args.port)


if __name__ == "__main__":
    run_command(main)
