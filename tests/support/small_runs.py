"""Small run folders with random parameters, of a text and of a task."""

import jax

import rdlm
from rdlm.checkpoint import save_parameters
from rdlm.config import DataConfig, ModelConfig, RunConfig
from rdlm.data import Reading, Recipe
from rdlm.data.prepare import Corpus, build, cut_files, find_files
from rdlm.tokenizer import Tokenizer

SHAPE = {
    "embed_dim": 16, "num_heads": 2, "mlp_dim": 24, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1,
    "max_length": 40, "mean_recurrence": 4, "backprop_depth": 2,
}  # fmt: skip
TEXTS = [f"{i} The capital of land {i} is city {i % 7}; its river is {i * i} km long.\n" for i in range(40)]


def saved(folder, vocab, run, tokenizer=None, **shape):
    """A run folder with random parameters; shape: what differs from SHAPE."""
    model = ModelConfig(vocab_size=vocab, **{**SHAPE, **shape})
    params = jax.jit(lambda key: rdlm.init_params(model, key))(jax.random.key(0))
    meta = {} if tokenizer is None else {"tokenizer": tokenizer.hash}
    save_parameters(folder, params, RunConfig(model=model, **run), meta, step=7)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    return folder


def prepared(base, fraction):
    (base / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (base / f"texts/{i}.txt").write_text(text)
    recipe, tokenizer = Recipe(24, validation_fraction=fraction, reading=Reading()), Tokenizer.bytes_only()
    corpus = Corpus("files", "texts", cut_files(find_files([str(base / "texts")]), recipe.reading, 10**6))
    build(base / "data", corpus, recipe, tokenizer, processes=1, say=lambda line: None)
    data = DataConfig(prepared=(str(base / "data"),), tokenizer_size=tokenizer.vocab_size, sequence_length=24,
                      batch_size=2)  # fmt: skip
    return saved(base / "text_run", tokenizer.vocab_size, {"data": data}, tokenizer)
