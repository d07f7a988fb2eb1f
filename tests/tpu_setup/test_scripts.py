"""The scripts as text: shellcheck, no eval, flags that gcloud knows, a README whose commands run."""

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_place import ROOT, SCRIPTS, SETTINGS, Place, copy_of_repository, real_gcloud, tool_or_skip

ALL = sorted(SCRIPTS.glob("*.sh"))
# Every script with arguments, under settings that make it say each of its commands.
CALLS = [
    ("bucket.sh",), ("create.sh",), ("setup.sh",), ("mount.sh",), ("run.sh", "experiments/train.py", "nano"),
    ("stop.sh",),
    ("status.sh",), ("logs.sh",), ("logs.sh", "-f"), ("ssh.sh",), ("ssh.sh", "all", "ls"), ("profile.sh",),
    ("supervise.sh", "experiments/train.py", "nano"), ("delete.sh",), ("delete.sh", "--force"),
]  # fmt: skip
VARIANTS = [{}, {"REQUEST": "direct", "CAPACITY": "reserved"}, {"REQUEST": "direct", "CAPACITY": "on-demand"}]


def test_shellcheck_finds_nothing():
    shellcheck = tool_or_skip("shellcheck")
    command = [shellcheck, "-x", "-P", "SCRIPTDIR", *map(str, ALL)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS)
    assert done.returncode == 0, done.stdout
    assert len(ALL) >= 16


def test_shellcheck_would_find_a_missing_quote(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm $1\n")
    assert subprocess.run([tool_or_skip("shellcheck"), tmp_path / "bad.sh"], capture_output=True).returncode == 1


@pytest.mark.parametrize("script", ALL, ids=lambda path: path.name)
def test_every_script_parses_stops_at_errors_and_never_evaluates_text(script):
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    assert "set -euo pipefail" in text or '/lib.sh"\n' in text
    assert not re.search(r"\beval\b", text)
    assert (script.name == "lib.sh") != os.access(script, os.X_OK)


def dry_runs(place):
    """Every gcloud command that the scripts would run, as words."""
    commands = []
    for variant in VARIANTS:
        place.settings(**SETTINGS | variant)
        for script, *arguments in CALLS:
            code, out, err = place.run(script, *arguments, DRY_RUN="1")
            assert code == 0, (script, out, err)
            commands += [shlex.split(line) for line in out.splitlines() if line.startswith("gcloud ")]
    return commands


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("dry"))
    found = dry_runs(place)
    assert place.calls == [], "a dry run calls nothing"
    assert place.sleeps == []
    return found


def path_and_flags(words):
    path = [word for word in words[1:] if not word.startswith("--")]
    return tuple(path[: 4 if path[0] == "compute" else 3]), {w.partition("=")[0] for w in words if w.startswith("--")}


def test_a_dry_run_says_every_kind_of_call(commands):
    kinds = {path[2:] for path, _ in map(path_and_flags, commands)}
    source = "".join(script.read_text() for script in ALL)
    for kind, action in re.findall(r"(tpu-vm|queued-resources) (create|delete|ssh|scp|describe|list)\b", source):
        assert (kind, action) in kinds
    flags = set().union(*(flags for _, flags in map(path_and_flags, commands)))
    assert {"--spot", "--reserved", "--command", "--force"} <= flags


@pytest.mark.slow
def test_gcloud_knows_every_flag(commands, tmp_path):
    gcloud = real_gcloud()
    used = {}
    for path, flags in map(path_and_flags, commands):
        used.setdefault(path, set()).update(flags)

    def known(path):  # help needs neither a network nor an account, and gets none
        environment = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1"}
        environment["CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK"] = "1"
        done = subprocess.run([gcloud, *path, "--help"], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"--[a-z-]+", done.stdout.replace("--[no-]", "--")))

    with ThreadPoolExecutor(2) as pool:
        for (path, flags), found in zip(used.items(), pool.map(known, used), strict=True):
            assert flags <= found, (path, flags - found)
            assert "--no-such-flag" not in found
    assert len(used) >= 9


def blocks():
    return re.findall(r"```bash\n(.*?)```", (SCRIPTS / "README.md").read_text(), re.DOTALL)


def test_every_command_of_the_readme_runs_dry(tmp_path):
    place = Place(tmp_path, scripts=copy_of_repository(tmp_path / "copy") / "tpu_setup")
    del place.environment["CONFIG"]  # the README makes its own
    environment = place.environment | {"DRY_RUN": "1", "EDITOR": "true"}
    said = ""
    for block in blocks():
        done = subprocess.run(
            ["bash", "-euc", block], env=environment, cwd=tmp_path / "copy", capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (block, done.stderr)
        said += block + done.stdout
    assert len(blocks()) >= 9
    assert [call[0] for call in place.calls] == ["storage"], "only what the README itself says to gcloud"
    # Every script is shown, but for those that others call.
    for script in ALL:
        assert script.name in said or script.name == "lib.sh", script.name


def test_the_dockerfile_copies_what_exists():
    copies = re.findall(r"^COPY (.*) \S+$", (SCRIPTS / "Dockerfile").read_text(), re.MULTILINE)
    assert copies
    for name in " ".join(copies).split():
        assert (ROOT / name).exists(), name


def test_the_example_lists_every_setting():
    example = set(re.findall(r"^([A-Z_]+)=", (SCRIPTS / "config.env.example").read_text(), re.MULTILINE))
    names = re.search(r"NAMES='(.*?)'", (SCRIPTS / "lib.sh").read_text(), re.DOTALL)[1]
    assert example == set(names.split())
