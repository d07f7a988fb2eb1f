"""Files to documents: every document once however files are cut, and one line for whatever cannot be read."""

import bz2
import csv
import gzip
import json
import lzma
from collections import Counter

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdlm.data import Reading
from rdlm.data.prepare import cut_files, find_files, read_documents
from rdlm.data.prepare.input_files import opened
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
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif name.endswith(".feather"):
        pyarrow.feather.write_feather(table, str(path), compression="zstd")
    elif name.endswith(".arrow"):  # a stream, as `datasets` writes it
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    elif name.lower().endswith((".csv", ".tsv")):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            rows = csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",")
            rows.writerows([("id", "text"), *enumerate(TEXTS)])
    elif name.startswith("object"):
        path.write_text("\n".join(json.dumps({"id": i, "text": text}, indent=1) for i, text in enumerate(TEXTS)))
    elif name.startswith("array"):
        objects = [{"id": i, "text": text, "tags": ["a, ]", {"}": '"'}]} for i, text in enumerate(TEXTS)]
        path.write_text(json.dumps(objects, indent=2 if name.endswith(".json") else None))
    elif name.endswith((".gz", ".bz2", ".xz")):
        compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[name.rpartition(".")[2]]
        path.write_bytes(compress(content))
    elif name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name",
    [*("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.JSONL.xz", "a.parquet", "a.arrow"),
     *("a.feather", "a.csv", "B.CSV", "a.tsv", "array.json", "array.jsonl", "objects.json")],
)  # fmt: skip
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


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}, {"from": "tool", "value": "3"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a "}, "b"]}]
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
CALLS = [{"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (SHAREGPT, [("user", "hi"), ("assistant", "yo"), ("tool", "3")]),
        (PARTS, [("user", "a b")]),
        (CALLS, [("assistant", "")]),
        ([{"role": "user", "content": "x", "from": "human"}], [("user", "x")]),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_conversations_are_read_as_people_write_them(tmp_path, written, read, name):
    if name == "a.parquet" and written is not PARTS:  # parquet has one type per column
        pyarrow.parquet.write_table(pyarrow.table({"chat": [written]}), tmp_path / name)
    else:
        (tmp_path / "a.jsonl").write_text(json.dumps({"chat": written}))
        name = "a.jsonl"
    [found] = everything([tmp_path / name], Reading(field="chat"))
    assert [(message["role"], message["content"]) for message in found] == read
    assert found[0].get("tool_calls") == written[0].get("tool_calls")
    assert None not in found[0].values()


NESTED = [{"meta": {"text": "deep", "a": {"b": "deeper"}}}, {"meta.text": "flat"}, {"meta": {}}, {"meta": "text"}]


def test_a_field_may_lie_within_another(tmp_path, one_line):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in NESTED))
    skip = Reading(field="meta.text", bad_documents="skip")
    assert everything([path], skip) == ["deep", "flat"]
    assert everything([path], Reading(field="meta.a.b", bad_documents="skip")) == ["deeper"]
    with one_line("no field 'meta.txt'; pass --field with one of: 'meta', 'meta.text', 'meta.a'"):
        everything([path], Reading(field="meta.txt"))
    table = pyarrow.table({"meta": [{"text": "one", "id": 1}, {"text": "two", "id": 2}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, str(tmp_path / "a.feather"))
    for name in ("a.parquet", "a.feather"):
        assert everything([tmp_path / name], Reading(field="meta.text")) == ["one", "two"]
        with one_line(f"{name}: no column 'body.text'; pass --field with one of: 'meta'"):
            everything([tmp_path / name], Reading(field="body.text"))


# What cannot be read


BAD = {  # file -> content, its good documents, its bad ones, what is said of the first of these
    "digits.jsonl": ('{"text": "a"}\n{"text": "b", "n": ' + "1" * 5000 + "}\n", ["a"], 1, "line 2: not JSON"),
    "deep.jsonl": ('{"text": "a"}\n' + "[" * 100_000 + "\n", ["a"], 1, "line 2: not JSON .too deep"),
    "half.jsonl": ('{"text": "a"}\n{"text": "\\ud83d"}\n', ["a"], 1, "line 2: not valid Unicode .*surrogates"),
    "array.json": ('[{"text": "a"},\n {"txt": "b"},\n {"text": 3}, {"text": "c"}]', ["a", "c"], 2, "line 2: no field"),
    "objects.json": (
        '{\n"text": "a"\n}\n{\n "txt": ""}\nx {"text": "c"}{"text": "d"}\n{',
        ["a", "d"],
        3,
        "line 4: no",
    ),
    "digits.json": ('[{"text": "a"}, {"text": "b", "n": ' + "1" * 5000 + "}]", ["a"], 1, "line 1: not JSON"),
    "cells.csv": ("id,text\n1,a\n2,b, and c\n3\n\n4,d\n", ["a", "d"], 2, "line 3: 3 cells instead of 2; put text"),
    "latin.csv": (b"text\na\ncaf\xe9\nb\n", ["a", "b"], 1, "line 3: not valid Unicode"),
    "quote.csv": ('text\na\n"b\n', ["a"], 1, "line 3: not CSV .unexpected end of data"),
    "nul.jsonl": ('{"text": "a"}\n\0\0\n', ["a"], 1, "line 2: not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_every_bad_document_is_named_or_left_out(tmp_path, name, one_line):
    content, good, bad, message = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with one_line(f"{name}, {message}"):
        everything([tmp_path / name], Reading())
    skipped = Counter()
    assert everything([tmp_path / name], Reading(bad_documents="skip"), skipped=skipped) == good
    assert skipped["bad"] == bad


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "content": None}, "'content' is missing or not text"),
        ({"role": "assistant"}, "'content' is missing or not text"),
        ({"role": "user", "content": 3}, "'content' is missing or not text"),
        ({"content": "x"}, "'role' is missing or not text"),
        ({"from": 3, "value": "x"}, "'role' is missing or not text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a part that is not text .image_url"),
        ({"role": "user", "content": [3]}, "a part that is not text .int"),
        ({"role": "user", "content": "half \ud83d"}, "not valid Unicode"),
        ({"role": "user", "content": "x", "name": "half \ud83d"}, "not valid Unicode"),
    ],
)
def test_a_bad_message_is_named_or_left_out(tmp_path, message, said, one_line):
    good = [{"role": "user", "content": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"chat": c}) + "\n" for c in (good, [*good, message])))
    with one_line(f"a.jsonl, line 2: .*{said}"):
        everything([tmp_path / "a.jsonl"], Reading(field="chat"))
    skipped = Counter()
    assert everything([tmp_path / "a.jsonl"], Reading("chat", bad_documents="skip"), skipped=skipped) == [good]
    assert skipped == {"bad": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_line_of_an_error_counts_from_the_start_of_the_file(tmp_path, name, one_line):
    lines = ['{"text": "a"}'] * 90
    lines[66] = '{"text": 3}'
    content = "\r\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    parts = cut_files(find_files([str(tmp_path / name)]), Reading(), 200)  # of which the later ones begin inside
    assert len(parts) == 1 if name.endswith("gz") else len(parts) > 5
    with one_line(f"{name}, line 67: field 'text' is int"):
        for part in parts:
            list(read_documents(part, Reading()))


def bad_files(folder):
    """name -> (content, what the message says)."""
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode() * 20, mtime=0)
    with pyarrow.CompressedOutputStream(str(folder / "whole"), "zstd") as file:
        file.write(json.dumps({"text": "y"}).encode() * 1000)
    zstd = (folder / "whole").read_bytes()
    return {
        "utf8.txt": (b"good\n\xff\xfe bad", "utf8.txt, line 1: not UTF-8"),
        "utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "utf8.jsonl, line 2: not UTF-8"),
        "json.jsonl": (b'{"text": "a"}\n{"text": \n', "json.jsonl, line 2: not JSON"),
        "list.jsonl": (b"[1]\n", "list.jsonl, line 1: a JSON object was expected, not list"),
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
    with one_line("line 1: a document of more than 1 MiB; cut it, or .*--document line"):
        everything([tmp_path / "a.txt"], Reading())
    with one_line("a document of more than 1 MiB"):
        everything([tmp_path / "a.txt"], Reading(document="blank_line"))
    assert len(everything([tmp_path / "a.txt"], Reading(document="line"))) == 100_000
    for document, expected in (("line", ["a", "b", "c"]), ("blank_line", ["a", "c"]), ("file", [])):
        (tmp_path / "a.txt").write_text("a\n\n" + "x" * 2**20 + "xx\nb\n\nc\n")
        skipped = Counter()
        assert everything([tmp_path / "a.txt"], Reading("text", document, "skip"), 900_000, skipped) == expected
        assert skipped["bad"] == 1


def test_a_window_that_is_too_long_is_no_damage(tmp_path, one_line):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    said = "a.jsonl.zst: compressed with a window that is too long to read; run: zstd -d --long=31"
    with one_line(said), opened(str(tmp_path / "a.jsonl.zst")):  # as `zstd --long=31` makes pyarrow say
        raise OSError("ZSTD decompress failed: Frame requires too much memory for decoding")


def test_a_file_that_is_gone_is_named(tmp_path, one_line):
    with one_line("gone.txt: cannot be read"):
        list(read_documents(Part("text", (str(tmp_path / "gone.txt"),), 3), Reading()))
