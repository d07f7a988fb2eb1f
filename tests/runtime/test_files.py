"""Files that are complete or absent."""

import errno
import os

import pytest

from rdlm.config import InputError
from rdlm.runtime import write_atomically, write_output


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


def test_an_output_makes_its_folder_and_is_named_when_it_cannot_be_written(tmp_path):
    path = write_output(tmp_path / "a/b/file", "text")
    assert path.read_text() == "text"
    with pytest.raises(InputError, match=r"a/b/file/below: cannot be written \("):
        write_output(path / "below", "text")
