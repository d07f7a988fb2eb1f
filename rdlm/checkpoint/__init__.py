"""Run folders: what a training run leaves behind and everything else starts from. The only room that imports orbax.

    config.json   metrics.jsonl   tokenizer/   checkpoints/STEP/{params,optimizer,meta}   loss_by_depth.json

`meta` is JSON: the full config, the tokenizer's hash, the step, the state of the data, and sums of all stored bits.
Every reader adds the bits up again: a flipped bit is as much damage as a file cut short.
"""

import logging

from rdlm.checkpoint.integrity import as_abstract
from rdlm.checkpoint.manager import Checkpoints, SaveError, save_parameters
from rdlm.checkpoint.run_folder import (
    load_checkpoint,
    load_tokenizer,
    read_config,
    read_meta,
    saved_steps,
    write_config,
)

# Orbax tells every detail of every save at level INFO and WARNING, and at ERROR the traceback of what it raises anyway.
logging.getLogger("absl").setLevel(logging.CRITICAL)

__all__ = [
    "Checkpoints",
    "SaveError",
    "as_abstract",
    "load_checkpoint",
    "load_tokenizer",
    "read_config",
    "read_meta",
    "save_parameters",
    "saved_steps",
    "write_config",
]
