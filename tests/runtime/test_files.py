"""Files that are complete or absent."""

import errno
import os

import pytest

from rdlm.config import InputError
from rdlm.runtime import complete_folder, write_atomically, write_output
from rdlm.runtime.files import scratch_folder


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old é")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old é"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("alike", [True, False])
def test_of_two_that_build_a_folder_the_second_leaves_the_firsts(alike, tmp_path):
    final = tmp_path / "folder"

    def second():
        with complete_folder(final, alike=alike) as slow:
            (slow / "file").write_text("second")
            with complete_folder(final, alike=alike) as quick:
                (quick / "file").write_text("first")

    if alike:
        second()
    else:
        with pytest.raises(InputError, match=r"folder: another process made it meanwhile; choose another folder$"):
            second()
    assert (final / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [final]


def test_an_output_makes_its_folder_and_is_named_when_it_cannot_be_written(tmp_path):
    path = write_output(tmp_path / "a/b/file", "text")
    assert path.read_text() == "text"
    with pytest.raises(InputError, match=r"a/b/file/below: cannot be written \("):
        write_output(path / "below", "text")


def test_what_a_killed_process_left_is_removed_when_the_same_is_written_again(tmp_path):
    with scratch_folder(tmp_path, "model") as mine:
        prefix = mine.name[:-12]
    left, other, elsewhere, theirs = (
        tmp_path / name
        for name in (f"{prefix}0123456789ab", f"{prefix.replace('model', 'model2')}0123456789ab",
                     ".model.partial-ffffffff-0123456789ab", f"{prefix}notes")
    )  # fmt: skip
    for folder in (left, other, elsewhere, theirs):
        folder.mkdir()
        (folder / "file").write_text("half")
    with scratch_folder(tmp_path, "model") as living:  # whose lock is held
        (living / "file").write_text("being written")
        assert not left.exists()
        with complete_folder(tmp_path / "model") as partial:
            (partial / "file").write_text("complete")
        assert (living / "file").exists()
    assert (tmp_path / "model" / "file").read_text() == "complete"
    assert {path.name for path in tmp_path.iterdir()} == {"model", other.name, elsewhere.name, theirs.name}


def test_a_link_in_the_place_of_something_left_is_not_followed(tmp_path):
    with scratch_folder(tmp_path, "model") as mine:
        name = mine.name[:-12] + "0123456789ab"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (tmp_path / name).symlink_to(tmp_path / "precious")
    with scratch_folder(tmp_path, "model"):
        pass
    assert (tmp_path / "precious" / "file").exists()
