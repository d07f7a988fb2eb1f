"""supervise.sh as a table: what happens in the cloud while it sleeps, and what it does about it."""

import dataclasses

import pytest
from fake_place import SETTINGS

UP = ["create", "install", "mount", "start"]
GONE = {"queue": "SUSPENDED", "node": "PREEMPTED", "run": "none"}
QUOTA = [1, "", "ERROR: Quota limit 'TPUV5s' has been exceeded. Limit: 0 in zone us-west4-a."]
STOCK_OUT = [1, "", 'ERROR: There is no more capacity in the zone "us-west4-a"']
LOST = [255, "", "ssh: connect to host 10.0.0.1 port 22: Connection timed out"]
MISSING = "process 1 of 2 did not come; is the same command running on every worker (tpu_setup/status.sh)?"
RESET = [1, "", "ERROR: connection reset by peer"]


@dataclasses.dataclass
class Scenario:
    """Events happen one by one, each with a sleep; `does` are the changes that supervise.sh makes, `says` its words."""

    name: str
    events: list
    does: list
    code: int = 0
    says: tuple = ()
    sleeps: list | None = None
    settings: dict = dataclasses.field(default_factory=dict)
    cloud: dict = dataclasses.field(default_factory=dict)
    billed: bool = False


TABLE = [
    Scenario("from nothing to done and back to nothing", [{"run": "done"}], [*UP, "delete"], sleeps=[60]),
    Scenario("keep it", [{"run": "done"}], UP, settings={"WHEN_DONE": "keep"}, billed=True),
    Scenario("already there", [{"run": "done"}], [*UP[1:], "delete"], cloud={"queue": "ACTIVE", "node": "READY"}),
    Scenario("already running", [{}, {"run": "done"}], ["delete"],
             cloud={"queue": "ACTIVE", "node": "READY", "run": "running"}),
    Scenario("waits for capacity", [{"queue": "WAITING_FOR_RESOURCES"}, {"queue": "ACTIVE"}, {"node": "READY"},
             {"run": "done"}], [*UP, "delete"], sleeps=[30, 30, 30, 60],
             cloud={"replies": {"queued-resources create": [[0, "", ""]]}}),
    Scenario("the request fails, the next one does not", [{"queue": "FAILED"}, {}, {"run": "done"}],
             ["create", "delete", *UP, "delete"], says=("the request is FAILED", "failure 1 of 3"), sleeps=[30, 60, 60],
             cloud={"replies": {"queued-resources create": [[0, "", ""]]}}),
    Scenario("out of stock, then not", [{}, {}, {"run": "done"}], ["create", "create", *UP, "delete"],
             settings={"REQUEST": "direct"}, sleeps=[60, 60, 60],
             cloud={"replies": {"tpu-vm create": [STOCK_OUT, STOCK_OUT]}}),
    Scenario("preempted", [GONE, {"run": "done"}], [*UP, "delete", *UP, "delete"], says=("SUSPENDED, node PREEMPTED",)),
    Scenario("preempted twice, once while it is set up", [GONE, GONE, {"run": "done"}],
             [*UP, "delete", *UP, "delete", *UP, "delete"]),
    Scenario("suspended, the node gone", [{"queue": "SUSPENDED", "node": "", "run": "none"}, {"run": "done"}],
             [*UP, "delete", *UP, "delete"]),
    Scenario("direct, preempted", [{"node": "PREEMPTED", "run": "none"}, {"run": "done"}],
             [*UP, "delete", *UP, "delete"], settings={"REQUEST": "direct"}),
    Scenario("exit 75 resumes at once", [{"run": "preempted"}, {"run": "done"}], [*UP, "start", "delete"],
             sleeps=[60, 60]),
    Scenario("exit 1 twice, then done", [{"run": "failed"}, {}, {"run": "failed"}, {}, {"run": "done"}],
             [*UP, "start", "start", "delete"], sleeps=[60, 60, 60, 120, 60]),
    Scenario("exit 1 gives up after three", [{"run": "failed"}, {}, {"run": "failed"}, {}, {"run": "failed"}],
             [*UP, "start", "start", "delete"], code=1, says=("gave up after 3 failures",),
             sleeps=[60, 60, 60, 120, 60]),
    Scenario("failures long ago do not count", [{"run": "failed"}, *[{}] * 11, {"run": "failed"}, {}, {"run": "failed"},
             {}, {"run": "done"}], [*UP, *["start"] * 3, "delete"]),
    Scenario("failed, with the word running in its log", [{"run": f"failed (exit code 1): {MISSING}"}, {},
             {"run": "done"}], [*UP, "start", "delete"], says=("failure 1 of 3",)),
    Scenario("lost with its worker's restart", [{"run": "lost"}, {}, {"run": "done"}], [*UP, "start", "delete"]),
    Scenario("exit 2 gives up at once", [{"run": "wrong input"}], [*UP, "delete"], code=2, says=("refused its input",)),
    Scenario("exit 3 gives up at once", [{"run": "alarm (saved, exit code 3)"}], [*UP, "delete"], code=3,
             says=("an alarm stopped the run",)),
    Scenario("hours are over", [{"clock": 1_007_200}], [*UP, "stop", "delete"], code=1,
             says=("MAX_HOURS = 2 are over", "same command resumes"), settings={"MAX_HOURS": "2"}),
    Scenario("hours are over while it waits", [{"queue": "ACCEPTED"}, {"clock": 1_007_200}, {}], ["create", "delete"],
             code=1, says=("no TPU in time", "MAX_HOURS = 2 are over"), settings={"MAX_HOURS": "2"},
             cloud={"replies": {"queued-resources create": [[0, "", ""]]}}),
    Scenario("ssh fails for a while", [{}] * 3 + [{"run": "done"}], [*UP[1:], "delete"],
             cloud={"queue": "ACTIVE", "node": "READY", "replies": {"status": [LOST] * 3}}, says=("do not answer",)),
    Scenario("ssh fails for ever", [], ["delete"], code=1, says=("do not answer", "gave up after 3 failures"),
             cloud={"queue": "ACTIVE", "node": "READY", "replies": {"status": [LOST] * 9}}),
    Scenario("busy with another run", [], [], code=2, says=("a run is active", "setup.sh refuses"), billed=True,
             cloud={"queue": "ACTIVE", "node": "READY", "run": "running", "replies": {"status": [[0, "none", ""]]}}),
    Scenario("over the quota", [], ["create"], code=2, says=("over the quota of my-project", "nothing to delete"),
             cloud={"replies": {"queued-resources create": [QUOTA]}}),
    Scenario("the cloud does not answer once", [{}, {"run": "done"}], [*UP, "delete"],
             cloud={"replies": {"queued-resources describe": [RESET]}}, says=("connection reset", "failure 1 of 3")),
    Scenario("it cannot be deleted", [{"run": "done"}], [*UP, "delete"], billed=True, says=("cannot delete the",),
             cloud={"replies": {"queued-resources delete": [RESET]}}),
]  # fmt: skip


@pytest.mark.parametrize("scenario", TABLE, ids=lambda scenario: scenario.name)
def test_supervise(scenario, place):
    place.settings(**SETTINGS | {"MAX_TRIES": "3"} | scenario.settings)
    place.cloud(workers=1, events=scenario.events, **scenario.cloud)
    code, _, err = place.run("supervise.sh", "experiments/train.py", "nano", "--run-dir", "runs/x")
    assert code == scenario.code, err
    assert place.changes() == scenario.does, err
    for words in scenario.says:
        assert words in err
    if scenario.sleeps is not None:
        assert place.sleeps == scenario.sleeps
    cloud = place.cloud()
    assert (cloud["queue"], cloud["node"]) == (("ACTIVE", "READY") if scenario.billed else ("", ""))
    assert ("left behind" in err.splitlines()[-1]) == scenario.billed, err


REFUSED = [
    (["experiments/train.py", "smal"], "Did you mean 'small'?"),
    (["experiments/train.py"], "which preset?"),
    (["experiments/train.py", "nano", "--steps", "0"], "steps = 0"),
    (["experiments/train.py", "nano", "--steps", "many"], "many"),
    (["experiments/train.py", "nano", "--stepz", "3"], "--stepz"),
    (["experiments/train.py", "nano", "--run-dir", "gs://my-bucket/x"], "is a URL"),
    (["experiments/train.py", "nano", "--run-dir", "gs:/my-bucket/x"], "is a URL"),
    (["experiments/train.py", "nano", "--run-dir", "elsewhere/x"], "run_dir = 'elsewhere/x': must be in runs/"),
    (["experiments/train.py", "nano", "--run-dir=runs/../x"], "must be in runs/"),
    (["experiments/train.py", "nano", "--run-dir", "/tmp/runs/x"], "must be in runs/"),
    (["experiments/train.py", "nano", "--run-dir", "runs"], "must be in runs/"),
    (["experiments/prepare_data.py", "t", "--tokenizer", "bytes", "--out", "data/x"], "must be in runs/"),
    (["experiments/evaluate.py", "runs/x", "--depths", "a"], "a"),
]


@pytest.mark.parametrize("script", ["supervise.sh", "run.sh"])
@pytest.mark.parametrize(
    ("arguments", "words"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_command_is_refused_before_anything_is_rented_or_started(arguments, words, script, place):
    if script == "run.sh":
        place.cloud(queue="ACTIVE", node="READY")
    code, out, err = place.run(script, *arguments)
    assert code == 2, err
    assert words in err
    assert "Traceback" not in out + err
    assert place.changes() == []


def test_without_a_bucket_a_run_may_write_anywhere(place):
    place.settings(**SETTINGS | {"BUCKET": "''"})
    place.cloud(queue="ACTIVE", node="READY")
    assert place.run("run.sh", "experiments/train.py", "nano", "--run-dir", "elsewhere/x")[0] == 0
    assert place.run("run.sh", "experiments/train.py", "nano", "--stepz", "3")[0] == 2


def test_every_start_is_the_same_command(place):
    place.cloud(workers=2, events=[{"run": "preempted"}, GONE, {"run": "done"}])
    assert place.run("supervise.sh", "experiments/train.py", "nano", "--run-dir", "runs/a b")[0] == 0
    starts = [[word for word in call if word.startswith("--command")] for call in place.calls if " start " in str(call)]
    assert len(starts) == 6
    [[command]] = {tuple(start) for start in starts}
    assert command.endswith("9012 experiments/train.py nano --run-dir runs/a\\ b")


def test_an_interrupted_supervisor_says_what_goes_on_costing(place):
    place.cloud(workers=1, queue="ACTIVE", node="READY", run="running", real_sleep=2)
    process = place.start("supervise.sh", "experiments/train.py", "nano")
    while not place.sleeps:
        assert process.poll() is None
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "left behind in us-west4-a" in err
