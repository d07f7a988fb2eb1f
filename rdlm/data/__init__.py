"""Tokenised, packed training data: prepared once, read as a pure function of the step."""

from rdlm.data.loader import Batch, PackedData
from rdlm.data.manifest import Manifest, read_manifest
from rdlm.data.packing import IGNORED, Row, concatenate_and_split, sequence_ids
from rdlm.data.prefetch import prefetch
from rdlm.data.prepare import held_out, prepare, prepared_folder

__all__ = [
    "IGNORED",
    "Batch",
    "Manifest",
    "PackedData",
    "Row",
    "concatenate_and_split",
    "held_out",
    "prefetch",
    "prepare",
    "prepared_folder",
    "read_manifest",
    "sequence_ids",
]
