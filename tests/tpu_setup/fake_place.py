"""A place to run tpu_setup's scripts in: a fake gcloud, a fake clock, and no other program than those they need."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_setup"
# All that the scripts may find, here and on a worker. A real gcloud is not among it: it cannot be called.
TOOLS = [
    "awk", "basename", "bash", "cat", "chmod", "cksum", "cp", "cut", "date", "dirname", "env", "find", "git",
    "grep", "gzip", "head", "hostname", "ln", "ls", "mkdir", "mktemp", "mv", "rm", "readlink", "rmdir", "sed",
    "sleep", "sort", "tail", "tar", "tee", "tr", "true", "uname", "touch",
]  # fmt: skip
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "TPU_NAME": "rdlm",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "BUCKET": "gs://my-bucket",
}
SLEEP = """#!{python}
# Time passes only here: the clock moves on, and the next event of the cloud happens.
import fcntl, json, os, sys, time
cloud = os.environ["FAKE_CLOUD"]
with open(cloud + "/lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(cloud + "/sleeps", "a") as log:
        log.write(sys.argv[1] + "\\n")
    state = json.load(open(cloud + "/cloud.json"))
    state["clock"] += int(sys.argv[1])
    if state["events"]:
        state.update(state["events"].pop(0))
    with open(cloud + "/cloud.json.new", "w") as file:
        json.dump(state, file)
    os.replace(cloud + "/cloud.json.new", cloud + "/cloud.json")
time.sleep(state["real_sleep"])
"""
DATE = """#!{python}
import json, os, sys
if sys.argv[1:] == ["+%s"]:
    print(json.load(open(os.environ["FAKE_CLOUD"] + "/cloud.json"))["clock"])
else:
    os.execv({real!r}, ["date", *sys.argv[1:]])
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def link_tools(folder, names=TOOLS):
    folder.mkdir(parents=True)
    for name in names:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


class Place:
    """Scripts, settings and a cloud of its own."""

    def __init__(self, folder, scripts=SCRIPTS):
        self.folder, self.scripts = folder, scripts
        self.tools = link_tools(folder / "tools")
        fakes = folder / "fakes"
        fake = Path(__file__).with_name("fake_gcloud.py").read_text()
        executable(fakes / "gcloud", f"#!{sys.executable} -IS\n{fake}")
        executable(fakes / "python3", f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
        executable(fakes / "sleep", SLEEP.format(python=f"{sys.executable} -IS"))
        executable(fakes / "date", DATE.format(python=f"{sys.executable} -IS", real=shutil.which("date")))
        self.settings(**SETTINGS)
        self.cloud_folder = folder / "cloud"
        self.cloud_folder.mkdir()
        self.cloud(queue="", node="", run="none", workers=2, homes=None, environment=[], replies={}, events=[])
        self.cloud(clock=1_000_000, real_sleep=0)
        self.environment = {
            "PATH": f"{fakes}:{self.tools}",
            "HOME": str(folder),
            "CONFIG": str(folder / "config.env"),
            "FAKE_CLOUD": str(self.cloud_folder),
            "TMPDIR": str(folder),
            "CLOUDSDK_CONFIG": str(folder / "no-credentials"),
        }

    def settings(self, **values):
        (self.folder / "config.env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))

    def cloud(self, **changes):
        """The state of the cloud, after `changes`."""
        path = self.cloud_folder / "cloud.json"
        state = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.with_suffix(".mine").write_text(json.dumps(state))
        os.replace(path.with_suffix(".mine"), path)
        return state

    def start(self, script, *arguments, **environment):
        """The script as a process."""
        return subprocess.Popen(
            [str(self.scripts / script), *map(str, arguments)], env=self.environment | environment, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def run(self, script, *arguments, **environment):
        """(exit code, stdout, stderr without the line of settings)."""
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=300)
        first, _, rest = err.partition("\n")
        return process.returncode, out, rest if "config.env: PROJECT=" in first else err

    @property
    def calls(self):
        """Argument lists of all calls of gcloud."""
        path = self.cloud_folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def changes(self):
        """What was done to the cloud, without the looking: ["create", "delete", "start", ...]."""
        verbs = []
        for call in self.calls:
            command = next((w.partition("=")[2] for w in call if w.startswith("--command=")), None)
            if command is not None:
                found = next((v for v in ("install.sh", "mount", "start", "stop") if f" {v}" in command), "")
                found = "install" if "install.sh" in command else found
                verbs += [found] if found and "--worker=0" in call else []
            elif call[3] in ("create", "delete"):
                verbs.append(call[3])
        return verbs

    @property
    def sleeps(self):
        path = self.cloud_folder / "sleeps"
        return [int(float(x)) for x in path.read_text().split()] if path.exists() else []


def tool_or_skip(name):
    """Where a program is; skips the test without it."""
    found = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def real_gcloud():
    """The real gcloud, for its --help alone."""
    return tool_or_skip("gcloud")


def copy_of_repository(folder):
    """The files of the working copy as a repository of its own."""
    git = tool_or_skip("git")
    listed = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git repository")
    folder.mkdir()
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("rdlm/", "experiments/", "tpu_setup/")) or "/" not in name:
            source = ROOT / name
            if source.is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder / name)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "Copy"]):
        subprocess.run([git, *command], cwd=folder, check=True)
    return folder
