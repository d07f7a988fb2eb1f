"""Finding files: every one once, through links, nothing taken or left out without a word."""

import json
import os
from collections import Counter

import pytest

from rdlm.data.prepare import described, find_files
from rdlm.data.prepare.input_files import changed, fingerprint

LINE = json.dumps({"text": "a"}) + "\n"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A working folder with `data/a.jsonl`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(LINE)
    return tmp_path / "data"


def names(*paths):
    """Names that are found, and what is left out."""
    left_out = Counter()
    return [os.path.basename(file.path) for file in find_files(list(map(str, paths)), left_out)], dict(left_out)


def test_a_file_in_several_spellings_is_one(data):
    spelled = ["data/a.jsonl", "./data/a.jsonl", "data/../data/a.jsonl", data / "a.jsonl", f"file://{data}/a.jsonl"]
    assert names(*spelled, "data", "data/*.jsonl") == (["a.jsonl"], {"named twice": 6})
    (data / "b.jsonl").symlink_to("a.jsonl")
    os.link(data / "a.jsonl", data / "c.jsonl")
    assert names("data") == (["a.jsonl"], {"named twice": 2})


def test_linked_folders_are_searched_once(data, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_text(LINE)
    (data / "one").symlink_to(tmp_path / "one")
    (data / "again").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "back").symlink_to(data)  # a loop
    (tmp_path / "one" / "above").symlink_to(tmp_path)  # would bring in two.jsonl, which nobody named
    found, left_out = names("data")
    assert found == ["a.jsonl", "one.jsonl"]
    assert left_out == {"linked folders that are there already": 3}
    (data / "two").symlink_to(tmp_path / "two")
    assert names("data")[0] == ["a.jsonl", "one.jsonl", "two.jsonl"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("README.md", "text beside other files"),
        ("LICENSE.txt", "text beside other files"),
        ("sub/notes.txt.gz", "text beside other files"),
        ("tokenizer.json", "settings of a tokenizer, model or dataset"),
        ("dataset_info.json", "settings of a tokenizer, model or dataset"),
        (".secret.jsonl", "hidden"),
        (".cache/b.jsonl", "hidden folders"),
        ("b.pdf", "of unknown kind"),
        ("a.jsonl.gz", "compressed copies"),
        ("b.jsonl.zip", "of unknown kind"),
    ],
)
def test_what_is_beside_the_data_is_left_out_and_counted(data, name, reason):
    (data / name).parent.mkdir(exist_ok=True)
    (data / name).write_text("not for training")
    assert names("data") == (["a.jsonl"], {reason: 1})
    assert described(find_files(["data"]), Counter({reason: 1})) == f"1 file (1 .jsonl); left out: 1 {reason}"


def test_text_is_data_where_nothing_else_is(data):
    (data / "a.jsonl").unlink()
    for name in ("README.md", "b.txt"):
        (data / name).write_text("text")
    assert names("data") == (["README.md", "b.txt"], {})
    assert names("data/README.md", "data") == (["README.md", "b.txt"], {"named twice": 1})


def test_prepared_data_within_the_input_are_no_input(data):
    (data / "out" / "tokenizer").mkdir(parents=True)
    (data / "out" / "manifest.json").write_text("{}")
    assert names("data") == (["a.jsonl"], {"folders of prepared data": 1})
    (data / "out" / "tokenizer").rmdir()  # control: a manifest of another kind
    assert names("data")[0] == ["a.jsonl", "manifest.json"]


def test_links_that_lead_nowhere_and_pipes_are_counted_or_named(data, one_line):
    (data / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(data / "pipe.jsonl")
    assert names("data") == (["a.jsonl"], {"broken links or pipes": 2})
    with one_line("gone.jsonl: a link to nowhere, which does not exist"):
        find_files([str(data / "gone.jsonl")])
    with one_line("pipe.jsonl: a pipe or device.*write it to a file first"):
        find_files([str(data / "pipe.jsonl")])


def test_folders_that_a_glob_matches_are_counted(data):
    (data / "sub").mkdir()
    assert names("data/*") == (["a.jsonl"], {"folders that a glob matches": 1})


def test_a_folder_that_cannot_be_listed_is_named(data, monkeypatch, one_line):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (data / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with one_line("locked: cannot be listed .Permission denied"):
        find_files([str(data)])


def test_fingerprints_see_content_not_time(data):
    large = data / "large.txt"
    content = bytearray(os.urandom(3 * 2**20))
    large.write_bytes(content)
    whole, samples = fingerprint(str(large)), fingerprint(str(large), samples=True)
    os.utime(large, (1, 1))
    assert (fingerprint(str(large)), fingerprint(str(large), samples=True)) == (whole, samples)
    content[-1] ^= 1
    large.write_bytes(content)
    assert changed([whole], [fingerprint(str(large))]).startswith('files = "large.txt (3145728 bytes, ')
    assert changed([samples], [fingerprint(str(large), samples=True)])
    assert changed([whole], [whole, whole]).endswith("not null")
