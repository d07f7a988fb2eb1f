"""Run folders: written by training, read by everything else. The only room that imports orbax.

    config.json   metrics.jsonl   tokenizer/   checkpoints/STEP/{params,optimizer,meta}   loss_by_depth.json

`meta` is JSON: the full config, the tokenizer's hash, the step, the state of the data, and a checksum of the arrays.
Every reader compares the checksum, so that a flipped bit is found as well as a file cut short.
"""

import logging

from rdlm.checkpoint.integrity import as_abstract
from rdlm.checkpoint.manager import Checkpoints, SaveError, save_parameters
from rdlm.checkpoint.run_folder import (
    StoredCheckpoint,
    load_checkpoint,
    load_tokenizer,
    open_checkpoint,
    read_config,
    read_meta,
    saved_steps,
    write_config,
)

# Orbax logs every detail of every save as INFO or WARNING, and as ERROR the traceback of exceptions that it raises too.
logging.getLogger("absl").setLevel(logging.CRITICAL)

__all__ = [
    "Checkpoints",
    "SaveError",
    "StoredCheckpoint",
    "as_abstract",
    "load_checkpoint",
    "load_tokenizer",
    "open_checkpoint",
    "read_config",
    "read_meta",
    "save_parameters",
    "saved_steps",
    "write_config",
]
