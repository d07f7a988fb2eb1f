"""GGUF files of Llama's type, written with the package gguf as llama.cpp's converter writes them."""

import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import load_file
from tokenizers import models, pre_tokenizers, trainers

TEXTS = ["The year 2024 had 366 days, 2024!", "def f(n):\n    return n  # it's 10", "naïve café, 北京 100%"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ADD = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}


def write(path, folder, tokenizer, *, kind="F32", change=None, tensors=None, architecture="llama"):
    """The model of a Hugging Face folder as `path`; returns it.

    Args:
      path: file to write.
      folder: with config.json and model.safetensors, in float32.
      tokenizer: metadata, see `byte_level` and `sentence_piece`.
      kind: of the matrices; vectors are F32.
      change: metadata to set; None removes.
      tensors: to set, by their names in the file; None removes.
      architecture: name in the file.
    """
    fields = json.loads((Path(folder) / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata(fields) | tokenizer | (change or {})).items():
        if value is not None:
            getattr(writer, ADD[type(value)])(key, value)
    for name, x in (stored(folder, fields) | (tensors or {})).items():
        if x is None:
            continue
        dtype = gguf.GGMLQuantizationType[kind if x.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(x, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(fields):
    """Of the model."""
    return {
        "general.name": "Toy",
        "llama.block_count": fields["num_hidden_layers"],
        "llama.context_length": fields["max_position_embeddings"],
        "llama.embedding_length": fields["hidden_size"],
        "llama.feed_forward_length": fields["intermediate_size"],
        "llama.attention.head_count": fields["num_attention_heads"],
        "llama.attention.head_count_kv": fields["num_key_value_heads"],
        "llama.attention.key_length": fields["head_dim"],
        "llama.attention.value_length": fields["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": fields["rms_norm_eps"],
        "llama.rope.freq_base": float(fields["rope_theta"]),
        "llama.rope.dimension_count": fields["head_dim"],
        "llama.vocab_size": fields["vocab_size"],
    }


def stored(folder, fields):
    """Tensors under their names in a GGUF file; the rows of queries and keys go by pairs that rotary turns."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, fields["num_hidden_layers"])
    found = {}
    for theirs, x in load_file(Path(folder) / "model.safetensors").items():
        name = names.get_name(theirs, try_suffixes=(".weight",))
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        found[name] = pairs(x, fields[heads]) if heads else x
    scaling = fields.get("rope_scaling")
    if scaling:
        found["rope_freqs.weight"] = divisors(fields, scaling)
    return found


def pairs(x, heads):
    """Rows of every head from (all first halves, all second halves) to pairs."""
    halves = x.reshape(heads, 2, -1, x.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(x.shape)


def divisors(fields, scaling):
    """What Llama 3 divides each rotary frequency by: 1 for short waves, the factor for long ones, between them both."""
    low, high, length = (
        scaling[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    found = []
    for i in range(0, fields["head_dim"], 2):
        turns = length / (2 * np.pi * fields["rope_theta"] ** (i / fields["head_dim"]))
        kept = min(max((turns - low) / (high - low), 0), 1)
        found.append(1 / ((1 - kept) / scaling["factor"] + kept))
    return np.array(found, np.float32)


def byte_level(pre, size=300, **more):
    """Metadata of a BPE on bytes, whose merges join digits too."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in SPECIAL else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def sentence_piece(pieces, **more):
    """Metadata of a BPE on characters; of two pieces the earlier one is the better merge. No bytes."""
    tokens = ["<unk>", "<s>", "</s>", *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *(-float(i) for i in range(len(pieces)))],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *(NORMAL for _ in pieces)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }
