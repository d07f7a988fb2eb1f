"""Hugging Face folders of the public reference: load, save, recognise. The only room for the safetensors format."""

from rdlm.hf.config import model_config
from rdlm.hf.convert import is_exportable, is_huggingface, load_huggingface, save_huggingface
from rdlm.hf.names import table

__all__ = ["is_exportable", "is_huggingface", "load_huggingface", "model_config", "save_huggingface", "table"]
