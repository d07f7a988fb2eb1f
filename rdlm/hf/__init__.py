"""Hugging Face folders of the public reference: load, save, recognise. The only room for the safetensors format."""

from rdlm.hf.config import model_config
from rdlm.hf.convert import (
    StoredModel,
    is_exportable,
    is_huggingface,
    load_huggingface,
    open_huggingface,
    save_huggingface,
)
from rdlm.hf.names import table

__all__ = [
    "StoredModel",
    "is_exportable",
    "is_huggingface",
    "load_huggingface",
    "model_config",
    "open_huggingface",
    "save_huggingface",
    "table",
]
