"""lm-eval's tasks on our models, at every depth and with exit rules. The only room that imports lm_eval."""

from rdlm.config import InputError

try:
    import lm_eval.api.model  # noqa: F401  (to report that it is missing)
except ImportError as error:
    raise InputError(
        f"lm-eval: not installed ({error}); it comes with the extra `eval` (pip install 'rdlm[eval]')"
    ) from error

from rdlm.evaluation.lm_eval.model import DepthLM, Effort
from rdlm.evaluation.lm_eval.protocols import PROTOCOLS, PUBLISHED, Protocol
from rdlm.evaluation.lm_eval.tasks import DepthResult, evaluate, headline, load_tasks

__all__ = [
    "PROTOCOLS",
    "PUBLISHED",
    "DepthLM",
    "DepthResult",
    "Effort",
    "Protocol",
    "evaluate",
    "headline",
    "load_tasks",
]
