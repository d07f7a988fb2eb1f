"""The wheel, installed away from the repository, trains, loads and generates."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from compilation import QUICK

ROOT = Path(__file__).resolve().parents[1]

TRAINS_LOADS_GENERATES = """
import dataclasses, importlib, random, sys
import rdlm
from rdlm.config import preset

assert "site-packages" in rdlm.__file__, rdlm.__file__
words = ["".join(random.Random(i).choices("aeioubdglmnrst", k=5)) for i in range(99)]
texts = [f"{i} " + " ".join(random.Random(i).choices(words, k=60)) for i in range(200)]
importlib.import_module("rdlm.data.prepare.embedded")._documents = lambda data: texts
run = preset("nano")
data = dataclasses.replace(run.data, folder="data", validation_fraction=0.1)
run = dataclasses.replace(run, steps=3, run_dir="run", data=data)
assert rdlm.train.train(run) == 0
loaded = rdlm.load("run")
assert loaded.step == 3
print(repr(loaded.generate("a", max_new_tokens=4).text))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (found,) = out.glob("rdlm-*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rdlm"}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "rdlm").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert expected <= set(names)
    assert "rdlm/py.typed" in names


@pytest.mark.slow
def test_trains_loads_and_generates_from_the_wheel(wheel, tmp_path):
    """In a new environment that sees the installed dependencies, but not the repository."""
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = QUICK | {"JAX_PLATFORMS": "cpu", "RDLM_COMPILE_CACHE": "off"}
    command = [python, "-c", TRAINS_LOADS_GENERATES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(("'", '"'))
