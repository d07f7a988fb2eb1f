"""Datasets of the TFDS catalogue, prepared offline and without TensorFlow; and how they refuse."""

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from rdlm.data import Reading, Recipe
from rdlm.data.prepare import Corpus, build, read_documents
from rdlm.data.prepare import tfds as catalogue
from rdlm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_only()
STORIES = [[f"Story {i}.", f"It is about é {i * i}.", "Something happens.", "It ends."] for i in range(60)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    """The files that story_cloze/2016 wants to be put there by hand, with invented stories."""
    folder = tmp_path_factory.mktemp("manual")
    columns = ["InputStoryid", *(f"InputSentence{i}" for i in range(1, 5)), "RandomFifthSentenceQuiz1",
               "RandomFifthSentenceQuiz2", "AnswerRightEnding"]  # fmt: skip
    for name in ("val", "test"):
        with (folder / f"cloze_test_{name}__spring2016.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([f"{name}{i}", *story, "Well.", "Badly.", 1] for i, story in enumerate(STORIES))
    return folder


@pytest.fixture(scope="module")
def stories(manual, tmp_path_factory):
    """(data_dir, the builder) of story_cloze/2016."""
    folder = tmp_path_factory.mktemp("tfds")
    return folder, catalogue.dataset("story_cloze/2016", folder, manual)


def test_a_dataset_of_the_catalogue_is_made_from_files_put_there_by_hand(stories, tmp_path):
    _, builder = stories
    cut = catalogue.dataset_parts(builder, "test", "context", 2000)
    assert len(cut) > 1  # control: it is cut
    found = [text for part in cut for text in read_documents(part, Reading(field="context"))]
    assert sorted(found) == sorted(" ".join(story) for story in STORIES)
    recipe = Recipe(32, validation_fraction=0.2, reading=Reading(field="context"))
    corpus = Corpus("story_cloze", "1.0.0", cut)
    manifest = build(tmp_path / "out", corpus, recipe, BYTES, processes=1, say=print)
    assert manifest.train.documents + manifest.validation.documents == 60
    assert manifest.train.bytes + manifest.validation.bytes == sum(len(text.encode()) for text in found)


def test_once_made_it_is_used_as_it_is(stories, monkeypatch):
    folder, builder = stories
    monkeypatch.setattr(tfds, "builder", None)  # would fail if called
    assert catalogue.dataset("story_cloze/2016", folder).info.full_name == builder.info.full_name


def test_the_command_prepares_it_without_tensorflow(manual, tmp_path):
    program = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    program += "finally: print('tensorflow' in sys.modules)"
    command = [
        str(ROOT / "experiments" / "prepare_data.py"),
        *("--tfds", "story_cloze/2016", "--tfds-split", "validation", "--manual-dir", str(manual)),
        *("--tfds-dir", str(tmp_path / "tfds"), "--field", "context", "--tokenizer", "bytes"),
        *("--sequence-length", "32", "--validation-fraction", "0.2", "--processes", "1"),
        *("--out", str(tmp_path / "out")),
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "out" / "manifest.json").exists()


# How they refuse


def test_an_unknown_name_is_refused_without_asking_the_network(tmp_path, one_line, monkeypatch):
    monkeypatch.setattr(tfds, "builder", None)  # would ask for half a minute
    with one_line("tfds = 'story_clozee': TFDS knows no such dataset. Did you mean 'story_cloze'"):
        catalogue.dataset("story_clozee", tmp_path)


def test_missing_files_are_refused(tmp_path, one_line):
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "other.txt").write_text("x")
    with one_line("tfds = 'story_cloze/2016': cannot be prepared .*manual_dir"):
        catalogue.dataset("story_cloze/2016", tmp_path / "tfds", tmp_path / "manual")
    assert not list(tmp_path.rglob("*.array_record*"))


def test_a_file_with_another_checksum_is_refused(tmp_path, one_line):
    # Where a dataset downloads a file, one of that name in manual_dir is taken instead, and checked.
    (tmp_path / "MathQA.zip").write_bytes(b"not the archive")
    with one_line("tfds = 'math_qa': a file differs from its recorded checksum"):
        catalogue.dataset("math_qa", tmp_path / "tfds", tmp_path)


@pytest.mark.parametrize(
    ("split", "field", "message"),
    [
        ("tset", "context", "tfds_split = 'tset': .*Did you mean 'test'"),
        ("test", "text", "field = 'text': .* pass --field with one of: 'context', 'endings', 'label'"),
    ],
)
def test_a_wrong_split_or_field_is_refused(stories, split, field, message, one_line):
    with one_line(message):
        catalogue.dataset_parts(stories[1], split, field, 10**6)


def test_a_field_that_is_no_text_is_refused(stories, one_line):
    [part] = catalogue.dataset_parts(stories[1], "test", "label", 10**9)
    with one_line("example 0: field 'label' is .*neither text nor"):
        list(read_documents(part, Reading(field="label")))
    skipped = Counter()
    assert not list(read_documents(part, Reading(field="label", bad_documents="skip"), skipped=skipped))
    assert skipped["bad"] == part.end


def test_damaged_files_are_reported(manual, tmp_path, one_line):
    builder = catalogue.dataset("story_cloze/2016", tmp_path, manual)
    [part] = catalogue.dataset_parts(builder, "test", "context", 10**9)
    file = next(Path(part.paths[0]).glob("*test.array_record*"))
    file.write_bytes(file.read_bytes()[:500])
    with one_line("cannot be read .*prepare it again in another --tfds-dir"):
        list(read_documents(part, Reading(field="context")))
