"""Tokenised, packed training data: prepared once, read as a pure function of the step; or streamed."""

from rdlm.data.from_config import RunData, open_data, open_validation
from rdlm.data.loader import Batch, PackedData
from rdlm.data.manifest import Manifest, Recipe, read_manifest
from rdlm.data.mixture import Chain, Mixture
from rdlm.data.packing import IGNORED, Document, Row, best_fit, concatenate_and_split, document_start, sequence_ids
from rdlm.data.prefetch import prefetch
from rdlm.data.prepare.build import Corpus, build
from rdlm.data.prepare.documents import Part, Reading, parts, read
from rdlm.data.prepare.embedded import prepare_embedded, prepared_folder
from rdlm.data.prepare.find_files import InputFile, find
from rdlm.data.prepare.shards import build_shard, held_out
from rdlm.data.stream import StreamedData

__all__ = [
    "IGNORED",
    "Batch",
    "Chain",
    "Corpus",
    "Document",
    "InputFile",
    "Manifest",
    "Mixture",
    "PackedData",
    "Part",
    "Reading",
    "Recipe",
    "Row",
    "RunData",
    "StreamedData",
    "best_fit",
    "build",
    "build_shard",
    "concatenate_and_split",
    "document_start",
    "find",
    "held_out",
    "open_data",
    "open_validation",
    "parts",
    "prefetch",
    "prepare_embedded",
    "prepared_folder",
    "read",
    "read_manifest",
    "sequence_ids",
]
