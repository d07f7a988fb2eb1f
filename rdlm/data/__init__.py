"""Training data: packed rows read as a pure function of the step, or streamed. `rdlm.data.prepare` makes the rows.

Only `from_config`, which makes the embedded corpus on first use, and `stream`, which encodes during training, use it.
"""

from rdlm.data.from_config import RunData, open_data, open_validation, prepared_tokenizer
from rdlm.data.loader import Batch, PackedData
from rdlm.data.manifest import Manifest, Reading, Recipe, read_manifest
from rdlm.data.mixture import Chain, Mixture
from rdlm.data.packing import IGNORED, Document, Row, best_fit, concatenate_and_split, document_start, sequence_ids
from rdlm.data.prefetch import prefetch
from rdlm.data.stream import StreamedData

__all__ = [
    "IGNORED",
    "Batch",
    "Chain",
    "Document",
    "Manifest",
    "Mixture",
    "PackedData",
    "Reading",
    "Recipe",
    "Row",
    "RunData",
    "StreamedData",
    "best_fit",
    "concatenate_and_split",
    "document_start",
    "open_data",
    "open_validation",
    "prefetch",
    "prepared_tokenizer",
    "read_manifest",
    "sequence_ids",
]
