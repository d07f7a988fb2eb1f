"""train.py, evaluate.py and generate.py as a person uses them: what they print and leave, and how they refuse."""

import contextlib
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import re
import shutil
import sys

import pytest
from experiment_scripts import script

from rdlm.config import PRESETS
from rdlm.tokenizer import Tokenizer
from rdlm.train import startup

SCRIPTS = ("train", "evaluate", "generate")
TEXTS = [f"{i} The capital of land {i} is city {i % 7}; its river é flows {i * i} km.\n" * 3 for i in range(40)]
# Four steps of the smallest model on invented text; 8 rows, one for each of the tests' virtual devices.
TRAIN = (
    "nano", "--steps", "4", "--model.vocab-size", "290", "--data.tokenizer-size", "290", "--data.sequence-length", "32",
    "--data.batch-size", "8", "--data.validation-fraction", "0.2", "--checkpoint.every", "2", "--evaluation.every", "2",
)  # fmt: skip
DEPTHS = ["1", "2", "4", "8"]


def overridden(flag, value):
    """TRAIN with another value of one flag."""
    at = TRAIN.index(flag) if flag in TRAIN else len(TRAIN)
    return [*TRAIN[:at], flag, value, *TRAIN[at + 2 :]]


@pytest.fixture(scope="module", autouse=True)
def small():
    """40 short documents instead of the World Factbook."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("rdlm.data.prepare.embedded"), "_documents", lambda data: TEXTS)
        yield


@pytest.fixture
def refused(command):
    """refused(words, "train", ...): exit code 2, one line on stderr with every word in it, nothing on stdout."""

    def check(words, name, *arguments):
        code, out, err = command(name, *arguments)
        assert code == 2, err
        assert err.count("\n") == 1, err
        assert err.startswith("error: ")
        for word in words:
            assert word in err
        assert "Traceback" not in err + out
        return out

    return check


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, data folder) after training; tests must not change them."""
    base = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.setattr(sys, "argv", ["train.py", *TRAIN, *folders(base)])
        patch.setattr(startup, "_starts", itertools.count())  # as the first start of its process
        assert script("train").main() == 0
    (base / "said").write_text(said.getvalue())
    return base / "run", base / "data"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run to damage, still with the data of the original."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def test_training_says_what_its_start_took(trained):
    said = (trained[0].parent / "said").read_text()
    found = re.findall(r"^first step after [\d.]+ s: (.*)$", said, flags=re.MULTILINE)
    assert len(found) == 1
    assert {part.rpartition(" ")[0] for part in found[0].split(", ")} >= {"imports", "tracing", "compilation"}


def folders(base):
    return "--run-dir", str(base / "run"), "--data.folder", str(base / "data")


def contents(folder):
    """Every file below a folder with its checksum."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# What they do


def test_training_leaves_a_run_folder(trained):
    run, _ = trained
    assert {p.name for p in run.iterdir()} == {
        "checkpoints", "config.json", "loss_by_depth.json", "metrics.jsonl", "tokenizer"
    }  # fmt: skip
    assert list(json.loads((run / "loss_by_depth.json").read_text())) == DEPTHS
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_training_a_finished_run_again_leaves_it_alone(run, trained, command):
    before, again = contents(run), ("train", *TRAIN, "--run-dir", run, "--data.folder", trained[1])
    code, _, err = command(*again)
    assert code == 0
    assert "is finished: step 4" in err
    assert contents(run) == before
    # A curve that is missing, or not the one asked for, is made.
    (run / "loss_by_depth.json").write_text(json.dumps({"1": 9.0}))
    code, _, err = command(*again)
    assert code == 0
    assert "resuming" in err
    assert list(json.loads((run / "loss_by_depth.json").read_text())) == DEPTHS


def test_evaluate_agrees_with_training_and_keeps_its_format(run, command):
    before = json.loads((run / "loss_by_depth.json").read_text())
    code, out, _ = command("evaluate", run)
    assert code == 0
    after = json.loads((run / "loss_by_depth.json").read_text())
    assert list(after) == DEPTHS
    assert list(after.values()) == pytest.approx(list(before.values()), abs=1e-5)  # eight devices there, one here
    for r, nats in after.items():
        assert any(r in line.split() and f"{nats:.4f}" in line for line in out.splitlines()), out
    assert (run / "loss_by_depth.png").read_bytes().startswith(b"\x89PNG")
    # The same table again from the file alone, bits per byte included.
    files = contents(run)
    code, again, _ = command("evaluate", run, "--saved")
    assert code == 0
    assert again == out
    assert contents(run) == files


def test_evaluate_in_parts_writes_its_own_files(run, command):
    curve = (run / "loss_by_depth.json").read_text()
    code, out, _ = command("evaluate", run, "--depths", "3", "1", "--batches", "1", "--step", "2")
    assert code == 0
    assert "first 1 batches" in out
    assert list(json.loads((run / "loss_by_depth_step_2_batches_1.json").read_text())) == ["1", "3"]
    assert (run / "loss_by_depth_step_2_batches_1.png").exists()
    assert (run / "loss_by_depth.json").read_text() == curve


@pytest.mark.parametrize("rule", ["kl", "none", "latent_diff"])
def test_generate_streams_text_and_shows_steps(rule, trained, command):
    arguments = ("--prompt", "12 The", "--max-new-tokens", "5", "--exit", rule, "--steps", "6", "--temperature", "1")
    code, out, err = command("generate", trained[0], *arguments)
    assert code == 0, err
    assert out.startswith("12 The")
    shown = out.partition("token/recurrences:")[2]
    steps = [int(r) for r in re.findall(r"['\"]/(\d+)\b", shown)]
    assert 1 <= len(steps) <= 5
    assert f"{len(steps)} tokens, {sum(steps) / len(steps):.1f} recurrences on average" in out
    assert all(r == 6 if rule == "none" else 1 <= r <= 6 for r in steps)
    again = command("generate", trained[0], *arguments)[1]
    assert again.splitlines()[0] == out.splitlines()[0]
    other = command("generate", trained[0], *arguments, "--seed", "1", "--no-show-steps")[1]
    assert "token/recurrences" not in other


def test_generate_stops_at_stop_strings_and_replies_to_messages(trained, command):
    common = ("--exit", "none", "--steps", "2", "--max-new-tokens", "12", "--no-show-steps")
    code, out, err = command("generate", trained[0], "--prompt", "12 The", *common)
    assert code == 0, err
    continued = out.removeprefix("12 The").rpartition("\n")[0].rpartition("\n")[0]
    stop = continued[1:3]
    code, out, err = command("generate", trained[0], "--prompt", "12 The", *common, "--stop", "never", stop)
    assert code == 0, err
    assert out.startswith("12 The" + continued.partition(stop)[0] + "\n")
    code, out, err = command("generate", trained[0], "--prompt", "12 The", *common, "--chat")
    assert code == 0, err
    assert out.startswith("12 The\n")


def test_control_characters_are_shown_on_a_terminal_alone(monkeypatch):
    visible, text = script("generate").visible, "a\x1b[31m\x00\x08\r\n\té\x7f\x9b\x0e"
    assert visible(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert visible(text) == "a␛[31m␀␈␍\n\té␡\\x9b␎"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_field_and_says_what_it_is(name, command):
    code, out, _ = command(name, *(["nano"] if name == "train" else []), "--help")
    assert code == 0
    # A field: its flags and type, then two blanks or a new line, then what it is, then its default.
    fields = re.split(r"\n(?=--[a-z])", "\n".join(line.strip("│ ") for line in out.splitlines()))[1:]
    assert len(fields) >= {"train": 50, "evaluate": 5, "generate": 12}[name]
    for field in fields:
        field = field.replace("\n[...]]", " [...]]")  # a list of choices may take two lines
        said = re.split(r"  |\n", field, maxsplit=1)[1]
        assert re.match(r"\s*[\w(]", said), field
        assert not said.strip().startswith("(default"), field
    if name == "train":
        code, out, _ = command("train", "--help")
        assert code == 0
        assert all(preset in out for preset in PRESETS)


# How they refuse


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["preset", "quickstart"]),
        (("nan0",), ["'nan0'", "Did you mean 'nano'?"]),
        (("--steps", "3"), ["preset", "'--steps'"]),
        (("nano", "--steps", "0"), ["steps = 0", "at least 1"]),
        (("nano", "--optimizer.eps", "0"), ["optimizer.eps = 0", "positive"]),
        (("nano", "--optimizer.learning-rate", "inf"), ["optimizer.learning_rate = inf", "finite"]),
        (("nano", "--optimizer.weight-decay", "inf"), ["optimizer.weight_decay = inf", "finite"]),
        (("nano", "--recurrence.loss-power", "nan"), ["recurrence.loss_power = nan", "finite"]),
        (("nano", "--model.embed-dim", "33"), ["embed_dim = 33", "multiple of num_heads = 2", "try 34"]),
        (("nano", "--model.embed-dim", "30", "--model.num-heads", "10"), ["embed_dim / num_heads = 3", "even"]),
        (("nano", "--model.num-kv-heads", "3"), ["num_kv_heads = 3", "must divide num_heads = 2"]),
        (("nano", "--model.attention-window", "0"), ["attention_window = 0", "at least 1"]),
        (("nano", "--model.backprop-depth", "5"), ["backprop_depth = 5", "at most model.mean_recurrence = 4"]),
        (("nano", "--model.backprop-depth", "0"), ["backprop_depth = 0", "at least 1"]),
        (("nano", "--model.vocab-size", "300"), ["tokenizer_size = 384", "model.vocab_size = 300"]),
        (("nano", "--data.sequence-length", "999"), ["sequence_length = 999", "model.max_length = 256"]),
        (("nano", "--data.batch-size", "12"), ["batch_size = 12", "try 16"]),
        (("nano", "--evaluation.depths", "4", "2"), ["evaluation.depths = (4, 2)", "increasing"]),
        (("nano", "--model.param-dtype", "float16"), ["model.param_dtype = 'float16'", "float32 or bfloat16"]),
        (("nano", "--loss.z-loss", "-1"), ["loss.z_loss = -1", "not be negative"]),
        (("nano", "--loss.label-smoothing", "1"), ["loss.label_smoothing = 1", "[0, 1)"]),
        (("nano", "--checkpoint.keep-every", "7"), ["checkpoint.keep_every = 7", "multiple of checkpoint.every = 5"]),
        (("nano", "--checkpoint.keep-best", "2"), ["checkpoint.every = 5", "multiple of evaluation.every = 10"]),
        (("nano", "--checkpoint.keep-best", "-1"), ["checkpoint.keep_best = -1", "not be negative"]),
    ],
)
def test_train_refuses_arguments(arguments, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(words, "train", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("train", ("nano", "extra"), ["extra", "train.py nano --help"]),
        ("train", ("nano", "--optimizer.learning-rte", "3"), ["learning-rte", "--optimizer.learning-rate FLOAT"]),
        ("train", ("nano", "--learning-rate", "3"), ["--learning-rate", "--optimizer.learning-rate FLOAT"]),
        ("train", ("nano", "--nonsense=3"), ["--nonsense=3", "--help"]),
        ("train", ("nano", "--steps", "many"), ["--steps", "'many'"]),
        ("train", ("nano", "--steps"), ["--steps"]),
        ("train", ("nano", "--recurrence.remat", "all"), ["--recurrence.remat", "'all'", "'none'"]),
        ("evaluate", (), ["RUN_DIR", "evaluate.py --help"]),
        ("evaluate", ("runs/a", "--depth", "3"), ["--depth", "--depths"]),
        ("generate", ("runs/a",), ["--prompt"]),
        ("generate", ("runs/a", "--prompt", "a", "--exits", "kl"), ["--exits", "--exit {"]),
        ("generate", ("runs/a", "--prompt", "a", "--exit", "kll"), ["--exit", "'kll'", "'kl'"]),
        ("prepare_data", ("a", "--out", "x", "--tokenizer", "bytes", "--pakcing", "best_fit"), ["--packing"]),
        ("prepare_data", ("a", "--out", "x", "--tokenizer", "bytes", "--packing", "best"), ["'best'", "best_fit"]),
        ("calibrate_exits", ("runs/a", "--rule", "kl"), ["--rule", "--rules"]),
        ("depth_sweep", ("runs/a", "--rules", "kll"), ["kll", "gated_kl"]),
    ],
)
def test_mistakes_of_form_print_the_parsers_message(name, arguments, words, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(name, *arguments)
    assert (code, out) == (2, "")
    assert not err.startswith("error: "), "the line of an InputError"
    message = " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())  # without the box around it
    for word in words:
        assert word in message
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("evaluate", ("RUN", "--depths", "0", "1"), ["depths = (0, 1)", "at least 1"]),
        ("evaluate", ("RUN", "--batches", "0"), ["--batches = 0", "at least 1"]),
        ("evaluate", ("RUN", "--step", "3"), ["step = 3", "2, 4"]),
        ("evaluate", ("RUN", "--saved", "--step", "2"), ["loss_by_depth_step_2.json", "missing"]),
        ("generate", ("RUN", "--prompt", "a", "--threshold", "-1"), ["threshold = -1", "not negative"]),
        ("generate", ("RUN", "--prompt", "a", "--exit", "none", "--threshold", "1"), ["--threshold", "none"]),
        ("generate", ("RUN", "--prompt", "a", "--steps", "0"), ["--steps = 0", "at least 1"]),
        ("generate", ("RUN", "--prompt", "a", "--temperature", "-1"), ["temperature = -1", "not be negative"]),
        ("generate", ("RUN", "--prompt", "a", "--max-new-tokens", "300"), ["max_new_tokens = 300", "256"]),
        ("generate", ("RUN", "--prompt", "\ud800"), ["text", "Unicode"]),
        ("generate", ("RUN", "--prompt", "\ud800", "--chat"), ["messages[0]", "Unicode"]),
        ("generate", ("RUN", "--prompt", "a", "--stop", "b", ""), ["stop = ['b', '']", "none of them empty"]),
    ],
)
def test_evaluate_and_generate_refuse_arguments(name, arguments, words, trained, refused):
    run, data = trained
    before = contents(run) | contents(data)
    out = refused(words, name, *(run if word == "RUN" else word for word in arguments))
    assert out == ""
    assert contents(run) | contents(data) == before


def missing(run):
    shutil.rmtree(run)


def a_file(run):
    shutil.rmtree(run)
    run.write_text("not a folder")


def without_config(run):
    (run / "config.json").unlink()


def config_cut_short(run):
    path = run / "config.json"
    path.write_text(path.read_text()[:200])


def config_of_another_time(run):
    path = run / "config.json"
    path.write_text(path.read_text().replace('"num_heads"', '"heads"'))


def config_with_a_wrong_shape(run):
    path = run / "config.json"
    path.write_text(path.read_text().replace('"embed_dim": 32', '"embed_dim": 33'))


def config_not_text(run):
    (run / "config.json").write_bytes(b"\xff\xfe\x00")


def without_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def half_a_checkpoint(run):
    for step in (run / "checkpoints").iterdir():  # how a checkpoint looks that was being written
        step.rename(step.with_name(step.name + ".orbax-checkpoint-tmp"))


def damaged_checkpoint(run):
    for path in (run / "checkpoints/4").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_tokenizer(run):
    Tokenizer.train(["entirely different words in here"] * 9, 270).save(run / "tokenizer")


def without_tokenizer(run):
    shutil.rmtree(run / "tokenizer")


TRAINED_WITH = "is not the one the checkpoint was trained with"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, ["does not exist", "train a model"]),
        (a_file, ["is a file; give the folder that holds it"]),
        (without_config, ["no config.json"]),
        (config_cut_short, ["config.json", "not JSON"]),
        (config_of_another_time, ["config.json", "unknown field 'heads'", "'num_heads'"]),
        (config_with_a_wrong_shape, ["embed_dim = 33", "multiple of num_heads"]),
        (config_not_text, ["config.json"]),
        (without_checkpoints, ["no complete checkpoint"]),
        (half_a_checkpoint, ["no complete checkpoint"]),
        (damaged_checkpoint, ["checkpoints/4", "damaged"]),
        (another_tokenizer, ["tokenizer", TRAINED_WITH]),
        (without_tokenizer, ["tokenizer", "no tokenizer.json"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_damaged_run_folders_are_refused(name, damage, words, run, refused):
    damage(run)
    before = contents(run.parent)
    refused(words, name, run, *(["--prompt", "a"] if name == "generate" else []))
    assert contents(run.parent) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (a_file, ["run", "is not a run folder"]),
        (without_config, ["is not a run folder", "--run-dir"]),
        (config_cut_short, ["config.json", "not JSON"]),
        (config_of_another_time, ["config.json", "unknown field 'heads'"]),
        (config_not_text, ["config.json"]),
        (another_tokenizer, ["tokenizer", "another tokenizer"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_training_does_not_go_on_in_a_damaged_run_folder(damage, words, run, trained, refused):
    damage(run)
    before = contents(run.parent)
    refused(words, "train", *overridden("--steps", "6"), "--run-dir", run, "--data.folder", trained[1])
    assert contents(run.parent) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--seed", "1"), ["seed = 0, not 1", "--run-dir"]),
        (("--model.embed-dim", "64"), ["model.embed_dim = 32, not 64", "--run-dir"]),
        (("--steps", "2"), ["steps = 2", "already at step 4"]),
    ],
)
def test_training_does_not_go_on_with_another_configuration(change, words, run, trained, refused):
    before = contents(run)
    refused(words, "train", *overridden(*change), "--run-dir", run, "--data.folder", trained[1])
    assert contents(run) == before


def test_evaluating_with_data_of_another_tokenizer_is_refused(run, trained, refused, tmp_path):
    # Data prepared from other text under the same settings: another tokenizer in the same place.
    shutil.copytree(trained[1], tmp_path / "data")
    [prepared] = (path for path in (tmp_path / "data").iterdir() if (path / "manifest.json").exists())
    manifest = (prepared / "manifest.json").read_text()
    known = Tokenizer.load(run / "tokenizer").hash
    (prepared / "manifest.json").write_text(manifest.replace(known, "f" * 64))
    before = contents(tmp_path)
    refused(["tokenizer", "ffffffff", known[:8]], "evaluate", run, "--data-folder", tmp_path / "data")
    assert contents(tmp_path) == before


# A path below a regular file cannot be written by anyone, root included.


@pytest.mark.parametrize("flag", ["--run-dir", "--data.folder"])
def test_training_into_an_unwritable_folder_is_refused(flag, refused, tmp_path, trained):
    (tmp_path / "file").write_text("precious")
    folders = {"--run-dir": tmp_path / "run", "--data.folder": trained[1]} | {flag: tmp_path / "file/below"}
    words = [str(tmp_path / "file/below"), "cannot be"]
    refused(words, "train", *TRAIN, *(word for pair in folders.items() for word in pair))
    assert contents(tmp_path).keys() == {"file"}
    assert (tmp_path / "file").read_text() == "precious"


def test_evaluating_into_an_unwritable_folder_is_refused(run, refused):
    (run / "loss_by_depth.json").unlink()
    (run / "loss_by_depth.json").mkdir()
    before = contents(run)
    refused(["loss_by_depth.json", "cannot be written"], "evaluate", run)
    assert contents(run) == before
