"""Stands in for gcloud: writes down every call, plays a small cloud, and runs `ssh` commands in local folders.

$FAKE_CLOUD/cloud.json is the cloud: `queue` and `node` (states, "" for none), `run` (what the workers do), `workers`
(how many), `homes` (a folder per worker in which ssh commands are really run; null: nothing is run), `environment` (of
those commands, per worker), `replies` (per verb, a list of [exit code, stdout, stderr] that are played back first),
`events` (changes of all this, one with every call of the fake `sleep`), `clock` (seconds).
"""

import fcntl
import json
import os
import sys

CLOUD = os.environ["FAKE_CLOUD"]
NOT_FOUND = "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'projects/p/locations/z/x' was not found"


def remote_verb(command):
    """What a command does on a worker: status, start, install, ..."""
    if command.startswith("bash"):
        return {"worker.sh": "status", "tar": "unpack", "rdlm.runtime": "check"}[
            next(mark for mark in ("worker.sh", "tar", "rdlm.runtime") if mark in command)
        ]
    words = command.split(" ")
    name = os.path.basename(words[0])
    return words[1] if name == "worker.sh" else name.removesuffix(".sh")


def parse(argv):
    """(verb, positional words, flags) of a call."""
    flags = dict((word + "=").split("=", 1) for word in argv if word.startswith("--"))
    words = [word for word in argv if not word.startswith("--")]
    flags = {name: value[:-1] for name, value in flags.items()}
    if words[:2] == ["compute", "tpus"]:
        kind, action, *rest = words[2:]
        verb = remote_verb(flags["--command"]) if "--command" in flags else f"{kind} {action}"
        if "networkEndpoints" in flags.get("--format", ""):
            verb = "workers"
        return verb, rest, flags
    return " ".join(words[1:3]), words[3:], flags


def answer(cloud, verb, words, flags):
    """(exit code, stdout, stderr) by default; changes the cloud."""
    if verb in ("tpu-vm create", "queued-resources create"):
        if verb.startswith("queued"):
            cloud["queue"] = "ACTIVE"
        cloud.update(node="READY", run="none")
    elif verb in ("tpu-vm delete", "queued-resources delete"):
        if verb.startswith("queued"):
            cloud["queue"] = ""
        cloud.update(node="", run="none")
    elif verb == "workers":
        return 0, ";".join(f"10.0.0.{i + 1}" for i in range(cloud["workers"])), ""
    elif verb in ("tpu-vm describe", "queued-resources describe"):
        state = cloud["node" if verb.startswith("tpu") else "queue"]
        if "failedData" in flags["--format"]:
            state = "for a reason"
        return (0, state, "") if state else (1, "", NOT_FOUND)
    elif verb == "buckets describe":
        return 1, "", "ERROR: (gcloud.storage.buckets.describe) gs://b not found: 404."
    elif verb == "status":
        return 0, "none" if cloud["run"] == "none" else f"x-1 {cloud['run']}", ""
    elif verb == "start":
        cloud["run"] = "running"
    elif verb == "stop":
        cloud["run"] = "preempted"
        return 0, "x-1 preempted (saved, exit code 75)", ""
    return 0, "", ""


def really(cloud, words, flags):
    """Run an ssh or scp in the folders of the workers."""
    import shutil  # every call pays for what it imports
    import subprocess

    wanted = flags.get("--worker", "0")
    workers = range(cloud["workers"]) if wanted == "all" else [int(wanted)]
    code = 0
    for i in workers:
        home = cloud["homes"][i]
        if "--command" in flags:  # what sshd does: the user's shell, one string, in the home folder
            environment = cloud["environment"][i] | {"HOME": home}
            code = subprocess.run(["bash", "-c", flags["--command"]], cwd=home, env=environment).returncode or code
        else:
            source, target = words
            if ":" in target:
                shutil.copy(source, os.path.join(home, target.split(":", 1)[1]))
            else:
                shutil.copytree(os.path.join(home, source.split(":", 1)[1]), target, dirs_exist_ok=True)
    return code


def main():
    argv = sys.argv[1:]
    with open(f"{CLOUD}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f"{CLOUD}/calls.jsonl", "a") as calls:
            calls.write(json.dumps(argv) + "\n")
        with open(f"{CLOUD}/cloud.json") as file:
            cloud = json.load(file)
        verb, words, flags = parse(argv)
        played = cloud["replies"].get(verb)
        run = not played and cloud["homes"] and (verb == "tpu-vm scp" or "--command" in flags)
        if played:
            code, out, err = played.pop(0)
        elif not run:
            code, out, err = answer(cloud, verb, words, flags)
        with open(f"{CLOUD}/cloud.json.new", "w") as file:
            json.dump(cloud, file)
        os.replace(f"{CLOUD}/cloud.json.new", f"{CLOUD}/cloud.json")  # others read it without the lock
    if run:
        sys.exit(really(cloud, words, flags))
    print(out, end="\n" if out else "")
    print(err, end="\n" if err else "", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
