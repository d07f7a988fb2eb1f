"""--init: a run starts from the weights of any folder, as its model, and goes on without the folder."""

import dataclasses
import importlib
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from foreign_tokenizers import save as save_tokenizer
from golden_cases import GOLDEN
from small_runs import saved
from training_cases import cut_short, losses

import rdlm
from rdlm import sharding
from rdlm.checkpoint import Checkpoints, as_abstract, read_config, save_parameters, write_config
from rdlm.config import PRESETS, InputError, LossConfig, MeshConfig, OptimizerConfig
from rdlm.data import Recipe, open_data
from rdlm.data.prepare import Corpus, build, cut_files, find_files, prepare_embedded
from rdlm.evaluation.depth import depth_curve
from rdlm.optim import optimizer
from rdlm.run import find
from rdlm.tokenizer import Tokenizer
from rdlm.train import Trainer, init_state, state_shardings
from rdlm.weights import Weights, begin_from, identified

FOLDERS = [f"families/{path.name}" for path in sorted((GOLDEN / "families").iterdir())] + ["A", "G_gqa"]
NANO = PRESETS["nano"]
SHORT = dataclasses.replace(NANO.data, sequence_length=24, batch_size=8, tokenizer_size=40)
ENTRIES = 40
"""Of the tokenizer of `data`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A little text prepared with a tokenizer of few entries, which lies beside it in tokenizer/."""
    base = tmp_path_factory.mktemp("data")
    (base / "texts").mkdir()
    for i in range(40):
        (base / f"texts/{i}.txt").write_text(f"the cat number {i} sat on the mat by the old oak {i * i} times\n" * 3)
    save_tokenizer("t5", base / "tokenizer")
    save_tokenizer("bert", base / "other_tokenizer")
    prepare(base, base / "tokenizer", "prepared")
    prepare(base, base / "other_tokenizer", "other")
    return base


def prepare(base, tokenizer, name):
    recipe = Recipe(24, validation_fraction=0.2)
    corpus = Corpus("files", "texts", cut_files(find_files([str(base / "texts")]), recipe.reading, 10**6))
    build(base / name, corpus, recipe, Tokenizer.load(tokenizer), processes=1, say=lambda line: None)


@pytest.fixture(scope="module")
def folders(data, tmp_path_factory):
    """folders(NAME): a golden model with the tokenizer of `data`."""
    base = tmp_path_factory.mktemp("models")

    def folder(name):
        target = base / name
        if not target.exists():
            target.mkdir(parents=True)
            for file in ("config.json", "model.safetensors"):
                shutil.copy(GOLDEN / name / file, target)
            for file in (data / "tokenizer").iterdir():
                shutil.copy(file, target)
        return target

    return folder


def run_of(init, texts, run_dir, **changes):
    """A run of 4 steps from a folder."""
    base = dataclasses.replace(
        NANO,
        data=dataclasses.replace(SHORT, prepared=(str(texts / "prepared"),)),
        checkpoint=dataclasses.replace(NANO.checkpoint, every=2),
        evaluation=dataclasses.replace(NANO.evaluation, depths=(1,)),
        run_dir=str(run_dir),
        init=str(init),
        steps=4,
    )
    return begin_from(dataclasses.replace(base, **changes))


def first_parameters(run, devices):
    """As the trainer places them on so many devices."""
    mesh = sharding.make_mesh(MeshConfig(1, devices), run.model, jax.devices()[:devices])
    shapes, shardings = state_shardings(run, optimizer(run.optimizer, run.steps), mesh)
    weights = Weights(run)
    return weights.load(as_abstract(shapes.params, shardings.params), identified(run, weights).weights_digest)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_family_is_placed_as_it_is_stored(name, folders, data, tmp_path):
    run = run_of(folders(name), data, tmp_path / "run")
    stored, config = rdlm.load_huggingface(folders(name))
    placed = first_parameters(run, 8)
    jax.tree.map(np.testing.assert_array_equal, placed, stored)
    assert any(len(x.sharding.device_set) == 8 and not x.is_fully_replicated for x in jax.tree.leaves(placed))
    assert run.model == find(folders(name)).config, "the model that is evaluated and generates"
    assert (run.model.vocab_size, run.model.rows) == (ENTRIES, config.rows)
    looped = config.loop.injection == "none"
    assert run.recurrence.scheme == ("fixed" if looped else NANO.recurrence.scheme)
    assert run.evaluation.depths[-1] == (config.mean_recurrence if looped else 1)


def test_a_plain_model_that_is_looped_gets_a_gradient_in_every_recurrence(folders, data, tmp_path):
    run = run_of(folders("families/qwen3"), data, tmp_path / "run")
    assert (run.model.mean_recurrence, run.model.backprop_depth) == (1, 1)
    looped = begin_from(dataclasses.replace(run, evaluation=NANO.evaluation), mean_recurrence=4)
    assert (looped.model.mean_recurrence, looped.model.backprop_depth) == (4, 4)
    assert (looped.recurrence.scheme, looped.evaluation.depths) == ("fixed", (1, 2, 4))


@pytest.fixture(scope="module")
def whole(folders, data, tmp_path_factory):
    """A run of four steps from a plain model on eight devices, and the folder that it began from."""
    base = tmp_path_factory.mktemp("whole")
    init = shutil.copytree(folders("families/llama"), base / "model")
    assert Trainer(run_of(init, data, base / "run"), lambda line: None).run() == 0
    return base / "run", init


def evaluated(init, run, depth):
    """The loss of the first batch as evaluation has it."""
    model, batch = find(init), open_data(run.data, seed=run.seed).train.batch(0)
    sizes = np.zeros(model.config.rows, np.int32)
    return depth_curve(model.params, model.config, [batch], (depth,), sizes).nats[0]


@pytest.mark.slow
def test_the_first_loss_is_that_of_evaluation(whole, data):
    folder, init = whole
    assert losses(folder)[0][1] == pytest.approx(evaluated(init, read_config(folder), 1), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ouro", "run"])
def test_so_is_that_of_looped_models_and_runs_on_one_device(name, folders, data, tmp_path, monkeypatch):
    if name == "run":
        init = saved(tmp_path / "source", ENTRIES, {"data": SHORT}, Tokenizer.load(data / "tokenizer"))
        # Evaluation starts from other noise.
        monkeypatch.setattr("rdlm.train.step.step_keys", lambda seed, step: (jax.random.key(0), jax.random.key(0)))
    else:
        init = folders("families/ouro")
    fixed = dataclasses.replace(NANO.recurrence, scheme="fixed")
    run = run_of(init, data, tmp_path / "run", steps=1, recurrence=fixed)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    assert Trainer(run, lambda line: None).run() == 0
    expected = evaluated(init, run, run.model.mean_recurrence)
    assert losses(tmp_path / "run")[0][1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_it_resumes_without_the_folder(whole, folders, data, tmp_path):
    run, gone, says = shutil.copytree(whole[0], tmp_path / "run"), tmp_path / "gone", []
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "loss_by_depth.json").unlink()
    written = dataclasses.replace(read_config(run), init=str(gone))
    write_config(run, written)  # as if it had begun there
    assert Trainer(run_of(gone, data, run), says.append).run() == 0
    np.testing.assert_allclose(losses(run), losses(whole[0]), atol=1e-5, rtol=0)
    assert f"resuming {run} at step 2" in says[0]
    curve = find(run).evaluate((1,)).nats[0]
    assert curve == pytest.approx(json.loads((run / "loss_by_depth.json").read_text())["1"], abs=1e-5)


def test_weights_are_known_by_their_bits(folders, data, tmp_path):
    init, other = folders("families/llama"), folders("families/qwen3")
    run = run_of(init, data, tmp_path / "run")
    run = identified(run, Weights(run))
    save_parameters(tmp_path / "run", rdlm.load_huggingface(init)[0], run, {"tokenizer": None}, step=1)
    moved = shutil.copytree(init, tmp_path / "moved")
    Trainer(run_of(moved, data, tmp_path / "run"))
    with pytest.raises(InputError, match=rf"holds a run that began from the weights of {init} \(digest"):
        Trainer(run_of(other, data, tmp_path / "run"))
    with pytest.raises(InputError, match=rf"holds a run that began from the weights of {init} \(digest"):
        Trainer(dataclasses.replace(run_of(init, data, tmp_path / "run"), init="", weights_digest=""))
    assert Weights(run_of(moved, data, tmp_path / "new")).digest == run.weights_digest


def test_the_average_of_a_run_is_where_another_begins(data, tmp_path):
    source = dataclasses.replace(NANO, data=SHORT, optimizer=OptimizerConfig(ema_decay=0.5))
    state = jax.jit(lambda: init_state(source, optimizer(source.optimizer, 9)))()
    Tokenizer.load(data / "tokenizer").save(tmp_path / "tokenizer")
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(2, state.params, state.optimizer, {"tokenizer": None})
    write_config(tmp_path, source)
    digests = set()
    for ema in (False, True):
        run = run_of(tmp_path, data, tmp_path / "run", init_ema=ema)
        placed = first_parameters(run, 8)
        jax.tree.map(np.testing.assert_array_equal, placed, find(tmp_path, ema=ema).params)
        assert bool(np.any(placed["wte"])) != ema, "the average is zero before the first step"
        digests.add(Weights(run).digest)
    assert len(digests) == 2
    cut_short(tmp_path / "checkpoints" / "2", "params")
    with pytest.raises(InputError, match=r"checkpoint .*/2: damaged .*there is no other: restore it from a copy"):
        first_parameters(run_of(tmp_path, data, tmp_path / "run"), 8)


def with_tokens(folder, target, special=True, **config):
    """A copy of a tokenizer with two more tokens."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    (backend.add_special_tokens if special else backend.add_tokens)(["<|user|>", "<|end|>"])
    target.mkdir()
    backend.save(str(target / "tokenizer.json"))
    given = json.loads((folder / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(given | config))
    return Tokenizer.load(target)


@pytest.mark.parametrize("name", ["families/llama", "run"])
def test_special_tokens_that_are_added_get_rows(name, folders, data, tmp_path):
    shutil.copytree(data / "texts", tmp_path / "texts")
    added = with_tokens(data / "tokenizer", tmp_path / "tokenizer", eos_token="<|end|>")
    prepare(tmp_path, tmp_path / "tokenizer", "prepared")
    own = Tokenizer.load(data / "tokenizer")
    init = saved(tmp_path / "source", ENTRIES, {"data": SHORT}, own) if name == "run" else folders(name)
    run, stored = run_of(init, tmp_path, tmp_path / "run"), find(init).params
    assert run.model.vocab_size == run.data.tokenizer_size == added.vocab_size == ENTRIES + 2
    placed = first_parameters(run, 8)
    rows = len(stored["wte"])
    np.testing.assert_array_equal(placed["wte"][:rows], stored["wte"])
    assert (len(placed["wte"]), len(placed["wte"]) - rows) == (run.model.rows, 2 if name == "run" else 0)
    mean = np.broadcast_to(np.asarray(stored["wte"]).mean(0), (run.model.rows - rows, run.model.embed_dim))
    np.testing.assert_allclose(placed["wte"][rows:], mean, atol=1e-6)
    what = "2 rows are added, each the mean of the others" if name == "run" else "they take rows that were padding"
    assert f"special tokens beyond the folder's: <|user|>, <|end|>: {what}" in str(Weights(run))
    Trainer(run)


def test_tokenizers_that_differ_otherwise_are_told_apart(data, tmp_path):
    own, other = Tokenizer.load(data / "tokenizer"), Tokenizer.load(data / "other_tokenizer")
    added = with_tokens(data / "tokenizer", tmp_path / "added")
    assert added.added_to(own) == ["<|user|>", "<|end|>"]
    assert own.added_to(own) == []
    assert own.added_to(added) is None, "fewer tokens"
    assert other.added_to(own) is None, "another vocabulary"
    assert with_tokens(data / "tokenizer", tmp_path / "words", special=False).added_to(own) is None, "words"
    assert with_tokens(data / "tokenizer", tmp_path / "end", eos_token="<s>").added_to(own) is None, "another end"


# What does not fit is refused in one line, before anything is written.


def damaged(case, source, tmp_path):
    """A copy of a folder with one thing wrong; its path."""
    folder = shutil.copytree(source, tmp_path / case)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if case == "not_json":
        config.write_text("{")
    elif case == "other_kind":
        config.write_text('{"model_type": "gpt2"}')
    elif case == "wider":
        config.write_text(config.read_text().replace('"hidden_size": 48', '"hidden_size": 64'))
    elif case == "adapter":
        config.rename(folder / "adapter_config.json")
    elif case == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif case == "missing_shard":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
    elif case == "no_tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "large_tokenizer":
        save_tokenizer("llama2", folder)
    else:
        assert case == "file"
        return weights
    return folder


DAMAGED = {
    "not_json": "not JSON",
    "other_kind": "model_type = 'gpt2': must be one of",
    "wider": "but config.json asks for",
    "adapter": "has no config.json, so it is not (yet) a run folder; it holds an adapter",
    "cut": "cut off, ends at byte",
    "missing_shard": "model-00001-of-00002.safetensors: missing; the index places 1 tensors there",
    "no_tokenizer": "has no tokenizer; put the model's tokenizer.json into",
    "large_tokenizer": "entries, the model only 160, so it is another model's",
    "file": "is a file; give a run folder or a Hugging Face folder",
}

WORDS = {
    "model.embed_dim = 64: {init} has 48; leave it out": ["--model.embed-dim", "64"],
    "model.vocab_size = 41: {init} has 40; leave it out": ["--model.vocab-size", "41"],
    "model.num_kv_heads = 1: {init} has 2": ["--model.num-kv-heads", "1"],
    "model.norm_eps = 0.1: {init} has": ["--model.norm-eps", "0.1"],
    "model.backprop_depth = 4: must be at most model.mean_recurrence = 1": ["--model.backprop-depth", "4"],
    "data.sequence_length = 24: must be at most model.max_length = 16": ["--model.max-length", "16"],
    "other: was prepared with another tokenizer than the model's; prepare the text again, with prepare_data.py "
    "--tokenizer {init}": ["--data.prepared", "{data}/other"],
    "init_ema = True: must be false: {init}, a Hugging Face folder, has no average": ["--init-ema", "True"],
    "weights_digest = 'abc': '{init}' holds other weights": ["--weights-digest", "abc"],
    "tune.lora_alpha = 32.0: needs tune.lora_rank": ["--tune.lora-alpha", "32"],
    "--tune.only = (): name the parts that learn": ["--tune.only"],
}


@pytest.fixture
def train(command, data, tmp_path):
    """train(FOLDER, ...) -> what `train.py finetune --init FOLDER ...` says as it refuses."""

    def refusal(init, *words):
        given = [word.format(data=data) for word in map(str, words)]
        given += [] if "--data.prepared" in given else ["--data.prepared", data / "prepared"]
        start = ["--init", init] if init else []
        code, out, err = command(
            "train", "finetune", *start, "--data.sequence-length", 24, "--run-dir", tmp_path / "run", *given
        )
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert not (tmp_path / "run").exists()
        return err

    return refusal


@pytest.mark.parametrize("case", DAMAGED)
def test_a_folder_that_is_damaged_or_of_another_kind_is_refused(case, train, folders, tmp_path):
    assert DAMAGED[case] in train(damaged(case, folders("families/llama"), tmp_path))


@pytest.mark.parametrize("message", WORDS)
def test_what_does_not_fit_the_folder_is_refused(message, train, folders, data):
    init = folders("families/llama")
    assert message.format(init=init, data=data) in train(init, *WORDS[message])


def test_other_starts_that_are_refused(train, folders, data, tmp_path):
    assert f"init = '{tmp_path / 'nowhere'}': no such folder" in train(tmp_path / "nowhere")
    assert "init = 'gs://bucket/model': is a URL" in train("gs://bucket/model")
    assert "finetune: which model? Give its folder with --init FOLDER" in train("")
    assert "--init-ema: only with --init FOLDER" in train("", "--init-ema", "True")
    assert "it holds prepared data" in train(data / "prepared")
    untied, scheme = folders("families/olmo2"), "poisson-truncated-full"
    assert f"recurrence.scheme = '{scheme}': must be one without n > 0" in train(untied, "--recurrence.scheme", scheme)
    depth = ["--model.mean-recurrence", 3, "--model.backprop-depth", 2]
    assert "model.backprop_depth = 2: must be model.mean_recurrence = 3, or embedding" in train(untied, *depth)
    write_config(tmp_path, NANO)
    assert "kept no moving average" in train(tmp_path, "--init-ema", "True")
    assert "has no complete checkpoint yet" in train(tmp_path)


def test_fields_that_change_no_tensor_may_differ(folders, data, tmp_path):
    run = run_of(folders("families/retro_llama"), data, tmp_path / "run")
    depth = {"mean_recurrence": 9, "backprop_depth": 3}
    length = {"max_length": 200, "attention_window": 7, "rope_base": 1e6}
    stored = {"padded_vocab_size": 176, "compute_dtype": "bfloat16", "param_dtype": "bfloat16"}
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **depth, **length, **stored))
    placed = first_parameters(run, 1)
    assert {str(x.dtype) for x in jax.tree.leaves(placed)} == {"bfloat16"}
    assert len(placed["wte"]) == len(placed["head"]) == 176
    headline = Trainer(run)._headline()
    assert "\n  model.max_length = 200 (folder: " in headline
    assert "model.embed_dim" not in headline
    fewer = dataclasses.replace(run, model=dataclasses.replace(run.model, padded_vocab_size=48))
    with pytest.raises(InputError, match=r"model.padded_vocab_size = 48: .* has 160"):
        Trainer(fewer)


def test_the_embedded_corpus_is_prepared_with_the_tokenizer_of_the_folder(folders, data, nano_data, tmp_path):
    texts = importlib.import_module("rdlm.data.prepare.embedded")
    own = {"data": dataclasses.replace(SHORT, folder=str(tmp_path / "data"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_documents", lambda data: [f"the cat number {i} sat on the mat" * 9 for i in range(99)])
        trainer = Trainer(run_of(folders("families/llama"), data, tmp_path / "run", **own))
    assert trainer.tokenizer.hash == Tokenizer.load(data / "tokenizer").hash
    # One that was trained on this corpus has been used to prepare it already.
    nano = dataclasses.replace(NANO.data, folder=str(nano_data), batch_size=8, validation_fraction=0.1)
    there, before = prepare_embedded(nano), sorted(nano_data.glob("factbook-*"))
    init = saved(tmp_path / "source", 384, {"data": SHORT}, Tokenizer.load(there / "tokenizer"), max_length=64)
    Trainer(run_of(init, data, tmp_path / "other", data=nano))
    assert sorted(nano_data.glob("factbook-*")) == before


def test_a_rollback_to_the_start_begins_from_the_folder_again(folders, data, tmp_path):
    init = shutil.copytree(folders("families/llama"), tmp_path / "model")
    trainer, says = Trainer(run_of(init, data, tmp_path / "run"), None), []
    trainer.say = says.append
    with Checkpoints(tmp_path / "run", 1) as trainer.checkpoints:
        state, _ = trainer.restore(rollback=True)
        jax.tree.map(np.testing.assert_array_equal, state.params, rdlm.load_huggingface(init)[0])
        assert (int(state.step), says) == (0, [f"starting with the parameters of {init}"])
        shutil.rmtree(init)
        with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
            trainer.restore(rollback=True)


def test_weights_that_changed_before_the_first_checkpoint_are_refused(folders, data, tmp_path):
    init = shutil.copytree(folders("families/llama"), tmp_path / "model")
    run = run_of(init, data, tmp_path / "run")
    run = identified(run, Weights(run))
    shutil.copy(damaged("cut", init, tmp_path) / "model.safetensors", init)
    with pytest.raises(InputError, match="cut off"):
        run_of(init, data, tmp_path / "run")
    shutil.copy(folders("families/llama") / "model.safetensors", init)
    with (init / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    mesh = sharding.make_mesh(MeshConfig(1, 1), run.model, jax.devices()[:1])
    shapes, shardings = state_shardings(run, optimizer(run.optimizer, run.steps), mesh)
    with pytest.raises(InputError, match=r"other weights \(digest \w+\) than those that the run began from \(\w+\)"):
        Weights(run).load(as_abstract(shapes.params, shardings.params), run.weights_digest)


@pytest.mark.slow
def test_the_weights_of_the_start_teach_a_run_and_a_resumed_one(folders, data, tmp_path):
    """A new retrofit says at every depth what it says at one: its first loss against itself is zero."""
    source, init = folders("families/olmo2"), tmp_path / "deep"
    params, config = rdlm.retrofit(*rdlm.load_huggingface(source), prelude=1, core=1, coda=1)
    rdlm.save_huggingface(init, params, config)
    for file in (data / "tokenizer").iterdir():
        shutil.copy(file, init)
    run = run_of(init, data, tmp_path / "run", mesh=MeshConfig(2, 4))
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, mean_recurrence=2, backprop_depth=2),
        loss=LossConfig(teacher="start", teacher_share=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    )
    assert Trainer(run, lambda line: None).run() == 0
    before = losses(tmp_path / "run")
    assert before[0][1] < 1e-5
    # Adam divides even a gradient of rounding errors by its own size: the student has moved, the teacher has not.
    assert before[1][1] > 1e-4
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    (tmp_path / "run/loss_by_depth.json").unlink()
    assert Trainer(run, lambda line: None).run() == 0
    np.testing.assert_allclose(losses(tmp_path / "run"), before, atol=1e-5, rtol=0)
