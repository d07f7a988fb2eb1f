"""Documents from TFDS: any dataset of its catalogue, one already prepared, or the embedded corpus. No TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from rdlm.config import InputError, did_you_mean, local_path, one_line
from rdlm.data.manifest import Reading
from rdlm.data.prepare import factbook
from rdlm.data.prepare.parts import Part, Text, document_of

# TFDS knows the builders of these modules only after their import.
_MODULES = ("text", "question_answering", "translate", "summarization")


def dataset(name: str, data_dir: str | Path, manual_dir: str | Path | None = None) -> tfds.core.DatasetBuilder:
    """A TFDS builder whose data are in `data_dir` as array_record; they are prepared first if missing.

    Args:
      name: as in TFDS, for example "story_cloze/2016" or "imdb_reviews".
      data_dir: folder of TFDS datasets; one already prepared there is used as it is.
      manual_dir: files that the dataset cannot download, or that were downloaded before.

    Raises:
      InputError: no such dataset, it cannot be downloaded or made without TensorFlow, files are missing or differ from
        the recorded checksums, or it is stored in another format than array_record.
    """
    base, _, config = name.partition("/")
    for module in _MODULES:
        importlib.import_module(f"tensorflow_datasets.{module}")
    known = tfds.list_builders(with_community_datasets=False)
    folder = local_path(data_dir)
    try:
        # TFDS would look up an unknown name in the network for half a minute.
        if base not in known and not (folder / base).is_dir():
            raise InputError(f"tfds = {name!r}: TFDS knows no such dataset.{did_you_mean(base, known)}")
        tfds.disable_progress_bar()
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # no line for every retry
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints an announcement
            builder = _prepared(folder / name)
            if builder is None:
                builder = tfds.builder(name, data_dir=str(folder), file_format="array_record")
                downloads = tfds.download.DownloadConfig(manual_dir=str(local_path(manual_dir)) if manual_dir else None)
                builder.download_and_prepare(file_format="array_record", download_config=downloads)
    except InputError:
        raise
    except tfds.download.download_manager.NonMatchingChecksumError as error:
        raise InputError(
            f"tfds = {name!r}: a file differs from its recorded checksum ({one_line(error)}); fetch it again"
        ) from error
    except Exception as error:  # builders raise many kinds of errors
        raise InputError(f"tfds = {name!r}: cannot be prepared ({one_line(error)}){_hint(error, config)}") from error
    return builder


def dataset_parts(builder: tfds.core.DatasetBuilder, split: str, field: str, part_bytes: int) -> list[Part]:
    """Parts of about `part_bytes` of a split, for example "train" or "validation".

    Raises:
      InputError: no such split, field or random access.
    """
    splits = builder.info.splits
    if split not in splits:
        raise InputError(
            f"tfds_split = {split!r}: not in {builder.info.full_name}.{did_you_mean(split, map(str, splits))}"
        )
    if field.partition(".")[0] not in builder.info.features:
        raise InputError(
            f"field = {field!r}: examples of {builder.info.full_name} have none; pass --field with one of: "
            f"{', '.join(map(repr, builder.info.features))}"
        )
    info = splits[split]
    if not info.num_examples:
        raise InputError(f"tfds_split = {split!r}: {builder.info.full_name} has no examples there")
    count = max(1, -(-int(info.num_bytes) // part_bytes))
    edges = sorted({info.num_examples * i // count for i in range(count + 1)})
    share = int(info.num_bytes) // (len(edges) - 1)
    path = str(builder.data_path)
    return [Part("tfds", (path,), share, a, b, split) for a, b in itertools.pairwise(edges)]


def read(part: Part, reading: Reading, advance: Callable[[int], None]) -> Iterator[Text | InputError]:
    """The documents of a part of kind "tfds" or "factbook"; in place of one that cannot be read, the error.

    Raises:
      InputError: the files are damaged.
    """
    if part.kind == "factbook":
        yield from factbook.documents(Path(part.paths[0]))
        advance(part.size)
        return
    [path] = part.paths
    try:
        source = tfds.builder_from_directory(path).as_data_source(split=part.split)
        for i in range(part.start, len(source) if part.end is None else part.end):
            try:
                document: Text | InputError = document_of(source[i], reading, f"{path}, example {i}")
            except InputError as error:
                document = error
            yield document
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}); prepare it again in another --tfds-dir"
        ) from error
    advance(part.size)


def _prepared(folder: Path) -> tfds.core.DatasetBuilder | None:
    """The newest version below `folder`, if there is one."""
    if (folder / "dataset_info.json").exists():
        found = folder
    else:
        versions = [p.parent for p in folder.glob("*/dataset_info.json")]
        if not versions:
            return None
        found = max(versions, key=lambda p: [int(n) if n.isdigit() else 0 for n in p.name.split(".")])
    builder = tfds.builder_from_directory(found)
    stored = builder.info.file_format.value if builder.info.file_format else "an unknown format"
    if stored != "array_record":
        raise InputError(f"{found}: stored as {stored}; prepare it again with file_format='array_record'")
    return builder


def _hint(error: Exception, config: str) -> str:
    if isinstance(error, ImportError) and "tensorflow" in str(error).lower():
        return (
            "; this dataset needs TensorFlow: prepare it elsewhere as array_record and pass its folder as tfds_data_dir"
        )
    if isinstance(error, (FileNotFoundError, AssertionError)):
        return "; put its files into the folder given as manual_dir"
    if not config and "config" in str(error).lower():
        return "; name a configuration: NAME/CONFIGURATION"
    return ""
