"""An OpenAI-compatible server of one model; every request chooses how deep to think. Needs the extra `serve`."""

from rdlm.serve.options import ServeOptions
from rdlm.serve.server import in_thread, serve

__all__ = ["ServeOptions", "in_thread", "serve"]
