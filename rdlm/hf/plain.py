"""config.json of plain transformers and of models that loop all of their layers, in both directions.

One `Family` per `model_type`: its block, its loop, the names of its norms, defaults of absent fields, and fields that
switch on what rdlm does not build. docs/families.md says what each computes. Both spellings are read, those of
transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`); version 4 is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from rdlm.config import Block, InputError, Loop, ModelConfig, RotaryScaling, differences
from rdlm.hf.fields import Fields, Json, named_by, typed, whole
from rdlm.model.retrofit import ONCE

CLOSED = dataclasses.replace(ONCE, close=True)
GATED = dataclasses.replace(CLOSED, gate=True)

LARGEST_COUNT = 10_000
"""Of layers and loops. Beyond it a folder is damaged, and building its model would not end."""

PRE_NORM = Block(norm_output="none")
BEFORE = {"norm_1": "input_layernorm", "norm_3": "post_attention_layernorm"}


Read = Callable[[Fields, dict[str, Json], str], dict[str, Json]]
"""(fields, values of ModelConfig so far, where they are from) -> more values."""
Write = Callable[[ModelConfig], Fields]


class Family(NamedTuple):
    """One `model_type`. loops: the field that holds the number of loops; None: the layers run once."""

    architecture: str
    block: Block
    norms: dict[str, str]  # ours -> theirs
    loop: Loop = ONCE
    loops: str | None = None
    tied: bool = False  # where tie_word_embeddings is absent
    activation: str = "silu"  # theirs
    eps: float = 1e-6
    windows: bool = False  # some layers see a window
    embed_scale: float | None = 1.0
    refused: tuple[str, ...] = ()  # fields that must be absent or false
    read: Read = lambda fields, values, where: {}  # fields that no other family has
    write: Write = lambda config: {}
    free: tuple[str, ...] = ()  # what `read` sets of block, loop and embed_scale


def rotary(fields: Fields, where: str) -> tuple[float, RotaryScaling | None]:
    """Base and scaling of the rotary frequencies, in either spelling."""
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise InputError(f"{where}: rope_scaling = {given!r}: must be an object with numbers")
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


PATTERN = 6
"""Every sixth layer sees everything, where `layer_types` is absent."""


def _check_layer_types(fields: Fields, family: Family, where: str) -> None:
    """Refuse layers of a kind or number that the family does not have."""
    kinds, count = typed(fields, "layer_types", list, None, where), fields.get("num_hidden_layers")
    known = ("full_attention", "sliding_attention") if family.windows else ("full_attention",)
    if len(kinds) != count or any(kind not in known for kind in kinds):
        raise InputError(
            f"{where}: layer_types: must name num_hidden_layers = {count} layers, each one of {', '.join(known)}"
        )


def _read_windows(fields: Fields, values: dict[str, Json], where: str) -> dict[str, Json]:
    """Of layers that see a window, but for some; both kinds have a rotary base of their own."""
    given = {"pattern": fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern"))}
    pattern: int = PATTERN if given["pattern"] is None else typed(given, "pattern", int, None, where)
    kinds = fields.get("layer_types") or [
        "sliding_attention" if (i + 1) % max(pattern, 1) else "full_attention" for i in range(values["core_layers"])
    ]
    given = fields.get("rope_parameters") or {}
    if "full_attention" in given:  # transformers 5: one entry for each kind of layer
        full, near = ({"rope_parameters": given.get(kind, {})} for kind in ("full_attention", "sliding_attention"))
    else:
        near = {"rope_theta": fields.get("rope_local_base_freq", 10000.0)}
        full = {"rope_theta": 1e6} | {k: v for k, v in fields.items() if k in ("rope_theta", "rope_scaling")}
    (base, scaling), (local, _) = rotary(full, where), rotary(near, where)
    scalar = typed(fields, "query_pre_attn_scalar", float, 256.0, where)
    if scalar <= 0:
        raise InputError(f"{where}: query_pre_attn_scalar = {scalar}: must be positive")
    return {
        "rope_base": base,
        "rope_scaling": scaling,
        "attention_window": typed(fields, "sliding_window", int, 4096, where),
        "full_attention_layers": tuple(i for i, kind in enumerate(kinds) if kind == "full_attention"),
        "window_rope_base": local,
        "block": dataclasses.replace(values["block"], attention_scale=scalar**-0.5),
    }


def _write_windows(config: ModelConfig) -> Fields:
    near, full = "sliding_attention", "full_attention"
    layers = len(config.layers)
    scalar = round((config.block.attention_scale or config.head_dim**-0.5) ** -2, 6)
    return {
        "layer_types": [full if i in config.full_attention_layers else near for i in range(layers)],
        "query_pre_attn_scalar": whole(scalar),  # transformers 5 takes no 24.0
        "rope_local_base_freq": config.window_rope_base,
        "sliding_window": config.attention_window,
    }


def _read_loop_weights(fields: Fields, values: dict[str, Json], where: str) -> dict[str, Json]:
    """Of loops that may be counted by the weights of their losses, and closed or not."""
    if fields.get("pretraining_tp") not in (None, 1):
        raise InputError(f"{where}: pretraining_tp = {fields['pretraining_tp']!r}: must be 1")
    weights = fields.get("loop_loss_weights")
    found: dict[str, Json] = {}
    if weights is not None and typed(fields, "loop_loss_weights", list, None, where):
        found["mean_recurrence"] = len(weights) + 1
    if typed(fields, "skip_loop_final_norm", bool, False, where):
        found["loop"] = ONCE
    return found


def _read_stacks(fields: Fields, values: dict[str, Json], where: str) -> dict[str, Json]:
    """Of two stacks: num_hidden_layers counts the layers of one, or, beside num_layers_per_stack, all that ever run."""
    found: dict[str, Json] = {}
    for name, default in (("L_cycles", None), ("num_layers_per_stack", values["core_layers"])):
        if fields.get(name, default) is None:
            raise InputError(f"{where}: {name} is missing")
        found[name] = typed(fields, name, int, default, where)
        if not 1 <= found[name] <= LARGEST_COUNT:
            raise InputError(f"{where}: {name} = {found[name]}: must be in 1 .. {LARGEST_COUNT}")
    given = {"L_bp_cycles": [2]} | {k: v for k, v in fields.items() if k == "L_bp_cycles" and v is not None}
    backprop, cycles = typed(given, "L_bp_cycles", list, None, where), values["mean_recurrence"]
    if len(backprop) > cycles or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in backprop):
        raise InputError(f"{where}: L_bp_cycles = {backprop!r}: must be at most H_cycles = {cycles} counts")
    scale = fields.get("embedding_scale")
    if scale is None:
        scale = 1 / (typed(fields, "initializer_range", float, 0.02, where) or 0.02)
    scale = typed({"embedding_scale": scale}, "embedding_scale", float, None, where)
    if scale <= 0:
        raise InputError(f"{where}: embedding_scale = {scale}: must be positive")
    return {
        "prefix_attention": typed(fields, "prefix_lm", bool, True, where),
        "core_layers": found["num_layers_per_stack"],
        "embed_scale": scale,
        "loop": dataclasses.replace(values["loop"], low_cycles=found["L_cycles"], low_backprop=tuple(backprop) or (1,)),
    }


def _write_stacks(config: ModelConfig) -> Fields:
    scale = config.embed_dim**0.5 if config.embed_scale is None else config.embed_scale
    return {
        "L_bp_cycles": list(config.loop.low_backprop) or [config.loop.low_cycles] * config.mean_recurrence,
        "L_cycles": config.loop.low_cycles,
        "embedding_scale": scale,
        "prefix_lm": config.prefix_attention,
    }


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
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        Block(norm_output="branch", norm_weight="offset", qk_norm="head", activation="gelu_tanh"),
        {
            "norm_1": "input_layernorm",
            "norm_2": "post_attention_layernorm",
            "norm_3": "pre_feedforward_layernorm",
            "norm_4": "post_feedforward_layernorm",
        },
        tied=True,
        activation="gelu_pytorch_tanh",
        windows=True,
        embed_scale=None,
        refused=("use_bidirectional_attention",),
        read=_read_windows,
        write=_write_windows,
        free=("attention_scale",),
    ),
    "ouro": Family(
        "OuroForCausalLM",
        Block(norm_output="branch"),
        {**BEFORE, "norm_2": "input_layernorm_2", "norm_4": "post_attention_layernorm_2"},
        GATED,
        "total_ut_steps",
        write=lambda config: {"early_exit_threshold": 1.0},
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
        read=_read_loop_weights,
        write=lambda config: {"loop_loss_weights": [], "skip_loop_final_norm": not config.loop.close},
        free=("close",),
    ),
    "hrm_text": Family(
        "HrmTextForCausalLM",
        Block(norm_output="none", norm_weight="none", output_gate=True),
        {},
        CLOSED,
        "H_cycles",
        read=_read_stacks,
        write=_write_stacks,
        free=("low_cycles", "low_backprop", "embed_scale"),
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
    for name in ("hidden_act", "hidden_activation"):
        if fields.get(name, family.activation) not in (family.activation, None):
            raise InputError(
                f"{where}: {name} = {fields[name]!r}: must be {family.activation!r} in a model of type {kind}"
            )
    if fields.get("layer_types") is not None:
        _check_layer_types(fields, family, where)
    if fields.get("rope_parameters") is not None:
        typed(fields, "rope_parameters", dict, None, where)
    if fields.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"{where}: partial_rotary_factor = {fields['partial_rotary_factor']!r}: must be 1")
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
    loops = 1
    if family.loops is not None:
        if fields.get(family.loops) is None:
            raise InputError(f"{where}: {family.loops} is missing")
        loops = typed(fields, family.loops, int, None, where)
    for name, count in (("num_hidden_layers", values["core_layers"]), (family.loops or "", loops)):
        if count > LARGEST_COUNT:
            raise InputError(f"{where}: {name} = {count}: must be at most {LARGEST_COUNT}")
    values |= {"embed_scale": family.embed_scale, "block": family.block, "loop": family.loop, "mean_recurrence": loops}
    if not family.windows:
        values["rope_base"], values["rope_scaling"] = rotary(fields, where)
    values |= family.read(fields, values, where)
    try:
        return ModelConfig(
            **values,
            prelude_layers=0,
            coda_layers=0,
            qk_bias=False,
            backprop_depth=values["mean_recurrence"],
            param_dtype=dtype,  # type: ignore[arg-type]
        )
    except InputError as error:
        others = {"rope_theta": ("rope_base", float), family.loops or "": ("mean_recurrence", int)}
        raise named_by(SHAPE | others, error, where) from error


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
    looped = config.mean_recurrence > 1 or config.loop != ONCE
    if config.qk_bias or (looped and outer):
        return None
    for kind, family in FAMILIES.items():
        differs = {**differences(family.block, config.block), **differences(family.loop, config.loop)}
        if family.embed_scale != config.embed_scale:
            differs["embed_scale"] = family.embed_scale, config.embed_scale
        windowed = family.windows == (config.attention_window is not None)
        if differs.keys() <= set(family.free) and windowed and looped == (family.loops is not None):
            return kind
    return None


def model_fields(config: ModelConfig, dtype: str) -> Fields:
    """config.json of a model that `family_of` knows. `dtype`: of its tensors."""
    kind = family_of(config)
    assert kind is not None
    family = FAMILIES[kind]
    layers = len(config.layers)
    fields: Fields = {
        "architectures": [family.architecture],
        "head_dim": config.head_dim,
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
    fields["hidden_activation" if family.windows else "hidden_act"] = family.activation
    return dict(sorted((fields | family.write(config)).items()))
