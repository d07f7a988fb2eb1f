"""Files that are complete or absent."""

import errno
import os

import pytest

from rdlm.config import InputError
from rdlm.runtime import complete_folder, write_atomically, write_output


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
