"""One table of tensor names and layouts, used in both directions.

A tensor of theirs becomes ours by: split into axes, reorder the first of them, permute, reshape. Each of these has an
obvious inverse, so the table is written once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rdlm.config import InputError, ModelConfig
from rdlm.hf import parcae
from rdlm.hf.plain import FAMILIES, family_of
from rdlm.model.blocks import VALUE_CHANNELS, rotary_frequencies

PREFIXES = ("_orig_mod.", "_original_module.", "module.", "model.")
"""What wrappers put before every name: compiling, the reference's training, data parallelism, a module that owns it."""

ROTARY = "freqs_cis"
"""The reference's buffer of rotary tables: derived, so ignored on load and recomputed on save."""


class Entry(NamedTuple):
    """One tensor: path in our tree, shape on the other side, and the way between the layouts.

    Where our array holds several of their tensors, `whole` is its shape, and `at` indexes this tensor's place in it.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    split: tuple[int, ...]
    permute: tuple[int, ...]
    order: np.ndarray | None = None
    whole: tuple[int, ...] | None = None
    at: tuple[slice | int | np.ndarray, ...] | None = None


def plain(*path: str, shape: tuple[int, ...], order: np.ndarray | None = None) -> Entry:
    """A tensor of the same shape on both sides; `order` picks from its first axis."""
    return Entry(path, shape, shape, shape, tuple(range(len(shape))), order)


def matrix(*path: str, out: int, inner: int, order: np.ndarray | None = None) -> Entry:
    """A torch matrix (out, in), ours (in, out); `order` picks from its rows."""
    return Entry(path, (out, inner), (inner, out), (out, inner), (1, 0), order)


def table(config: ModelConfig) -> dict[str, Entry]:
    """Every parameter of a model: their name -> Entry.

    Raises:
      InputError: a config that no public format can hold.
    """
    if parcae.holds(config):
        return _parcae(config)
    if config.loop.injection == "linear":
        return _raven(config)
    if config.low_layers:
        return _two_stacks(config)
    family = family_of(config)
    if family is None:
        raise InputError(
            "config: no public format holds this combination of block, loop and layers; see docs/families.md"
        )
    return _layers(config, FAMILIES[family].norms)


def _heads(config: ModelConfig) -> np.ndarray:
    """For each head of our qkv matrix the place of theirs, which stacks gates if any, query heads, keys, values.

    Ours go by key head: its G query heads, its key, its value, its gates (see rdlm.model.blocks.SelfAttention).
    """
    H, K, first = config.num_heads, config.kv_heads, _gates(config)
    G = H // K

    def group(k: int) -> list[int]:
        queries = range(k * G, (k + 1) * G)
        return [*(first + h for h in queries), first + H + k, first + H + K + k, *(queries if first else ())]

    return np.array([h for k in range(K) for h in group(k)])


def _gates(config: ModelConfig) -> int:
    """Heads of gates in the qkv matrix."""
    return config.num_heads if config.block.output_gate else 0


def _turned(heads: int, Q: int, halves: bool) -> np.ndarray:
    """Rows of `heads` heads in our order: rotary turns neighbours (2i, 2i+1), theirs may turn (i, i + Q/2)."""
    inner = np.arange(Q).reshape(2, -1).T.ravel() if halves else np.arange(Q)
    return (np.arange(heads)[:, None] * Q + inner).ravel()


def _rows(config: ModelConfig, halves: bool) -> np.ndarray:
    """For each column of our qkv matrix its row in their stack of queries, keys and values."""
    H, K, Q, first = config.num_heads, config.kv_heads, config.head_dim, _gates(config)
    rest = first + H + K
    turned = np.concatenate([np.arange(first * Q), first * Q + _turned(H + K, Q, halves), rest * Q + np.arange(K * Q)])
    return turned.reshape(-1, Q)[_heads(config)].ravel()


def _raven(config: ModelConfig) -> dict[str, Entry]:
    """The format of the paper's models, whose blocks may be the paper's or those of a plain transformer."""
    D, F, V = config.embed_dim, config.mlp_dim, config.rows
    H, K, Q = config.num_heads, config.kv_heads, config.head_dim
    rows, halves = (H + 2 * K) * Q, not is_sandwich(config)
    order = _rows(config, halves)
    entries = {"transformer.wte.weight": plain("wte", shape=(V, D))}
    if not config.tie_embeddings:
        entries["lm_head.weight"] = plain("head", shape=(V, D))
    entries["transformer.adapter.weight"] = _adapter(D)
    entries["transformer.ln_f.weight"] = plain("ln_f", "scale", shape=(D,))
    for theirs, ours in (("prelude", "prelude"), ("core_block", "core"), ("coda", "coda")):
        for i in range(getattr(config, f"{ours}_layers")):
            name, block = f"transformer.{theirs}.{i}.", f"{ours}_{i}"
            for their_norm, norm in _raven_norms(config).items():
                entries[f"{name}{their_norm}.weight"] = plain(block, norm, "scale", shape=(D,))
            if config.block.qk_norm == "width":
                for norm, heads in (("q_norm", H), ("k_norm", K)):
                    turned = _turned(heads, Q, halves)
                    entries[f"{name}attn.{norm}.weight"] = plain(
                        block, "attn", norm, "scale", shape=(heads * Q,), order=turned
                    )
            entries[f"{name}attn.Wqkv.weight"] = matrix(block, "attn", "qkv", out=rows, inner=D, order=order)
            if config.qk_bias:
                entries[f"{name}attn.qk_bias"] = Entry(
                    (block, "attn", "qk_bias"), (2, 1, H, Q), (2, H, Q), (2, 1, H, Q), (0, 1, 2, 3)
                )
            entries[f"{name}attn.proj.weight"] = matrix(block, "attn", "proj", out=D, inner=H * Q)
            entries[f"{name}mlp.fc.weight"] = Entry((block, "mlp", "fc"), (2 * F, D), (2, D, F), (2, F, D), (0, 2, 1))
            entries[f"{name}mlp.proj.weight"] = matrix(block, "mlp", "proj", out=D, inner=F)
    return entries


def _parcae(config: ModelConfig) -> dict[str, Entry]:
    """The format of Parcae: matrices of their own for queries, keys and values, and value embeddings."""
    D, F, V = config.embed_dim, config.mlp_dim, config.rows
    H, K, Q = config.num_heads, config.kv_heads, config.head_dim
    entries = {"transformer.wte.weight": plain("wte", shape=(V, D))}
    if not config.tie_embeddings:
        entries["lm_head.weight"] = plain("head", shape=(V, D))
    if config.loop.injection == "linear":
        entries["transformer.adapter.adapter.weight"] = _adapter(D)
    if config.loop.injection == "diagonal":
        for name in ("A_log", "dt_bias"):
            entries[f"transformer.adapter.{name}"] = plain("adapter", name, shape=(D,))
        entries["transformer.adapter.B"] = matrix("adapter", "B", out=D, inner=D)
    if config.loop.entry_norm:
        entries["transformer.ln_prelude.weight"] = plain("ln_e", "scale", shape=(D,))
    entries["transformer.C.weight"] = matrix("C", out=D, inner=D)
    entries["transformer.ln_f.weight"] = plain("ln_f", "scale", shape=(D,))
    for i, block in enumerate(config.layers):
        part, _, j = block.partition("_")
        name = f"transformer.{'core_block' if part == 'core' else part}.{j}."
        for theirs, norm in (("norm_1", "norm_1"), ("norm_2", "norm_3")):
            entries[f"{name}{theirs}.weight"] = plain(block, norm, "scale", shape=(D,))
        for theirs, entry in zip(("c_q", "c_k", "c_v"), _split_qkv(config, block, halves=False), strict=True):
            entries[f"{name}attn.{theirs}.weight"] = entry
        if i in config.value_gates:
            gate = matrix(f"values_{block}", "gate", out=K, inner=VALUE_CHANNELS)
            entries[f"{name}attn.ve_gate.weight"] = gate
        if i in config.value_tables:
            entries[f"value_embeds.{i}.weight"] = plain(f"values_{block}", "table", shape=(V, K * Q))
        entries[f"{name}attn.c_proj.weight"] = matrix(block, "attn", "proj", out=D, inner=H * Q)
        entries[f"{name}mlp.fc.weight"] = matrix(block, "mlp", "fc", out=F, inner=D)
        entries[f"{name}mlp.proj.weight"] = matrix(block, "mlp", "proj", out=D, inner=F)
    return entries


def _adapter(D: int) -> Entry:
    """A matrix [D, 2 D] that reads the state first, then the embedded input."""
    return Entry(("adapter",), (D, 2 * D), (2, D, D), (D, 2, D), (1, 2, 0))


def _split_qkv(config: ModelConfig, block: str, halves: bool) -> list[Entry]:
    """Their matrices of queries, keys and values, which are one of ours."""
    H, K, Q = config.num_heads, config.kv_heads, config.head_dim
    rows, first, made = _rows(config, halves), 0, []
    for heads in (H, K, K):
        columns = np.flatnonzero((rows >= first) & (rows < first + heads * Q))
        entry = matrix(block, "attn", "qkv", out=columns.size, inner=config.embed_dim, order=rows[columns] - first)
        made.append(entry._replace(whole=(config.embed_dim, rows.size), at=(slice(None), columns)))
        first += heads * Q
    return made


def is_sandwich(config: ModelConfig) -> bool:
    """Whether blocks are the paper's, with four norms; those of retrofits have two."""
    return config.block.norm_output == "sum"


def _raven_norms(config: ModelConfig) -> dict[str, str]:
    """Their norm -> ours. With two norms theirs are counted through, wherever they stand."""
    if is_sandwich(config):
        return {name: name for name in ("norm_1", "norm_2", "norm_3", "norm_4")}
    first, second = ("norm_1", "norm_3") if config.block.norm_input else ("norm_2", "norm_4")
    return {"norm_1": first, "norm_2": second}


def _layers(config: ModelConfig, norms: dict[str, str]) -> dict[str, Entry]:
    """The format of plain transformers: `model.layers.i`, with matrices of their own for queries, keys, gate, ..."""
    D, F, V = config.embed_dim, config.mlp_dim, config.rows
    H, K, Q = config.num_heads, config.kv_heads, config.head_dim
    entries = {"model.embed_tokens.weight": plain("wte", shape=(V, D))}
    if not config.tie_embeddings:
        entries["lm_head.weight"] = plain("head", shape=(V, D))
    entries["model.norm.weight"] = plain("ln_f", "scale", shape=(D,))
    if config.loop.gate:
        entries["model.early_exit_gate.weight"] = Entry(("gate", "w"), (1, D), (D,), (D,), (0,))
        entries["model.early_exit_gate.bias"] = Entry(("gate", "bias"), (1,), (), (1,), (0,))
    for i, block in enumerate(config.layers):
        name = f"model.layers.{i}."
        for norm, theirs in norms.items():
            entries[f"{name}{theirs}.weight"] = plain(block, norm, "scale", shape=(D,))
        for part, entry in zip(("q_proj", "k_proj", "v_proj"), _split_qkv(config, block, halves=True), strict=True):
            entries[f"{name}self_attn.{part}.weight"] = entry
            if config.block.qkv_bias:
                assert entry.whole is not None
                assert entry.at is not None
                bias = plain(block, "attn", "qkv_bias", shape=entry.shape[:1], order=entry.order)
                entries[f"{name}self_attn.{part}.bias"] = bias._replace(whole=entry.whole[1:], at=entry.at[1:])
        if config.block.qk_norm != "none":
            for norm, heads in (("q_norm", H), ("k_norm", K)):
                turned = _turned(heads if config.block.qk_norm == "width" else 1, Q, halves=True)
                entries[f"{name}self_attn.{norm}.weight"] = plain(
                    block, "attn", norm, "scale", shape=(turned.size,), order=turned
                )
        entries[f"{name}self_attn.o_proj.weight"] = matrix(block, "attn", "proj", out=D, inner=H * Q)
        for half, theirs in enumerate(("gate_proj", "up_proj")):
            entry = matrix(block, "mlp", "fc", out=F, inner=D)
            entries[f"{name}mlp.{theirs}.weight"] = entry._replace(whole=(2, D, F), at=(half,))
        entries[f"{name}mlp.down_proj.weight"] = matrix(block, "mlp", "proj", out=D, inner=F)
    return entries


def _two_stacks(config: ModelConfig) -> dict[str, Entry]:
    """The format of models with two stacks: a high and a low module, blocks without weights of norms."""
    D, F, V = config.embed_dim, config.mlp_dim, config.rows
    rows = _rows(config, halves=True)
    entries = {
        "model.embed_tokens.weight": plain("wte", shape=(V, D)),
        "model.z_L_init": plain("low_start", shape=(D,)),
    }
    if not config.tie_embeddings:
        entries["lm_head.weight"] = plain("head", shape=(V, D))
    for theirs, ours in (("L_module", "low"), ("H_module", "core")):
        for i in range(config.core_layers):
            name, block = f"model.{theirs}.layers.{i}.", f"{ours}_{i}"
            entries[f"{name}attn.gqkv_proj.weight"] = matrix(block, "attn", "qkv", out=rows.size, inner=D, order=rows)
            entries[f"{name}attn.o_proj.weight"] = matrix(
                block, "attn", "proj", out=D, inner=config.num_heads * config.head_dim
            )
            entries[f"{name}mlp.gate_up_proj.weight"] = Entry(
                (block, "mlp", "fc"), (2 * F, D), (2, D, F), (2, F, D), (0, 2, 1)
            )
            entries[f"{name}mlp.down_proj.weight"] = matrix(block, "mlp", "proj", out=D, inner=F)
    return entries


def to_ours(x: np.ndarray, entry: Entry) -> np.ndarray:
    """Their tensor in our layout; bits unchanged."""
    x = x.reshape(entry.split)
    if entry.order is not None:
        x = x[entry.order]
    return np.ascontiguousarray(x.transpose(entry.permute)).reshape(entry.ours)


def to_theirs(x: np.ndarray, entry: Entry) -> np.ndarray:
    """Our tensor in their layout; bits unchanged."""
    x = x.reshape([entry.split[axis] for axis in entry.permute]).transpose(np.argsort(entry.permute))
    if entry.order is not None:
        x = x[np.argsort(entry.order)]
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
