"""GGUF files of Llama's type: values, rotary layout, dtypes, tokenizers, and what is refused."""

import itertools
import json
import re
import sys

import jax
import numpy as np
import pytest
from golden_cases import GOLDEN
from safetensors.numpy import load_file, save_file

from rdlm.config import InputError
from rdlm.hf import load_huggingface
from rdlm.hf.gguf import convert_gguf, is_gguf
from rdlm.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'rdlm[gguf]'")
import gguf_files  # noqa: E402

GOLDEN_LLAMA = GOLDEN / "families/llama"
PIECES = [*"▁theca12", "▁t", "th", "he", "▁th", "▁the", "at", "▁ca", "the", "ca"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A Hugging Face folder of two layers without a tokenizer, whose matrices can be quantised in blocks of 32."""
    D, H, K, F, V = 64, 4, 2, 96, 320
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (D,), layer + "post_attention_layernorm": (D,)}
        shapes |= {f"{layer}self_attn.{x}_proj": (rows, D) for x, rows in (("q", D), ("k", D // 2), ("v", D // 2))}
        shapes |= {layer + "self_attn.o_proj": (D, D), layer + "mlp.down_proj": (D, F)}
        shapes |= {f"{layer}mlp.{x}_proj": (F, D) for x in ("gate", "up")}
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("toy")
    # Small fractions, which every dtype holds.
    tensors = {f"{n}.weight": (random.integers(-31, 32, s) / 64).astype(np.float32) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {
        "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D // H, "vocab_size": V,
        "intermediate_size": F, "num_hidden_layers": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "tie_word_embeddings": False, "model_type": "llama",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def converted(tmp_path, folder, tokenizer, **options):
    file = gguf_files.write(tmp_path / "model.gguf", folder, tokenizer, **options)
    convert_gguf(file, tmp_path / "out")
    return tmp_path / "out"


def test_a_published_llama_comes_back_bit_for_bit(tmp_path):
    """Its config too: frequencies scaled as in Llama 3, keys shared by queries, tied embeddings."""
    out = converted(tmp_path, GOLDEN_LLAMA, gguf_files.sentence_piece(PIECES))
    before, after = load_file(GOLDEN_LLAMA / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], name)
    assert load_huggingface(out)[1] == load_huggingface(GOLDEN_LLAMA)[1]


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32")])
def test_halves_keep_their_dtype(kind, dtype, toy, tmp_path):
    params, config = load_huggingface(converted(tmp_path, toy, gguf_files.byte_level("smollm"), kind=kind))
    expected, _ = load_huggingface(toy)
    assert config.param_dtype == dtype
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {dtype}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), b), params, expected)


def test_a_norm_that_a_half_cannot_hold_stays_wide(toy, tmp_path):
    wide = np.full(64, 1 + 2**-20, np.float32)
    out = converted(tmp_path, toy, gguf_files.byte_level("smollm"), kind="BF16", tensors={"output_norm.weight": wide})
    params, _ = load_huggingface(out)
    np.testing.assert_array_equal(params["ln_f"]["scale"], wide)
    assert params["wte"].dtype == "bfloat16"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_quantised_values_become_float32(kind, toy, tmp_path):
    out = load_file(converted(tmp_path, toy, gguf_files.byte_level("smollm"), kind=kind) / "model.safetensors")
    quantised = gguf.GGMLQuantizationType[kind]
    for name, x in load_file(toy / "model.safetensors").items():
        # Blocks lie within rows, so the order of rows does not matter.
        expected = x if x.ndim == 1 else gguf.dequantize(gguf.quantize(x, quantised), quantised)
        assert out[name].dtype == np.float32
        np.testing.assert_array_equal(out[name], expected, name)


# Tokenizers


def tokens(tmp_path, toy, text, tokenizer):
    found = Tokenizer.load(converted(tmp_path, toy, tokenizer))
    ids = found.encode(text, bos=False)
    assert found.decode(ids) == text
    return [found.decode([i]) for i in ids]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["2024", "!", "\n", "(", "a", "'", "S"]),
        ("smollm", ["2", "0", "2", "4", "!", "\n", "(", "a", "'", "S"]),
        ("llama-bpe", ["202", "4", "!\n", "(a", "'S"]),
        ("qwen2", ["2", "0", "2", "4", "!\n", "(a", "'S"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(pre, expected, toy, tmp_path):
    tokenizer = gguf_files.byte_level(pre, size=259)  # bytes
    for first, second in (("2", "0"), ("20", "2"), ("202", "4"), ("!", "Ċ"), ("(", "a"), ("'", "S")):
        tokenizer["tokenizer.ggml.merges"] += [f"{first} {second}"]
        tokenizer["tokenizer.ggml.tokens"] += [first + second]
        tokenizer["tokenizer.ggml.token_type"] += [gguf_files.NORMAL]
    assert tokens(tmp_path, toy, "2024!\n(a'S", tokenizer) == expected


def test_chats_special_tokens_and_ends(toy, tmp_path):
    tokenizer = gguf_files.byte_level("smollm", eot_token_id=0)
    out = converted(tmp_path, toy, tokenizer)
    found, chat = Tokenizer.load(out), [{"role": "user", "content": "it's <|im_end|>"}]
    ids = found.encode_chat(chat)
    assert found.decode(ids, skip_special=False) == (
        "<|im_start|>user\nit's <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert [i for i in ids if i < 3] == [1, 2, 1]  # what a message spells out is text
    assert found.end_ids == (0, 2)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_tokens_that_their_makers_defined_are_found_in_text(toy, tmp_path):
    tokenizer = gguf_files.byte_level("smollm")
    tokenizer["tokenizer.ggml.tokens"] += ["<tool>"]
    tokenizer["tokenizer.ggml.token_type"] += [gguf_files.USER_DEFINED]
    assert tokens(tmp_path, toy, "a<tool>b", tokenizer) == ["a", "<tool>", "b"]


@pytest.mark.parametrize(
    ("pre", "says", "begins"), [("smollm", None, False), ("llama-bpe", None, True), ("gpt-2", True, True)]
)
def test_texts_begin_as_the_file_says(pre, says, begins, toy, tmp_path):
    out = converted(tmp_path, toy, gguf_files.byte_level(pre, add_bos_token=says))
    assert (Tokenizer.load(out).encode("The").tolist()[0] == 1) is begins
    assert (gguf_files.tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode("The").ids[0] == 1) is begins


def merged(text, pieces):
    """SentencePiece's rule: of all neighbours that are a piece together, join the best; of equal ones the first."""
    parts = list(text)
    while True:
        pairs = [(pieces.index(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in pieces]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


@pytest.mark.parametrize("text", ["the cat", "that the heat", "a  thetch 12", "tthehe"])
@pytest.mark.parametrize("prefix", [None, False])
def test_scores_decide_as_in_sentence_piece(text, prefix, toy, tmp_path):
    out = converted(tmp_path, toy, gguf_files.sentence_piece(PIECES, add_space_prefix=prefix))
    found = Tokenizer.load(out)
    written = ("▁" if prefix is None else "") + text.replace(" ", "▁")
    expected = [3 + PIECES.index(part) for part in merged(written, PIECES)]
    assert found.encode(text).tolist() == [1, *expected]
    assert found.decode(expected) == text


def test_unknown_characters_are_bytes(toy, tmp_path):
    tokenizer = gguf_files.sentence_piece([*PIECES, "<0xC3>", "<0xA9>"])
    tokenizer["tokenizer.ggml.token_type"][-2:] = [gguf_files.BYTE] * 2
    found = Tokenizer.load(converted(tmp_path, toy, tokenizer))
    ids = found.encode("thé", bos=False)
    assert ids.tolist()[-2:] == [3 + len(PIECES), 4 + len(PIECES)]
    assert found.decode(ids) == "thé"


# What is refused


def refused(tmp_path, file, *words):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        convert_gguf(file, tmp_path / "out")
    message = str(error.value)
    assert "\n" not in message
    for word in (str(file), *words):
        assert word in message, message
    assert sorted(tmp_path.rglob("*")) == before, "something was left"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"llama.expert_count": 8}, ["llama.expert_count = 8"]),
        ({"llama.attention.sliding_window": 512}, ["llama.attention.sliding_window = 512"]),
        ({"llama.some_new_switch": True}, ["llama.some_new_switch = True"]),
        ({"llama.rope.scaling.type": "yarn"}, ["llama.rope.scaling.type = yarn", "'none'"]),
        ({"llama.rope.dimension_count": 8}, ["llama.rope.dimension_count = 8", "16"]),
        ({"llama.attention.value_length": 32}, ["llama.attention.value_length = 32", "16"]),
        ({"llama.attention.key_length": 32}, ["attention.value_length = 16", "32"]),
        ({"llama.vocab_size": 400}, ["llama.vocab_size = 400", "320"]),
        ({"llama.block_count": None}, ["llama.block_count is missing"]),
        ({"llama.block_count": 3}, ["tensor blk.2.attn_norm.weight is missing"]),
        ({"llama.block_count": 1}, ["tensor blk.1."]),
        ({"llama.block_count": "two"}, ["block_count = 'two'", "type int"]),
        ({"llama.attention.head_count": [4, 2]}, ["attention.head_count = [4, 2]", "type int"]),
        ({"llama.attention.head_count": 0}, ["num_attention_heads = 0"]),
        ({"llama.attention.head_count_kv": 3}, ["num_key_value_heads = 3"]),
        ({"llama.feed_forward_length": 100}, ["ffn_gate.weight", "[96, 64]", "[100, 64]"]),
        ({"split.count": 4}, ["one of 4 parts"]),
        ({"tokenizer.ggml.pre": "tekken"}, ["tokenizer.ggml.pre = 'tekken'", "smollm"]),
        ({"tokenizer.ggml.pre": None}, ["tokenizer.ggml.pre = None"]),
        ({"tokenizer.ggml.model": "bert"}, ["tokenizer.ggml.model = 'bert'"]),
        ({"tokenizer.ggml.tokens": None}, ["with tokens"]),
        ({"tokenizer.ggml.tokens": [str(i) for i in range(321)]}, ["tokens: 321", "320"]),
        ({"tokenizer.ggml.token_type": [1, 1]}, ["token_type: 2 for 300"]),
        ({"tokenizer.ggml.merges": ["a nothing"]}, ["tokenizer.ggml.merges"]),
        ({"tokenizer.ggml.merges": ["alone"]}, ["tokenizer.ggml.merges"]),
        ({"tokenizer.ggml.eos_token_id": None}, ["tokenizer.ggml.eos_token_id is missing"]),
        ({"tokenizer.ggml.eos_token_id": 999}, ["tokenizer.ggml.eos_token_id = 999"]),
        ({"tokenizer.ggml.model": "llama"}, ["tokenizer.ggml.scores: 0 for 300"]),
    ],
    ids=lambda x: next(iter(x.items()))[0] if isinstance(x, dict) else None,
)
def test_metadata_that_say_something_else(change, words, toy, tmp_path):
    file = gguf_files.write(tmp_path / "model.gguf", toy, gguf_files.byte_level("smollm"), change=change)
    refused(tmp_path, file, *words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"token_embd.weight": None}, ["tensor token_embd.weight is missing"]),
        ({"blk.1.attn_k.weight": None}, ["tensor blk.1.attn_k.weight is missing"]),
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, ["tensor blk.0.attn_q.bias has no place"]),
        ({"blk.0.attn_q.weight": np.zeros((32, 64), np.float32)}, ["blk.0.attn_q.weight", "[32, 64]", "[64, 64]"]),
        ({"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}, ["rope_freqs.weight", "Llama 3"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_tensors_that_do_not_fit(tensors, words, toy, tmp_path):
    file = gguf_files.write(tmp_path / "model.gguf", toy, gguf_files.byte_level("smollm"), tensors=tensors)
    refused(tmp_path, file, *words)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "mamba"])
def test_other_architectures_are_named(architecture, toy, tmp_path):
    tokenizer = gguf_files.byte_level("smollm")
    file = gguf_files.write(tmp_path / "model.gguf", toy, tokenizer, architecture=architecture)
    refused(tmp_path, file, f"general.architecture = '{architecture}'", "'llama'")


@pytest.mark.parametrize("kept", [5, 23, 100, 5000, 12_000, -1])
def test_files_that_are_cut_off(kept, toy, tmp_path):
    file = gguf_files.write(tmp_path / "model.gguf", toy, gguf_files.byte_level("smollm"))
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    refused(tmp_path, file, "cut off or damaged", f"{len(whole[:kept]):,} bytes")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", b"{}"])
def test_files_that_are_something_else(content, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert is_gguf(file)
    refused(tmp_path, file, "not a GGUF file")


def test_no_file_and_no_room(toy, tmp_path):
    refused(tmp_path, tmp_path / "none.gguf", "No such file")
    file = gguf_files.write(tmp_path / "model.gguf", toy, gguf_files.byte_level("smollm"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    with pytest.raises(InputError, match="out: exists and is not an empty folder"):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=re.escape("pip install 'rdlm[gguf]'")):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_a_file_is_known_by_its_first_bytes(toy, tmp_path):
    (tmp_path / "blob").write_bytes(b"GGUF...")
    assert is_gguf(tmp_path / "blob")
    assert not is_gguf(toy)
    assert not is_gguf(toy / "config.json")
