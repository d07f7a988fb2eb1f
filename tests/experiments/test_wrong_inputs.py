"""Wrong input to every command: one line that says what is wrong, exit code 2, and no traceback."""

import json
import shlex
import shutil

import pytest
from golden_cases import GOLDEN
from small_runs import TEXTS, prepared, saved

from rdlm.config import DataConfig

ON_A_RUN = {
    "evaluate": (), "generate": ("--prompt", "a"), "questions": ("--questions", "{tmp}/q.jsonl"),
    "lm_eval": ("--tasks", "mine", "--include-path", "{tmp}/tasks"), "calibrate_exits": (), "trajectories": (),
    "report": (), "depth_sweep": (),
}  # fmt: skip
"""Commands about a run folder, with arguments that are right."""


def shown(words):
    """A short name of a case."""
    return words if isinstance(words, str) else " ".join(words)[:60]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Runs, and folders and files that are none."""
    import datasets

    tmp = tmp_path_factory.mktemp("wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp / "cache")
        yield filled(tmp)


def filled(tmp):
    """The places by name."""
    run = prepared(tmp, 0.5)
    task = saved(tmp / "task", 7, {"data": DataConfig(tokenizer_size=7, sequence_length=17, task="s3", task_size=16)})
    question = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}
    write(tmp / "q.jsonl", json.dumps(question) + "\n")
    write(tmp / "long.jsonl", json.dumps(question | {"choices": ["a" * 99, "b"]}) + "\n")
    files = {
        "empty": "",
        "object": "{}",
        "number": "3",
        "latin": b'{"prompt": "\xe9", "answer": "a"}',
        "both": json.dumps(question) + '\n{"prompt": "a", "answer": "b"}',
        "surrogate": '{"prompt": "a", "answer": "\\ud800"}',
        "letter": json.dumps(question | {"answer": "C"}),
        "one": json.dumps(question | {"choices": ["a"]}),
        "texts": json.dumps(question | {"choices": "ab"}),
        "nobody": '{"prompt": "a"}',
        "bool": json.dumps(question | {"answer": True}),
        "deep": "[" * 99_999,
        "digits": '{"prompt": "a", "answer": ' + 9999 * "1" + "}",
    }
    for name, content in files.items():
        write(tmp / f"q_{name}.jsonl", content)
    write(tmp / "tasks/mine.yaml", "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\n"
          "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
          "doc_to_target: answer\nmetric_list: [{metric: acc}]\n" % (tmp / "q.jsonl"))  # fmt: skip
    write(tmp / "file", "text")
    (tmp / "empty").mkdir()
    config = json.loads((run / "config.json").read_text())
    files = {
        "list": "[]",
        "brackets": "[" * 99_999,
        "cut": '{"model": {',
        "latin": b'{"\xe9": 1}',
        "unknown": '{"colour": 1}',
        "digits": '{"steps": ' + 9999 * "1" + "}",
        "text": json.dumps(config | {"steps": "many"}),
        "null": "null",
        "shape": json.dumps(config | {"model": config["model"] | {"embed_dim": 17}}),
        "infinite": json.dumps(config | {"model": config["model"] | {"rope_base": float("inf")}}),
        "untrained": json.dumps(config),
    }
    for name, content in files.items():
        write(tmp / f"config_{name}/config.json", content)
    broken = shutil.copytree(run, tmp / "no_tokenizer")
    shutil.rmtree(broken / "tokenizer")
    damaged = shutil.copytree(run, tmp / "damaged")
    for file in (damaged / "checkpoints/7").rglob("*"):
        if file.is_file() and file.stat().st_size > 500:
            file.write_bytes(file.read_bytes()[:100])
    write(tmp / "llama/config.json", '{"model_type": "llama"}')
    write(tmp / "texts.txt", "".join(TEXTS))
    return {"run": str(run), "task": str(task), "hf": str(GOLDEN / "A2"), "tmp": str(tmp)}


@pytest.fixture
def refuses(places, command, tmp_path, monkeypatch):
    """refuses("evaluate", "{run}", ...): exit code 2 and one line on stderr."""
    monkeypatch.chdir(tmp_path)

    def check(name, *arguments):
        code, out, err = command(name, *(str(x).format(**places) for x in arguments))
        assert "Traceback" not in out + err, err
        *before, last = err.splitlines() or [""]  # before: progress
        assert (code, last[:7]) == (2, "error: "), (code, err, out)
        assert not any(line.startswith("error: ") for line in before)
        assert len(last) < 1000

    return check


NO_RUN = (
    "{tmp}/none", "{tmp}/file", "{tmp}/empty", "{tmp}/llama", "{tmp}/config_list", "{tmp}/config_brackets",
    "{tmp}/config_cut", "{tmp}/config_latin", "{tmp}/config_unknown", "{tmp}/config_digits", "{tmp}/config_text",
    "{tmp}/config_null", "{tmp}/config_shape", "{tmp}/config_infinite", "{tmp}/config_untrained", "{run}/config.json",
    "{run}/checkpoints/7", "gs://", "",
)  # fmt: skip


@pytest.mark.parametrize("folder", NO_RUN)
@pytest.mark.parametrize("name", ON_A_RUN)
def test_what_is_no_run_folder_is_refused(name, folder, refuses):
    refuses(name, folder, *ON_A_RUN[name])


FLAGS = {
    "evaluate": """
        --step 99
        --step -1
        --depths 0
        --depths 4 -1
        --depths 99999999999
        --batches 0
        --batches -3
        --ema
        --saved
        --saved --depths 1
        --data-folder {tmp}/none
        --prepared {tmp}/texts
        --prepared {tmp}/file
        --prepared ''
    """,
    "generate": """
        --steps 0
        --steps -1
        --steps 99999999999
        --steps 3000000
        --max-new-tokens 0
        --max-new-tokens -5
        --max-new-tokens 99999999999
        --temperature nan
        --temperature -1
        --temperature inf
        --top-k -1
        --top-p 0
        --top-p 1.5
        --top-p nan
        --min-p -1
        --min-p 2
        --repetition-penalty 0
        --repetition-penalty nan
        --threshold nan
        --threshold -1
        --exit none --threshold 1
        --min-steps -1
        --exit argmax_stability --threshold nan
        --exit argmax_stability --threshold inf
        --calibrated
        --calibrated --exit none
        --seed -1
        --seed 99999999999999999999
        --ema
        --stop ''
        --prompt xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
    """,
    "questions": """
        --step 99
        --step -1
        --depths 0
        --depths 4 -1
        --depths 99999999999
        --limit 0
        --min-category 0
        --tokens-per-batch 0
        --steps-tokens -1
        --steps-tokens 39
        --exit none --threshold 1
        --exit kl --threshold nan
        --exit argmax_stability --threshold inf
        --exit kl --threshold -1
        --questions {tmp}/none
        --questions {tmp}/file
        --questions {tmp}/empty
        --questions {tmp}/long.jsonl
        --questions {tmp}/q_empty.jsonl
        --questions {tmp}/q_object.jsonl
        --questions {tmp}/q_number.jsonl
        --questions {tmp}/q_latin.jsonl
        --questions {tmp}/q_both.jsonl
        --questions {tmp}/q_surrogate.jsonl
        --questions {tmp}/q_letter.jsonl
        --questions {tmp}/q_one.jsonl
        --questions {tmp}/q_texts.jsonl
        --questions {tmp}/q_nobody.jsonl
        --questions {tmp}/q_bool.jsonl
        --questions {tmp}/q_deep.jsonl
        --questions {tmp}/q_digits.jsonl
        --questions {tmp}/llama/config.json
    """,
    "lm_eval": """
        --step 99
        --step -1
        --depths 0
        --depths 4 -1
        --depths 99999999999
        --tasks none
        --tasks ''
        --include-path {tmp}/none
        --include-path {tmp}/file
        --include-path {tmp}/empty
        --limit 0
        --limit -1
        --lanes 0
        --tokens-per-batch -1
        --fewshot -1
        --preset gsm8k --chat
        --exit none --threshold 1
        --exit kl --threshold nan
        --exit argmax_stability --threshold nan
    """,
    "calibrate_exits": """
        --rules colour
        --rules margin
        --rules
        --epsilon 0
        --epsilon 1
        --epsilon nan
        --epsilon -0.1
        --delta 0
        --delta nan
        --delta inf
        --steps 1
        --steps 0
        --steps 99999999999
        --rows 0
        --rows -1
        --seed -1
        --seed 99999999999
        --epsilon 1e-9
    """,
    "trajectories": """
        --step 99
        --step -1
        --depths 0
        --depths 4 -1
        --depths 99999999999
        --recurrences 15
        --recurrences -1
        --recurrences 20000000 --depths 1
        --starts 1
        --starts 0
        --tokens 1
        --row -1
        --row 999
        --size 0
        --size 4
        --prompt ''
        --prompt xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
        --prompt ab --row 3
        --prepared {tmp}/none
    """,
    "depth_sweep": """
        --step 99
        --step -1
        --depths 0
        --depths 4 -1
        --depths 99999999999
        --batches 0
        --size 0
        --size 4
        --prepared {tmp}/none
    """,
    "report": """
        --out ''
        --out .
        --out {tmp}/empty
        --out {tmp}/file
        --out {tmp}/file/x.html
        --out /proc/nowhere/x.html
    """,
}
"""Wrong flags of the commands about a run folder, one case a line."""


def cases(text):
    """The lines of a table, each as words."""
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("name", "flags"), [(name, flags) for name, text in FLAGS.items() for flags in cases(text)], ids=shown
)
def test_wrong_flags_are_refused(name, flags, refuses):
    given = ON_A_RUN[name]
    if given and given[0] in flags:  # a flag takes one value
        given = given[2:]
    refuses(name, "{run}", *given, *flags)


OTHERS = """
    convert_huggingface {tmp}/none {tmp}/out
    convert_huggingface {tmp}/file {tmp}/out
    convert_huggingface {tmp}/empty {tmp}/out
    convert_huggingface {tmp}/llama {tmp}/out
    convert_huggingface {hf} {hf}
    convert_huggingface {hf} {run}
    convert_huggingface {hf} {tmp}/file
    convert_huggingface {hf} {tmp}/file/out
    convert_huggingface {run} {tmp}/llama
    convert_huggingface {run} {tmp}/task
    convert_huggingface {run} {tmp}/texts
    convert_huggingface {hf} {tmp}/out --step 3
    convert_huggingface {run} {tmp}/out --step 3
    convert_huggingface {run} {tmp}/out --verify --recurrences 0
    convert_huggingface {hf} {tmp}/out --verify --recurrences -2
    convert_huggingface {hf} {tmp}/out --verify --threshold nan
    convert_huggingface '' {tmp}/out
    convert_huggingface {tmp}/damaged {tmp}/out
    convert_huggingface {hf}/model.safetensors {tmp}/out
    generate {tmp}/no_tokenizer --prompt a
    questions {tmp}/no_tokenizer --questions {tmp}/q.jsonl
    trajectories {tmp}/no_tokenizer --prompt ab
    trajectories {hf} --prompt ab
    generate {hf} --prompt a
    questions {hf} --questions {tmp}/q.jsonl
    evaluate {hf}
    calibrate_exits {hf}
    trajectories {hf}
    depth_sweep {hf}
    report {hf}
    generate {task} --prompt a
    questions {task} --questions {tmp}/q.jsonl
    evaluate {task}
    trajectories {task} --prompt ab
    evaluate {tmp}/damaged
    generate {tmp}/damaged --prompt a
    questions {tmp}/damaged --questions {tmp}/q.jsonl
    lm_eval {tmp}/damaged --tasks mine --include-path {tmp}/tasks
    calibrate_exits {tmp}/damaged
    trajectories {tmp}/damaged
    depth_sweep {tmp}/damaged
    depth_sweep {task} --size 60
    trajectories {task} --size 60
    trajectories {task} --row 256
    train nanoo
    train nano --steps 0
    train nano --steps -1
    train nano --optimizer.learning-rate nan
    train nano --model.num-heads 3
    train nano --model.embed-dim 0
    train nano --seed -1
    train nano --data.prepared {tmp}/none
    train nano --data.prepared {tmp}/texts
    train nano --data.prepared ''
    train nano --run-dir ''
    train nano --run-dir {tmp}/file
    train nano --data.weights 1 nan
    prepare_data
    prepare_data {tmp}/none --out {tmp}/o
    prepare_data {tmp}/texts.txt
    prepare_data {tmp}/texts.txt --out {tmp}/o --tokenizer none
    prepare_data {tmp}/texts.txt --out {tmp}/file --tokenizer bytes
    prepare_data {tmp}/texts.txt --out {tmp}/o --tokenizer bytes --sequence-length 0
    prepare_data {tmp}/texts.txt --out {tmp}/o --tokenizer bytes --validation-fraction nan
    prepare_data {tmp}/texts.txt --out {tmp}/o --tokenizer bytes --processes -1
    prepare_data {tmp}/texts.txt --out {tmp}/o --tokenizer bytes --shard-bytes 0
    train_tokenizer
    train_tokenizer {tmp}/none --out {tmp}/t
    train_tokenizer {tmp}/texts.txt
    train_tokenizer {tmp}/texts.txt --out {tmp}/t --size 10
    train_tokenizer {tmp}/texts.txt --out {tmp}/t --size -1
    train_tokenizer {tmp}/texts.txt --out {tmp}/t --max-bytes 0
    train_tokenizer {tmp}/texts.txt --out {tmp}/file
    selftest --minutes 0
    selftest --minutes nan
    selftest --out ''
    aot_check nanoo
    aot_check nano --topology v5e
    aot_check nano --batch 0
    aot_check nano --data 0
    aot_check nano --only decode --capacity 1
    aot_check nano --only decode --mean-depth 0
    aot_check nano --only decode --mean-depth 33
    aot_check nano --only decode --capacity 64 --window 0
    aot_check nano --only decode --capacity 64 --inner 2
    aot_check nano --only decode --capacity 64 --window 8 --inner 33
    aot_check nano --only decode --capacity 64 --window 8 --exit
"""
"""Whole command lines."""


@pytest.mark.parametrize(("name", "arguments"), [(name, rest) for name, *rest in cases(OTHERS)], ids=shown)
def test_other_wrong_input_is_refused(name, arguments, refuses):
    refuses(name, *arguments)


NOT_ON_A_RUN = ("train", "convert_huggingface", "retrofit", "prepare_data", "train_tokenizer")


@pytest.mark.parametrize("name", [*ON_A_RUN, *NOT_ON_A_RUN])
@pytest.mark.parametrize("words", [("--colour", "red"), ("--step",), ("--steps", "many"), ("--depths", "1.5")], ids=str)
def test_mistakes_of_form_have_the_parsers_message(name, words, command):
    code, out, err = command(name, "x", *words)
    assert code == 2
    assert "Traceback" not in out + err
