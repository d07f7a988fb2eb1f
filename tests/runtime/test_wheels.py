"""Pinned wheels, downloaded by pip: from a folder in place of the package index."""

import importlib.util
import zipfile

import package_index
import pytest

from rdlm.config import InputError
from rdlm.runtime import download_wheel
from rdlm.runtime.wheels import _reason


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A wheel toy 1.0 in the only folder that pip looks into."""
    (tmp_path / "there").mkdir()
    return package_index.only_wheel(tmp_path / "index", monkeypatch, {"toy/data.txt": b"seven"})


def test_the_wheel_alone_arrives(index, tmp_path):
    path = download_wheel(index, tmp_path / "there", "or not")
    assert [p.name for p in (tmp_path / "there").iterdir()] == [path.name]
    assert zipfile.ZipFile(path).read("toy/data.txt") == b"seven"


def test_another_file_and_another_version_are_refused(index, tmp_path):
    for wheel, reason in (
        (index._replace(sha256="0" * 64), "sha256 differs"),
        (index._replace(package="toy==2.0"), "No matching distribution found for toy==2.0"),
    ):
        with pytest.raises(InputError, match=rf"{wheel.package}: cannot be downloaded \(.*{reason}.*\); or not"):
            download_wheel(wheel, tmp_path / "there", "or not")
        assert not list((tmp_path / "there").glob("*.whl"))


def test_without_pip(index, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"toy==1\.0: pip is not installed, which fetches it; or not"):
        download_wheel(index, tmp_path / "there", "or not")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError(...)'\n"
            "ERROR: Could not find a version that satisfies the requirement toy==1.0\n"
            "ERROR: No matching distribution found for toy==1.0\n",
            "no connection to the package index",
        ),
        (
            "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n",
            "OSError: [Errno 28] No space left on device",
        ),
        ("ERROR: 403 Client Error: Forbidden\n", "403 Client Error: Forbidden"),
        ("", "pip gave no reason"),
    ],
)
def test_the_reason_in_what_pip_says(said, reason):
    assert _reason(said) == reason
