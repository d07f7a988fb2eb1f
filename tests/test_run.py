"""`rdlm.load`: run folders and Hugging Face folders as one object; text in, text out; loss by depth."""

import dataclasses
import importlib
import json
import pkgutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import rdlm
from rdlm.checkpoint import save_parameters
from rdlm.config import PRESETS, InputError, Sampling
from rdlm.data import open_data
from rdlm.evaluation.depth import depth_curve
from rdlm.exits import fixed
from rdlm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(nano_data, tmp_path_factory):
    """A run folder with parameters only, on the invented text of conftest.py."""
    run = PRESETS["nano"]
    data = dataclasses.replace(run.data, folder=str(nano_data), validation_fraction=0.1)
    tokenizer = open_data(data, seed=0).tokenizer
    model = dataclasses.replace(run.model, vocab_size=tokenizer.vocab_size, mean_recurrence=2)
    run = dataclasses.replace(run, model=model, data=data)
    params = rdlm.init_params(model, jax.random.key(0))
    folder = tmp_path_factory.mktemp("runs") / "run"
    meta = {"config": dataclasses.asdict(run), "tokenizer": tokenizer.hash, "step": 0}
    save_parameters(folder, params, run, json.loads(json.dumps(meta)))
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return rdlm.load(folder)


def test_a_run_folder(folder, run):
    params, config = rdlm.load_checkpoint(folder)
    assert (run.folder, run.step, run.config) == (folder, 0, config)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert run.tokenizer.hash == Tokenizer.load(folder / "tokenizer").hash


def test_text_in_and_text_out(run):
    prompts = ["12 ba", "7"]
    out = run.generate(prompts, max_new_tokens=5, exit_rule=fixed(2))
    ids = [run.tokenizer.encode(prompt) for prompt in prompts]
    sampling = Sampling(stop_tokens=(run.tokenizer.eos_id,))
    expected = rdlm.generate(run.params, run.config, ids, max_new_tokens=5, exit_rule=fixed(2), sampling=sampling)
    for ours, theirs in zip(out.tokens + out.steps, expected.tokens + expected.steps, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert out.text == [run.tokenizer.decode(tokens) for tokens in expected.tokens]
    one = run.generate(prompts[0], max_new_tokens=5, exit_rule=fixed(2))
    assert isinstance(one.text, str)
    assert len(one.tokens) == 1
    assert run.generate("12 ba", max_new_tokens=3).text != run.generate("7", max_new_tokens=3).text  # the prompt counts


def test_stop_tokens_may_be_an_array(run):
    first, second = (
        run.generate("12 ba", max_new_tokens=5, sampling=Sampling(stop_tokens=ids))
        for ids in (np.array([1, 2]), (1, 2))
    )
    np.testing.assert_array_equal(first.tokens[0], second.tokens[0])


def test_a_chat(run, monkeypatch):
    chat = [{"role": "user", "content": "12 ba"}]
    monkeypatch.setattr(
        Tokenizer, "encode_chat", lambda self, messages, **options: self.encode(f"chat {messages[0]['content']}")
    )
    out = run.generate(chat, max_new_tokens=3)
    assert out.text == run.generate("chat 12 ba", max_new_tokens=3).text


def test_stop_strings_end_each_text_by_itself(run):
    prompts = ["12 ba", "7"]
    whole = run.generate(prompts, max_new_tokens=12)
    stop = whole.text[0][3:5]
    out = run.generate(prompts, max_new_tokens=12, stop=[stop])
    for text, tokens, before, all_tokens in zip(out.text, out.tokens, whole.text, whole.tokens, strict=True):
        assert text == before.partition(stop)[0]
        np.testing.assert_array_equal(tokens, all_tokens[: len(tokens)])
    assert len(out.tokens[0]) < len(whole.tokens[0])
    with pytest.raises(InputError, match="stop = "):
        run.generate("7", stop=[""])


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (None, {}), (3, {}), ([], {}), ([3], {}), ({"role": "user"}, {}), (["a", None], {}), (b"a", {}),
        ("a", {"stop": "x"}), ("a", {"stop": 3}), ("a", {"stop": [None]}), ("a", {"sampling": None}),
        ([{"role": "user", "content": None}], {}), ([{"role": "user", "content": "\ud83d"}], {}),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_one_line(prompt, options, run):
    with pytest.raises(InputError) as caught:
        run.generate(prompt, **options)
    assert "\n" not in str(caught.value)


def test_a_listener_that_has_enough_ends_its_prompt(run):
    whole = run.generate(["12 ba", "7"], max_new_tokens=8)
    made = []
    out = run.generate(["12 ba", "7"], max_new_tokens=8, on_token=lambda i, t, r: made.append((i, t)) or i == 0)
    assert [len(tokens) for tokens in out.tokens] == [1, len(whole.tokens[1])]
    np.testing.assert_array_equal(out.tokens[1], whole.tokens[1])
    assert [t for i, t in made if i == 1] == whole.tokens[1].tolist()
    assert [t for i, t in made if i == 0] == whole.tokens[0][:1].tolist()


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen(run):
    small = Tokenizer.train([f"{i} bananas and {i} oaks\n" for i in range(50)], 270)
    assert small.vocab_size < run.config.vocab_size
    model = dataclasses.replace(run, tokenizer=small)
    assert (model.config.vocab_size, model.config.rows) == (270, run.config.rows)
    options = {"max_new_tokens": 30, "sampling": Sampling(temperature=50.0), "key": jax.random.key(0)}
    assert max(model.generate("oak", **options).tokens[0]) < 270 <= max(run.generate("oak", **options).tokens[0])
    large = Tokenizer.bytes_only()
    large._backend.add_tokens([f"word {i}" for i in range(200)])
    with pytest.raises(InputError, match="tokenizer has 488 entries, the model only 384"):
        dataclasses.replace(run, tokenizer=large).generate("oak")


def test_loss_by_depth(run):
    curve = run.evaluate(depths=[4, 1], batches=2)
    data = run.validation()
    expected = depth_curve(run.params, run.config, data.batches(2), (1, 4), run.tokenizer.token_bytes)
    assert curve == expected
    done = []
    assert run.evaluate([1], batches=1, on_batch=lambda n, total: done.append((n, total))) != expected
    assert done == [(1, 1)]


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_huggingface_folder(run, tmp_path, with_tokenizer):
    rdlm.save_huggingface(tmp_path / "hf", run.params, run.config)
    if with_tokenizer:
        run.tokenizer.save(tmp_path / "hf")
    found = rdlm.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, found.params, run.params)
    assert found.step == 0
    if with_tokenizer:
        options = {"max_new_tokens": 3, "num_steps": 2}
        assert found.generate("12 ba", **options).text == run.generate("12 ba", **options).text
        with pytest.raises(InputError, match="has no data"):
            found.evaluate([1])
    else:
        assert found.tokenizer is None
        with pytest.raises(InputError, match=r"hf: no tokenizer.json.*rdlm.generate"):
            found.generate("12 ba")


def test_wrong_folders_are_one_line(folder, tmp_path):
    for where, options, says in (
        (tmp_path / "nothing", {}, "does not exist"),
        (folder, {"step": 7}, "step = 7"),
        (folder, {"ema": True}, "kept no moving average"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            rdlm.load(where, **options)
        assert "\n" not in str(caught.value)


def test_every_room_is_an_attribute():
    rooms = [room.name for room in pkgutil.iter_modules(rdlm.__path__)]
    assert {"run", "exits", "analysis", "tokenizer"} <= set(rooms)
    for room in rooms:
        assert getattr(rdlm, room) is importlib.import_module(f"rdlm.{room}")
    for name in rdlm.__all__:
        assert getattr(rdlm, name) is not None
    with pytest.raises(AttributeError, match="rooom"):
        _ = rdlm.rooom


def test_configuration_starts_without_jax():
    code = "import sys, rdlm; rdlm.{}; print('jax' in sys.modules)"
    for room, loaded in (("config", "False"), ("exits", "True")):
        command = [sys.executable, "-c", code.format(room)]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == loaded
