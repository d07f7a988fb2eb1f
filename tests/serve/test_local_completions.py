"""lm-eval, unmodified, over HTTP: the numbers of the same task files in this process."""

import json
import os

import pytest
from lm_eval.evaluator import simple_evaluate

from rdlm import exits
from rdlm.evaluation.lm_eval import DepthLM, load_tasks, tasks

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")

pytestmark = pytest.mark.slow

ROWS = [
    {"question": f"{i} The capital of land {i}", "choices": [" is", " or", f" {i}"], "gold": i % 3, "answer": "T"}
    for i in range(6)
]
HEAD = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
TASKS = {
    "choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "texts": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: bits_per_byte}]
""",
    "answers": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "e", BOS], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def loaded(tmp_path, monkeypatch, toy_run):
    monkeypatch.setattr(tasks.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (data := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    tokens = toy_run.tokenizer
    (begin,) = (text for text, token in tokens.special_ids.items() if token == tokens.bos_id)
    for name, text in TASKS.items():
        text = text.replace("BOS", json.dumps(begin))  # a text ends there in our backend, and a random model writes it
        (tmp_path / f"tasks/{name}.yaml").write_text(f"task: {name}\n{HEAD.format(data=data)}{text}")
    return lambda: load_tasks(list(TASKS), tmp_path / "tasks")


def results(found):
    """(Metrics, what was answered to every request) of each task."""
    metrics = {
        name: {key: value for key, value in values.items() if key.endswith(",none") and "stderr" not in key}
        for name, values in found["results"].items()
    }
    answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    return metrics, answers


def numbers(tree):
    return [x for branch in tree for x in numbers(branch)] if isinstance(tree, (list, tuple)) else [tree]


def test_its_numbers_are_those_of_this_process(server, loaded):
    run = server.run
    inside = DepthLM(run.params, run.config, run.tokenizer, [1], max_steps=8, exit_rule=exits.kl(), bos=False, lanes=4)
    inside.row = 1
    arguments = f"model=toy,base_url={server.url}/v1/completions,max_length=32,seed=0"  # and nothing of the tokenizer
    outside = simple_evaluate("local-completions", model_args=arguments, tasks=loaded(), bootstrap_iters=0)
    here = simple_evaluate(inside, tasks=loaded(), bootstrap_iters=0)
    (metrics, answers), (expected, right) = results(outside), results(here)
    assert {key for values in metrics.values() for key in values} == {
        "acc,none", "bits_per_byte,none", "exact_match,none"
    }  # fmt: skip
    assert metrics["choices"] == expected["choices"]
    assert metrics["answers"] == expected["answers"]
    assert answers["answers"] == right["answers"]
    assert metrics["texts"]["bits_per_byte,none"] == pytest.approx(expected["texts"]["bits_per_byte,none"], rel=1e-6)
    assert numbers(answers["choices"]) == pytest.approx(numbers(right["choices"]), rel=1e-5)
    assert len({json.dumps(answer) for answer in right["answers"]}) > 1
