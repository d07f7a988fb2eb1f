"""A package index for tests: one wheel in a folder, and pip looks nowhere else."""

import hashlib
import zipfile

from rdlm.runtime import Wheel


def only_wheel(folder, monkeypatch, files):
    """Write the wheel toy 1.0 with these files {name: bytes}, point pip at it, and return its pin."""
    folder.mkdir()
    path = folder / "toy-1.0-py3-none-any.whl"
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items() | {(f"toy-1.0.dist-info/{n}", text) for n, text in about.items()}:
            archive.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Wheel("toy==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
