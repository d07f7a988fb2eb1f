"""One table of tensor names and layouts, used in both directions.

A tensor of the reference becomes ours by: split into axes, reorder the first of them (attention heads only), permute,
reshape. Each of these has an obvious inverse, so the table is written once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rdlm.config import ModelConfig
from rdlm.model.blocks import rotary_frequencies

PREFIXES = ("_orig_mod.", "_original_module.", "module.", "model.")
"""What wrappers put before every name: compiling, the reference's training, data parallelism, a module that owns it."""

ROTARY = "freqs_cis"
"""The reference's buffer of rotary tables: derived, so ignored on load and recomputed on save."""


class Entry(NamedTuple):
    """One tensor: path in our tree, shape on the reference's side, and the way between the layouts."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    split: tuple[int, ...]
    permute: tuple[int, ...]
    order: tuple[int, ...] | None = None


def table(config: ModelConfig) -> dict[str, Entry]:
    """Every parameter of a model: the reference's name -> Entry. Torch matrices are (out, in), ours (in, out)."""
    D, F, V = config.embed_dim, config.mlp_dim, config.rows
    H, K, Q = config.num_heads, config.kv_heads, config.head_dim
    G = H // K
    heads = H + 2 * K
    # The reference stacks all query heads, all keys, all values; our columns go by key head: its G query heads, its
    # key, its value (see rdlm.model.blocks.SelfAttention).
    order = tuple(h for k in range(K) for h in (*range(k * G, (k + 1) * G), H + k, H + K + k))

    def plain(*path: str, shape: tuple[int, ...]) -> Entry:
        return Entry(path, shape, shape, shape, tuple(range(len(shape))))

    def matrix(*path: str, out: int, inner: int) -> Entry:
        return Entry(path, (out, inner), (inner, out), (out, inner), (1, 0))

    entries = {"transformer.wte.weight": plain("wte", shape=(V, D))}
    if not config.tie_embeddings:
        entries["lm_head.weight"] = plain("head", shape=(V, D))
    entries["transformer.adapter.weight"] = Entry(("adapter",), (D, 2 * D), (2, D, D), (D, 2, D), (1, 2, 0))
    entries["transformer.ln_f.weight"] = plain("ln_f", "scale", shape=(D,))
    stacks = (
        ("prelude", "prelude", config.prelude_layers),
        ("core_block", "core", config.core_layers),
        ("coda", "coda", config.coda_layers),
    )
    for theirs, ours, count in stacks:
        for i in range(count):
            name, block = f"transformer.{theirs}.{i}.", f"{ours}_{i}"
            for norm in ("norm_1", "norm_2", "norm_3", "norm_4"):
                entries[f"{name}{norm}.weight"] = plain(block, norm, "scale", shape=(D,))
            entries[f"{name}attn.Wqkv.weight"] = Entry(
                (block, "attn", "qkv"), (heads * Q, D), (D, heads * Q), (heads, Q, D), (2, 0, 1), order
            )
            if config.qk_bias:
                entries[f"{name}attn.qk_bias"] = Entry(
                    (block, "attn", "qk_bias"), (2, 1, H, Q), (2, H, Q), (2, 1, H, Q), (0, 1, 2, 3)
                )
            entries[f"{name}attn.proj.weight"] = matrix(block, "attn", "proj", out=D, inner=H * Q)
            entries[f"{name}mlp.fc.weight"] = Entry((block, "mlp", "fc"), (2 * F, D), (2, D, F), (2, F, D), (0, 2, 1))
            entries[f"{name}mlp.proj.weight"] = matrix(block, "mlp", "proj", out=D, inner=F)
    return entries


def to_ours(x: np.ndarray, entry: Entry) -> np.ndarray:
    """The reference's tensor in our layout; bits unchanged."""
    x = x.reshape(entry.split)
    if entry.order is not None:
        x = x[np.array(entry.order)]
    return np.ascontiguousarray(x.transpose(entry.permute)).reshape(entry.ours)


def to_theirs(x: np.ndarray, entry: Entry) -> np.ndarray:
    """Our tensor in the reference's layout; bits unchanged."""
    x = x.reshape([entry.split[axis] for axis in entry.permute]).transpose(np.argsort(entry.permute))
    if entry.order is not None:
        x = x[np.argsort(np.array(entry.order))]
    return np.ascontiguousarray(x).reshape(entry.shape)


def bare(name: str) -> str:
    """`name` without the wrappers of a raw training checkpoint."""
    while name.startswith(PREFIXES):
        name = name[name.index(".") + 1 :]
    return name


def rotary_buffer(config: ModelConfig) -> np.ndarray:
    """The reference's freqs_cis: f32 [1, max_length, 1, Q/2, 2], cos and sin of position * rope_base^(-2i/Q)."""
    # Angles are rounded to f32, as in the reference, whose table of cosines inherits that.
    angle = np.outer(np.arange(config.max_length, dtype=np.float32), rotary_frequencies(config)).astype(np.float64)
    return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)[None, :, None]
