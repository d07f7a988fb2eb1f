"""config.json of plain transformers and of models that loop all of their layers, in both directions.

One `Family` per `model_type`: its block, its loop, the names of its norms, defaults of absent fields, and fields that
switch on what rdlm does not build. docs/families.md says what each computes. Both spellings are read, those of
transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`); version 4 is written.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from rdlm.config import Block, InputError, Loop, ModelConfig, RotaryScaling
from rdlm.hf.fields import Fields, Json, typed

ONCE = Loop(injection="none", start="embedding", bridge=False)
CLOSED = dataclasses.replace(ONCE, close=True)
GATED = dataclasses.replace(CLOSED, gate=True)

PRE_NORM = Block(norm_output="none")
BEFORE = {"norm_1": "input_layernorm", "norm_3": "post_attention_layernorm"}


class Family(NamedTuple):
    """One `model_type`. loops: the field that holds the number of loops; None: the layers run once."""

    architecture: str
    block: Block
    norms: dict[str, str]  # ours -> theirs
    loop: Loop = ONCE
    loops: str | None = None
    tied: bool = False  # where tie_word_embeddings is absent
    eps: float = 1e-6
    refused: tuple[str, ...] = ()  # fields that must be absent or false


FAMILIES = {
    "llama": Family("LlamaForCausalLM", PRE_NORM, BEFORE),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        Block(norm_input=False, norm_output="branch", qk_norm="width"),
        {"norm_2": "post_attention_layernorm", "norm_4": "post_feedforward_layernorm"},
        eps=1e-5,
    ),
    "qwen2": Family("Qwen2ForCausalLM", Block(norm_output="none", qkv_bias=True), BEFORE),
    "qwen3": Family("Qwen3ForCausalLM", Block(norm_output="none", qk_norm="head"), BEFORE),
    "ouro": Family(
        "OuroForCausalLM",
        Block(norm_output="branch"),
        {**BEFORE, "norm_2": "input_layernorm_2", "norm_4": "post_attention_layernorm_2"},
        GATED,
        "total_ut_steps",
    ),
    "nanbeige": Family(
        "NanbeigeForCausalLM",
        PRE_NORM,
        BEFORE,
        CLOSED,
        "num_loops",
        refused=(
            "enable_double_loop_split",
            "loop_middle_layers",
            "loop_share_kv",
            "enable_hyper_connection",
            "enable_mhc",
            "enable_depth_attention",
            "qk_layernorm",
            "emb_neighbor_num",
            "insert_ngram_layer_idx",
            "ngram_insert_all_layers",
            "ngram_vocab_size_ratio",
            "rope_scaling",
        ),
    ),
}

REFUSED = (
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_multiplier",
    "embedding_multiplier",
    "num_local_experts",
    "num_experts",
    "quantization_config",
)
"""Fields that must be absent or false in every family."""

# Field -> (field of ModelConfig, type).
SHAPE: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("embed_dim", int),
    "num_attention_heads": ("num_heads", int),
    "num_key_value_heads": ("num_kv_heads", int),
    "head_dim": ("head_width", int),
    "intermediate_size": ("mlp_dim", int),
    "num_hidden_layers": ("core_layers", int),
    "max_position_embeddings": ("max_length", int),
    "rms_norm_eps": ("norm_eps", float),
    "tie_word_embeddings": ("tie_embeddings", bool),
}


def model_config(fields: Fields, rows: int | None, dtype: str, where: str) -> ModelConfig:
    """The ModelConfig of a family's fields: all layers are the core, and the loops are its recurrences.

    Arguments and errors as in `rdlm.hf.config.model_config`.
    """
    kind = fields["model_type"]
    family = FAMILIES[kind]
    for name in (*REFUSED, *family.refused):
        if fields.get(name):
            raise InputError(f"{where}: {name} = {fields[name]!r}: rdlm does not build it")
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise InputError(f"{where}: hidden_act = {activation!r}: must be 'silu' in a model of type {kind}")
    if any(layer != "full_attention" for layer in fields.get("layer_types") or ()):
        raise InputError(f"{where}: layer_types: must all be 'full_attention' in a model of type {kind}")
    if kind == "nanbeige" and fields.get("pretraining_tp") not in (None, 1):
        raise InputError(f"{where}: pretraining_tp = {fields['pretraining_tp']!r}: must be 1")
    defaults: Fields = {
        "num_key_value_heads": fields.get("num_attention_heads"),
        "head_dim": None,
        "rms_norm_eps": family.eps,
        "tie_word_embeddings": family.tied,
    }
    values: dict[str, Json] = {}
    for name, (ours, of) in SHAPE.items():
        if fields.get(name) is None and name not in defaults:
            raise InputError(f"{where}: {name} is missing")
        given = fields if fields.get(name) is not None else defaults
        values[ours] = None if given[name] is None else typed(given, name, of, None, where)
    if rows is not None and rows != values["vocab_size"]:
        raise InputError(f"{where}: vocab_size = {values['vocab_size']}: the embedding has {rows} rows")
    loop, loops = family.loop, 1 if family.loops is None else typed(fields, family.loops, int, None, where)
    if fields.get("loop_loss_weights"):
        loops = len(fields["loop_loss_weights"]) + 1
    if fields.get("skip_loop_final_norm"):
        loop = ONCE
    theta, scaling = rotary(fields, where)
    try:
        return ModelConfig(
            **values,
            prelude_layers=0,
            coda_layers=0,
            rope_base=theta,
            rope_scaling=scaling,
            qk_bias=False,
            embed_scale=1.0,
            mean_recurrence=loops,
            backprop_depth=loops,
            block=family.block,
            loop=loop,
            param_dtype=dtype,  # type: ignore[arg-type]
        )
    except InputError as error:
        named = str(error)
        for name, (ours, _) in (*SHAPE.items(), (family.loops or "", ("mean_recurrence", int))):
            if named.startswith(f"{ours} = "):
                named = name + named[len(ours) :]
                break
        raise InputError(f"{where}: {named}") from error


def rotary(fields: Fields, where: str) -> tuple[float, RotaryScaling | None]:
    """Base and scaling of the rotary frequencies, in either spelling."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise InputError(f"{where}: rope_scaling = {given!r}: must be an object")
    theta = typed(given if "rope_theta" in given else fields, "rope_theta", float, 10000.0, where)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{where}: rope_scaling: rope_type = {kind!r}: must be 'llama3' or 'default'")
    names = ("factor", "low_freq_factor", "high_freq_factor")
    missing = [name for name in (*names, "original_max_position_embeddings") if name not in given]
    if missing:
        raise InputError(f"{where}: rope_scaling: {missing[0]} is missing")
    factor, low, high = (typed(given, name, float, None, where) for name in names)
    length = typed(given, "original_max_position_embeddings", int, None, where)
    try:
        return theta, RotaryScaling(factor, low, high, length)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def rotary_fields(config: ModelConfig) -> Fields:
    """rope_theta and rope_scaling as transformers 4 writes them."""
    scaling = config.rope_scaling
    return {
        "rope_theta": config.rope_base,
        "rope_scaling": None
        if scaling is None
        else {
            "factor": scaling.factor,
            "high_freq_factor": scaling.high_freq_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
            "rope_type": "llama3",
        },
    }


def family_of(config: ModelConfig) -> str | None:
    """The `model_type` whose folder can hold a model of this config; None: none can."""
    outer = config.prelude_layers + config.coda_layers
    for kind, family in FAMILIES.items():
        once = config.loop == ONCE
        looped = config.mean_recurrence > 1 or config.loop != ONCE
        loop = (family.loop == config.loop) or (kind == "nanbeige" and once)
        fits = family.block == config.block and loop and looped == (family.loops is not None)
        if fits and not (looped and outer) and config.embed_scale == 1.0 and not config.qk_bias:
            return kind
    return None


def model_fields(config: ModelConfig, dtype: str) -> Fields:
    """config.json of a model that `family_of` knows. `dtype`: of its tensors."""
    kind = family_of(config)
    assert kind is not None
    family = FAMILIES[kind]
    layers = config.prelude_layers + config.core_layers + config.coda_layers
    fields: Fields = {
        "architectures": [family.architecture],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "model_type": kind,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "vocab_size": config.rows,
        **rotary_fields(config),
    }
    if family.loops is not None:
        fields[family.loops] = config.mean_recurrence
    if kind == "nanbeige":
        fields |= {"loop_loss_weights": [], "skip_loop_final_norm": not config.loop.close}
    if kind == "ouro":
        fields["early_exit_threshold"] = 1.0
    return dict(sorted(fields.items()))
