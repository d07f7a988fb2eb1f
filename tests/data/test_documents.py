"""Files to documents: every document once however files are cut, and one line for whatever cannot be read."""

import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdlm.data import Reading
from rdlm.data.prepare import cut_files, find_files, read_documents
from rdlm.data.prepare.parts import Part

LINES = st.lists(st.sampled_from(["", " ", "a", "bc", "déf 🙂", "x" * 30, "\t"]), max_size=30)
ENDS = st.sampled_from(["\n", "\r\n"])


def everything(paths, reading, part_bytes=10**9, skipped=None):
    cut = cut_files(find_files([str(path) for path in paths]), reading, part_bytes)
    return [document for part in cut for document in read_documents(part, reading, skipped=skipped)]


def paragraphs(lines):
    """What stands between blank lines, the slow way."""
    found, current = [], []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line)
        elif current:
            found.append("\n".join(current))
            current = []
    return found


@given(LINES, ENDS, st.integers(1, 40), st.sampled_from(["line", "blank_line"]))
def test_a_file_cut_anywhere_gives_every_document_once(tmp_path_factory, lines, end, part_bytes, document):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(end.join(lines).encode())
    expected = [line for line in lines if line.strip()] if document == "line" else paragraphs(lines)
    reading = Reading(document=document)
    assert everything([path], reading, part_bytes) == expected
    if path.stat().st_size > part_bytes:  # control: it was cut
        assert len(cut_files(find_files([str(path)]), reading, part_bytes)) > 1


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=12), st.integers(1, 60))
def test_json_lines_cut_anywhere_give_every_document_once(tmp_path_factory, texts, part_bytes):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    assert everything([path], Reading(), part_bytes) == [text for text in texts if not text.isspace()]


TEXTS = [f"text {i} é🙂\nsecond line" for i in range(50)]


def write(folder, name):
    """TEXTS in a file of the kind its name says."""
    path = folder / name
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=7)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    elif name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("part_bytes", [10**9, 300])
def test_every_format_gives_the_same_documents(tmp_path, name, part_bytes):
    path = write(tmp_path, name)
    assert everything([path], Reading(), part_bytes) == TEXTS


def test_a_url_gives_the_same_documents(tmp_path):
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        write(tmp_path, name)
    assert everything([f"file://{tmp_path}"], Reading(), 300) == TEXTS * 3
    assert everything([f"file://{tmp_path}/*.jsonl"], Reading()) == TEXTS


def test_a_folder_is_searched_in_order_and_small_files_share_a_part(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {"b/1.txt": "one", "a.txt": "zero", ".hidden.txt": "no", "b/2.md": "two", "c.pdf": "no"}.items():
        (tmp_path / name).write_text(text)
    cut = cut_files(find_files([str(tmp_path)]), Reading(), 10**6)
    assert len(cut) == 1
    assert list(read_documents(cut[0], Reading())) == ["zero", "one", "two"]
    assert len(cut_files(find_files([str(tmp_path)]), Reading(), 4)) == 3  # too small to share


def test_progress_adds_up_to_the_input(tmp_path):
    path = write(tmp_path, "a.jsonl")
    for part in cut_files(find_files([str(path)]), Reading(), 500):
        read_bytes = []
        list(read_documents(part, Reading(), advance=read_bytes.append))
        assert abs(sum(read_bytes) - part.size) < 200  # a part ends with the line that begins in it


def test_conversations_are_lists_of_messages(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    assert everything([tmp_path / "a.jsonl"], Reading(field="messages")) == [chat]


# What cannot be read


def bad_files(folder):
    """name -> (content, what the message says)."""
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode() * 20, mtime=0)
    with pyarrow.CompressedOutputStream(str(folder / "whole"), "zstd") as file:
        file.write(json.dumps({"text": "y"}).encode() * 1000)
    zstd = (folder / "whole").read_bytes()
    return {
        "utf8.txt": (b"good\n\xff\xfe bad", "utf8.txt, byte 0: not UTF-8"),
        "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "utf8.jsonl, byte 14: not UTF-8"),
        "json.jsonl": (b'{"text": "a"}\n{"text": \n', "json.jsonl, byte 14: not JSON"),
        "list.jsonl": (b"[1]\n", "list.jsonl, byte 0: a JSON object was expected, not list"),
        "field.jsonl": (b'{"body": "a", "id": 3}\n', "no field 'text'; pass --field with one of: 'body', 'id'"),
        "number.jsonl": (b'{"text": 3}\n', "field 'text' is int, neither text nor a list of messages"),
        "cut.jsonl.gz": (whole[: len(whole) // 2], "cut.jsonl.gz: cut short or damaged .*copy it again"),
        "cut.jsonl.zst": (zstd[: len(zstd) // 2], "cut.jsonl.zst: cannot be read .*Truncated.*copy it again"),
        "no.jsonl.gz": (b"never compressed", "no.jsonl.gz: cut short or damaged"),
        "no.parquet": (b"no parquet at all", "no.parquet: cut short or damaged"),
    }


@pytest.mark.parametrize(
    "name",
    ["utf8.txt", "utf8.jsonl", "json.jsonl", "list.jsonl", "field.jsonl", "number.jsonl", "cut.jsonl.gz",
     "cut.jsonl.zst", "no.jsonl.gz", "no.parquet"],
)  # fmt: skip
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, one_line):
    content, message = bad_files(tmp_path)[name]
    (tmp_path / name).write_bytes(content)
    with one_line(message):
        everything([tmp_path / name], Reading())


def test_bad_documents_can_be_left_out_and_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "one"}\n{"text": "\xff"}\nnot json\n{"text": ""}\n\n{"text": "two"}\n'
    )
    skipped = Counter()
    reading = Reading(bad_documents="skip")
    assert everything([tmp_path / "a.jsonl"], reading, skipped=skipped) == ["one", "two"]
    assert skipped == {"bad": 2, "empty": 2}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "nothing: no such file or folder"),
        ("a.txtt", "did you mean 'a.txt'"),
        ("b.pdf", "b.pdf: not a known kind of file; known are .txt"),
        ("empty", "empty: no file there ends in .txt"),
        ("*.md", "no such file"),
        ("file:///nowhere/*.txt", "no file there ends in"),
        ("nonsense://bucket/x.txt", "nonsense://bucket/x.txt: cannot be listed"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(tmp_path, path, message, one_line):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.pdf").write_text("b")
    (tmp_path / "empty").mkdir()
    with one_line(message):
        find_files([path if "://" in path else str(tmp_path / path)])


def test_a_document_too_large_for_memory_is_refused(tmp_path, monkeypatch, one_line):
    monkeypatch.setattr("rdlm.data.prepare.documents._MAX_BYTES", 2**20)
    (tmp_path / "a.txt").write_text("line of text\n" * 100_000)
    with one_line("byte 0: a document of more than 1 MiB; cut it, or .*--document line"):
        everything([tmp_path / "a.txt"], Reading())
    with one_line("a document of more than 1 MiB"):
        everything([tmp_path / "a.txt"], Reading(document="blank_line"))
    assert len(everything([tmp_path / "a.txt"], Reading(document="line"))) == 100_000


def test_a_file_that_is_gone_is_named(tmp_path, one_line):
    with one_line("gone.txt: cannot be read"):
        list(read_documents(Part("text", (str(tmp_path / "gone.txt"),), 3), Reading()))
