"""Making prepared data, used by commands: finding and reading documents, encoding, packing into shards."""

from rdlm.data.prepare.build import Corpus, build
from rdlm.data.prepare.documents import read_documents
from rdlm.data.prepare.embedded import prepare_embedded, prepared_folder
from rdlm.data.prepare.example import marked_example
from rdlm.data.prepare.input_files import InputFile, described, find_files
from rdlm.data.prepare.parts import Part, cut_files, texts_of
from rdlm.data.prepare.shards import build_shard, held_out

__all__ = [
    "Corpus",
    "InputFile",
    "Part",
    "build",
    "build_shard",
    "cut_files",
    "described",
    "find_files",
    "held_out",
    "marked_example",
    "prepare_embedded",
    "prepared_folder",
    "read_documents",
    "texts_of",
]
