"""What each script asks of gcloud, to the word; what it says when gcloud refuses; what arrives on a worker."""

import ast
import os
import subprocess

import pytest
from fake_place import ROOT, SCRIPTS, SETTINGS, executable

ZONE = ["--project=my-project", "--zone=us-west4-a"]
UNAUTHORIZED = "ERROR: PERMISSION_DENIED: Location us-west4-z is not found or access is unauthorized."
DENIED = "ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on 'projects/my-project'"
DISABLED = "ERROR: PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before. SERVICE_DISABLED"
LOGGED_OUT = "ERROR: You do not currently have an active account selected. Please run: $ gcloud auth login"
QUOTA = "ERROR: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded. Limit: 0 in zone us-west4-a."
STOCK_OUT = 'ERROR: There is no more capacity in the zone "us-west4-a"; you can try in another zone (see ...)'
EXISTS = "ERROR: ALREADY_EXISTS: Resource 'projects/p/locations/us-west4-a/queuedResources/rdlm' already exists"


def made(place, action):
    return [call for call in place.calls if call[3] == action]


def test_creation_to_the_word(place):
    code, _, err = place.run("create.sh")
    assert code == 0
    assert "READY" in err
    assert "billed" in err
    expected = [
        "compute", "tpus", "queued-resources", "create", "rdlm", "--node-id=rdlm", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--valid-until-duration=24h", "--spot", *ZONE,
    ]  # fmt: skip
    assert made(place, "create") == [expected]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"CAPACITY": "reserved"}, ["--reserved"]),
        ({"CAPACITY": "on-demand"}, []),
        ({"ACCELERATOR_TYPE": "v6e-8"}, ["--runtime-version=v2-alpha-tpuv6e", "--spot"]),
        ({"ACCELERATOR_TYPE": "v4-8", "RUNTIME_VERSION": "other"}, ["--runtime-version=other", "--spot"]),
        ({"REQUEST": "direct"}, ["--version=v2-alpha-tpuv5-lite", "--spot"]),
    ],
)
def test_creation_follows_the_settings(settings, words, place):
    place.settings(**SETTINGS | settings)
    assert place.run("create.sh")[0] == 0
    [call] = made(place, "create")
    assert set(words) <= set(call)
    assert {"--spot", "--reserved"} & set(call) <= set(words)
    assert call[2] == ("tpu-vm" if "REQUEST" in settings else "queued-resources")


def test_creation_waits_for_capacity(place):
    place.cloud(replies={"queued-resources create": [[0, "", ""]]}, queue="")
    place.cloud(events=[{"queue": "WAITING_FOR_RESOURCES"}, {}, {"queue": "PROVISIONING"}, {"queue": "ACTIVE"},
                        {"node": "CREATING"}, {"node": "READY"}])  # fmt: skip
    code, _, err = place.run("create.sh")
    assert code == 0
    assert place.sleeps == [30] * 6
    assert [line for line in err.splitlines() if "WAITING_FOR_RESOURCES" in line] == [
        "rdlm: request WAITING_FOR_RESOURCES, node none"  # said once, not at every look
    ]


def test_a_stock_out_is_asked_again(place):
    place.settings(**SETTINGS | {"REQUEST": "direct"})
    place.cloud(replies={"tpu-vm create": [[1, "", STOCK_OUT], [1, "", STOCK_OUT]]})
    assert place.run("create.sh")[0] == 0
    assert len(made(place, "create")) == 3
    assert place.sleeps == [60, 60]


def test_waiting_has_an_end_and_says_what_is_left(place):
    place.cloud(queue="WAITING_FOR_RESOURCES", events=[{}, {"clock": 2_000_000}])
    code, _, err = place.run("create.sh")
    assert code == 1
    assert "error: rdlm: no TPU in time (WAIT_HOURS = 24)" in err
    assert "left behind in us-west4-a" in err
    assert "request WAITING_FOR_RESOURCES, node none" in err
    assert made(place, "create") == []


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING"])
def test_a_request_that_failed_is_one_line_and_what_is_left_another(state, place):
    place.cloud(queue="ACCEPTED", events=[{"queue": state}])
    code, _, err = place.run("create.sh")
    assert code == 1
    error, left = err.splitlines()[-2:]
    assert error.startswith(f"error: TPU_NAME = rdlm: the request is {state} (for a reason)")
    assert "tpu_setup/delete.sh" in error
    assert left.startswith("left behind in us-west4-a")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (UNAUTHORIZED, ["ZONE = us-west4-a", "my-project", "locations list"]),
        (DENIED, ["PROJECT = my-project", "no permission", "roles/tpu.admin"]),
        (DISABLED, ["API is off", "gcloud services enable tpu.googleapis.com"]),
        (LOGGED_OUT, ["not logged in", "gcloud auth login"]),
        (QUOTA, ["ACCELERATOR_TYPE = v5litepod-16", "quota", "us-west4-a"]),
        (EXISTS, ["TPU_NAME = rdlm", "already exists", "delete.sh"]),
        ("ERROR: something new", ["cannot create rdlm", "something new"]),
    ],
)
def test_a_refused_creation_is_one_line_and_nothing_is_left(said, words, place, refused):
    place.cloud(replies={"queued-resources create": [[1, "", said]]})
    refused(words, "create.sh")


def test_a_creation_that_failed_half_way_is_mentioned(place, refused):
    place.cloud(replies={"queued-resources create": [[1, "", "ERROR: connection reset"]]})
    place.cloud(replies=place.cloud()["replies"] | {
        "tpu-vm describe": [[1, "", "NOT_FOUND"], [0, "CREATING", ""]],
    })  # fmt: skip
    _, err = refused(["connection reset"], "create.sh", lines=2)
    assert "left behind in us-west4-a" in err
    assert "node CREATING" in err


def start_errors():
    """The text of every StartError of the library, with a word for each value."""
    for path in sorted((ROOT / "rdlm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "message":
                yield node.value
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "StartError" and node.args:
                yield node.args[0]


STATES = [
    *("".join(getattr(part, "value", None) if isinstance(part, ast.Constant) else "running" for part in text.values)
      for text in start_errors() if isinstance(text, ast.JoinedStr)),
    "something went wrong in the driver", "an alarm was lost", "running", "done", "none", "[0] x-1 running",
]  # fmt: skip


@pytest.mark.parametrize("line", STATES)
def test_a_run_that_failed_has_failed_whatever_the_last_line_of_its_log_says(line):
    script = '. "$1"; on_all() { printf "%s\\n" "[0] x-1 done" "$SAID"; }; run_state none'
    said = f"[1] x-1 failed (exit code 1): error: {line}"
    done = subprocess.run(
        ["bash", "-c", script, "-", SCRIPTS / "lib.sh"], env=os.environ | {"SAID": said}, capture_output=True, text=True
    )
    assert done.stdout == "failed\n", done.stderr


@pytest.mark.parametrize(
    ("state", "code"),
    [("preempted (saved, exit code 75)", 0), ("done", 0), ("lost (restarted?)", 1), ("failed (exit code 1): done", 1)],
)
def test_stop_looks_at_the_state_and_not_at_the_name(state, code, place):
    place.cloud(queue="ACTIVE", node="READY", workers=1, replies={"stop": [[0, f"lost_and_wrong-12 {state}", ""]]})
    assert place.run("stop.sh")[0] == code


@pytest.mark.parametrize("script", ["create.sh", "delete.sh", "status.sh", "setup.sh"])
def test_no_permission_to_look_is_one_line(script, place, refused):
    looks = [[1, "", DENIED]] * 4
    place.cloud(replies={"queued-resources describe": looks, "tpu-vm describe": looks})
    refused(["PROJECT = my-project", "no permission"], script)


def test_an_existing_name_is_refused(place, refused):
    place.cloud(queue="ACTIVE", node="READY")
    refused(["TPU_NAME = rdlm", "already exists", "setup.sh", "delete.sh"], "create.sh")
    assert made(place, "create") == []


def test_nothing_to_delete_is_one_line(place):
    code, out, err = place.run("delete.sh")
    assert (code, out) == (0, "")
    assert err == "nothing to delete: there is no 'rdlm' in us-west4-a\n"
    assert made(place, "delete") == []


@pytest.mark.parametrize("request_kind", ["queued", "direct"])
def test_deletion_to_the_word(request_kind, place):
    place.cloud(queue="ACTIVE" if request_kind == "queued" else "", node="READY")
    code, _, err = place.run("delete.sh")
    assert code == 0
    assert "there is no 'rdlm' in us-west4-a any more; gs://my-bucket is kept" in err
    queued = ["compute", "tpus", "queued-resources", "delete", "rdlm", "--force", "--quiet", *ZONE]
    direct = ["compute", "tpus", "tpu-vm", "delete", "rdlm", "--quiet", *ZONE]
    assert made(place, "delete") == [queued if request_kind == "queued" else direct]


def test_an_active_run_is_not_deleted_by_accident(place, refused):
    place.cloud(queue="ACTIVE", node="READY", run="running")
    refused(["TPU_NAME = rdlm", "a run is active", "stop.sh", "--force"], "delete.sh")
    refused(["--forse"], "delete.sh", "--forse")
    place.cloud(replies={"status": [[255, "", "ssh: connection timed out"]] * 6})
    code, _, err = place.run("delete.sh")
    assert code == 2
    assert "cannot check its workers" in err.splitlines()[-1]
    assert made(place, "delete") == []
    assert place.run("delete.sh", "--force")[0] == 0
    assert len(made(place, "delete")) == 1


def test_a_deletion_that_leaves_something_says_so(place):
    place.cloud(queue="ACTIVE", node="READY", replies={"queued-resources delete": [[0, "", ""]]})
    place.cloud(replies=place.cloud()["replies"] | {"tpu-vm delete": [[0, "", ""]]})
    code, _, err = place.run("delete.sh")
    assert code == 1
    assert "error: TPU_NAME = rdlm: is still there" in err
    assert "left behind in us-west4-a" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({name: None}, [f"{name} is not set"]) for name in SETTINGS if name != "BUCKET"),
        ({"ZONE": "us-west4"}, ["ZONE = 'us-west4'", "us-central1-a"]),
        ({"TPU_NAME": "My_TPU"}, ["TPU_NAME = 'My_TPU'", "small letters"]),
        ({"ACCELERATOR_TYPE": "v5e-16"}, ["ACCELERATOR_TYPE = 'v5e-16'", "v5litepod-16"]),
        ({"CAPACITY": "cheap"}, ["CAPACITY = 'cheap'", "spot"]),
        ({"MAX_HOURS": "1.5"}, ["MAX_HOURS = '1.5'", "whole number"]),
        ({"BUCKET": "my-bucket"}, ["BUCKET = 'my-bucket'", "gs://NAME"]),
        ({"ZONES": "us-west4-a"}, ["line 6", "unknown setting ZONES", "ZONE"]),
        ({"PROJECT": "a b"}, ["line 1", "NAME=value"]),
        ({"PROJECT": "$(touch_me)"}, ["PROJECT = '$(touch_me)'"]),
    ],
)
def test_wrong_settings_are_one_line_before_anything_is_called(settings, words, place, refused):
    place.settings(**{k: v for k, v in (SETTINGS | settings).items() if v is not None})
    refused([*words, "config.env"], "create.sh")
    assert place.calls == []


def test_settings_can_be_quoted_and_commented_and_are_shown(place):
    (place.folder / "config.env").write_text(
        "# mine\n\nPROJECT=\"my-project\" # the one\nZONE='us-west4-a'\nTPU_NAME=rdlm\nACCELERATOR_TYPE=v6e-8"
    )
    process = place.start("status.sh")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "PROJECT=my-project ZONE=us-west4-a TPU_NAME=rdlm ACCELERATOR_TYPE=v6e-8" in err.splitlines()[0]
    assert "RUNTIME_VERSION=v2-alpha-tpuv6e" in err.splitlines()[0]
    assert "nothing is billed" in err


def test_without_settings_or_gcloud(place, refused):
    (place.folder / "fakes/gcloud").unlink()
    refused(["gcloud is not installed"], "status.sh")
    (place.folder / "config.env").unlink()
    refused(["no such file", "config.env.example"], "status.sh")


@pytest.mark.parametrize("script", ["setup.sh", "run.sh", "logs.sh", "ssh.sh", "stop.sh", "mount.sh", "profile.sh"])
def test_without_a_tpu_there_is_one_line(script, place, refused):
    arguments = ["experiments/train.py"] if script == "run.sh" else []
    refused(["TPU_NAME = rdlm", "missing in us-west4-a", "create.sh"], script, *arguments)
    place.cloud(node="CREATING")
    refused(["TPU_NAME = rdlm", "CREATING"], script, *arguments)


def test_wrong_arguments_are_one_line(place, refused):
    place.cloud(queue="ACTIVE", node="READY")
    refused(["which script"], "run.sh")
    refused(["experiments/trian.py", "experiments/train.py"], "run.sh", "experiments/trian.py")
    refused(["worker 'x'"], "ssh.sh", "x")
    refused(["--follow"], "logs.sh", "--follow")
    refused(["soon"], "stop.sh", "soon")
    place.settings(**SETTINGS | {"BUCKET": "''"})
    refused(["BUCKET is not set"], "supervise.sh", "experiments/train.py")
    refused(["BUCKET is not set"], "bucket.sh")


WORDS = [
    "two  words",
    "it's",
    'say "so"',
    "$HOME `date` $(date)",
    "a;b",
    ";",
    "*",
    "\\",
    "new\nline",
    "",
    "é",
    "--x=a b",
    "!",
]


def test_words_arrive_on_the_worker_as_they_are(place):
    home = place.folder / "worker"
    home.mkdir()
    executable(home / "show", '#!/usr/bin/env bash\nprintf "%s\\0" "$@" > shown\n')
    path = {"PATH": str(place.tools)}
    place.cloud(queue="ACTIVE", node="READY", workers=1, homes=[str(home)], environment=[path])
    assert place.run("ssh.sh", "0", "./show", *WORDS)[0] == 0
    assert (home / "shown").read_bytes().decode().split("\0")[:-1] == WORDS


def test_ssh_that_fails_is_tried_again_then_named(place):
    place.cloud(queue="ACTIVE", node="READY", workers=2, replies={"ls": [[255, "", "ssh: timed out"]] * 2})
    assert place.run("ssh.sh", "0", "ls")[0] == 0
    assert place.sleeps == [5, 10]
    place.cloud(replies={"ls": [[255, "", "ssh: timed out"]] * 6})
    code, _, err = place.run("ssh.sh", "all", "ls")
    assert code == 255
    assert err.splitlines() == [
        f"error: worker {n} of rdlm cannot be reached by ssh; tpu_setup/status.sh says whether it is still there"
        for n in (0, 1)
    ]


def test_a_command_that_fails_on_a_worker_fails_here(place):
    place.cloud(
        queue="ACTIVE", node="READY", workers=2, replies={"start": [[2, "", "noise\nerror: w: no"], [0, "", ""]]}
    )
    code, _, err = place.run("run.sh", "experiments/train.py", "nano")
    assert code == 1
    assert "] error: w: no" in err
    assert "did not start on every worker" in err


def test_the_bucket_is_made_once(place):
    code, _, err = place.run("bucket.sh")
    assert code == 0
    assert "gs://my-bucket: created in us-west4" in err
    assert place.calls[-1] == [
        "storage", "buckets", "create", "gs://my-bucket", "--location=us-west4", "--uniform-bucket-level-access",
        "--enable-hierarchical-namespace", "--public-access-prevention", "--project=my-project",
    ]  # fmt: skip
    place.cloud(replies={"buckets describe": [[0, "US-WEST4", ""]]})
    code, _, err = place.run("bucket.sh")
    assert "exists, in US-WEST4" in err
    assert place.calls[-1][2] == "describe"


def test_a_bucket_of_someone_else_is_one_line(place, refused):
    place.cloud(replies={"buckets describe": [[1, "", "ERROR: me@x does not have storage.buckets.get access. 403"]]})
    refused(["BUCKET = gs://my-bucket", "403", "another name"], "bucket.sh")
    place.cloud(replies={"buckets create": [[1, "", "ERROR: HTTPError 409: name is not available"]]})
    refused(["BUCKET = gs://my-bucket", "409"], "bucket.sh")
