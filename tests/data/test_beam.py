"""The Beam pipeline gives the folder that processes give. Runs where the extra `beam` is installed."""

import hashlib
import json

import fsspec
import pytest

from rdlm.data import Recipe
from rdlm.data.prepare import Corpus, build, cut_files, find_files
from rdlm.data.prepare.beam import build_with_beam
from rdlm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_only()
RECIPE = Recipe(32, "best_fit", 0.2)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "word " * (i % 30)}) + "\n" for i in range(200)))
    return Corpus("files", path.name, cut_files(find_files([str(path)]), RECIPE.reading, 3000))


def contents(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_direct_runner_writes_the_same_bytes_as_processes(tmp_path, corpus, scheme):
    pytest.importorskip("apache_beam")
    build(tmp_path / "here", corpus, RECIPE, BYTES, processes=1, say=print)
    manifest = build_with_beam(f"{scheme}{tmp_path}/beam", corpus, RECIPE, BYTES)
    assert len(manifest.train.shards) > 3
    assert contents(tmp_path / "beam") == contents(tmp_path / "here")


def test_a_bad_document_is_named_and_leaves_no_manifest(tmp_path, corpus, one_line):
    pytest.importorskip("apache_beam")
    (tmp_path / "texts.jsonl").write_bytes((tmp_path / "texts.jsonl").read_bytes()[:-20] + b"\xff\n")
    with one_line("texts.jsonl, line .*: not UTF-8"):
        build_with_beam(str(tmp_path / "beam"), corpus, RECIPE, BYTES)
    assert not (tmp_path / "beam" / "manifest.json").exists()


def test_without_beam_one_line_says_how_to_get_it(tmp_path, corpus, one_line, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with one_line("--beam: Apache Beam is not installed .*rdlm.beam"):
        build_with_beam(str(tmp_path / "beam"), corpus, RECIPE, BYTES)


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer/tokenizer.json", "train.jsonl"])
@pytest.mark.parametrize("scheme", ["", "memory:/"])
def test_a_folder_of_somebody_else_is_not_written_to(tmp_path, corpus, one_line, name, scheme):
    target = f"{scheme}{tmp_path}/beam"
    fs, root = fsspec.core.url_to_fs(target)
    fs.makedirs(f"{root}/{name}".rpartition("/")[0])
    fs.pipe_file(f"{root}/{name}", b"mine")
    with one_line("beam: is there already and holds no prepared data; choose another --out"):
        build_with_beam(target, corpus, RECIPE, BYTES)
    assert [path.removeprefix(root) for path in fs.find(root)] == [f"/{name}"]


def test_shards_of_an_earlier_attempt_are_no_hindrance(tmp_path, corpus, one_line, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    (tmp_path / "beam" / ".work").mkdir(parents=True)
    (tmp_path / "beam" / "train-00000.array_record").write_bytes(b"")
    with one_line("--beam: Apache Beam is not installed"):  # the next check
        build_with_beam(str(tmp_path / "beam"), corpus, RECIPE, BYTES)
