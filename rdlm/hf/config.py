"""config.json of the paper's models and of retrofits, in both directions: fields, defaults, and what is refused.

`model_config` and `model_fields` serve the families of `rdlm.hf.plain` and `rdlm.hf.parcae` too. The paper's models
have two forms: the one published with Huginn-0125 (`num_attention_heads`, few fields) and the one that the reference
writes when it saves a model (`n_heads`, derived fields). Absent fields take the reference's defaults.
Retrofits share every identifier with them; only their tensors tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from rdlm.config import InputError, Loop, ModelConfig, require
from rdlm.config.model import NOISES
from rdlm.hf import parcae, plain
from rdlm.hf.fields import Fields, Json, named_by, typed, whole
from rdlm.model.retrofit import START_STD

# Reference field -> (field of ModelConfig, type, the reference's default).
FIELDS: dict[str, tuple[str, type, Json]] = {
    "vocab_size": ("vocab_size", int, 65536),
    "n_embd": ("embed_dim", int, 5280),
    "n_heads": ("num_heads", int, 55),
    "intermediate_size": ("mlp_dim", int, 17920),
    "n_layers_in_prelude": ("prelude_layers", int, 2),
    "n_layers_in_recurrent_block": ("core_layers", int, 4),
    "n_layers_in_coda": ("coda_layers", int, 2),
    "block_size": ("max_length", int, 4096),
    "rope_base": ("rope_base", float, 50000.0),
    "norm_eps": ("norm_eps", float, 1e-6),
    "qk_bias": ("qk_bias", bool, True),
    "tie_embeddings": ("tie_embeddings", bool, True),
    "mean_recurrence": ("mean_recurrence", int, 32),
    "mean_backprop_depth": ("backprop_depth", int, 8),
    "test_time_noise": ("test_time_noise", float, 0.0),
    "test_time_noise_type": ("test_time_noise_type", str, "fixed"),
}

# Other names of the same fields; the reference's config class knows both.
ALIASES = {"num_attention_heads": "n_heads", "hidden_size": "n_embd", "num_hidden_layers": "n_layers"}

SANDWICH, OLMO = "norm_3.weight", "attn.q_norm.weight"
"""Ends of tensor names: of the paper's blocks, and of retrofits whose blocks norm branches and queries and keys."""

# Fields that change what the network computes, with the one value that rdlm can build. Those up to "bias" are written,
# because the reference's config class knows them (WRITTEN).
FIXED: Fields = {
    "model_type": "huginn_raven",
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "init_strategy": "takase",  # decides the scale of the embedding in the forward pass
    "bias": False,
    "lm_head_bias": False,
    "qk_norm": False,
    "clip_qkv": None,
    "embed_step": False,
    "normalize_rec": "",
    "intermediate_noise_injection": 0,
    "use_abacus": False,
    "center_attention": False,
    "debias_attention": False,
    "mup_model_scaling_factor": 1,
    "rope_scaling": None,
    "rope_settings": None,
    "quantization_config": None,
}
WRITTEN = tuple(FIXED)[: tuple(FIXED).index("bias") + 1]

COUNTS = ("prelude_layers", "core_layers", "coda_layers", "mean_recurrence", "backprop_depth")

PADDING = 4096
"""The reference's default padding_multiple."""


UNSUPPORTED = {
    "loopformer": "the time of a step modulates its blocks",
    "iquestloopcoder": "the second pass reads keys of the first through a gate",
    "inkling2_loop": "passes send each other messages by attention, between mixtures of experts",
}
"""What is different in published looped models that are refused."""


def is_reference(fields: Fields) -> bool:
    """Whether these are fields of a Hugging Face folder, as opposed to a run folder's."""
    return "model_type" in fields or "n_embd" in fields


def check_kind(fields: Fields, where: str) -> str:
    """The model_type of a folder; "parcae" where its class is named instead.

    Raises:
      InputError: one that rdlm does not build.
    """
    if parcae.is_parcae(fields):
        return "parcae"
    kind = fields.get("model_type", FIXED["model_type"])
    if reason := UNSUPPORTED.get(str(kind)):
        raise InputError(f"{where}: model_type = {kind!r}: {reason}, which rdlm does not build")
    if kind not in (FIXED["model_type"], *plain.FAMILIES):
        known = ", ".join((FIXED["model_type"], *plain.FAMILIES))
        raise InputError(f"{where}: model_type = {kind!r}: must be one of {known}; see docs/families.md")
    return str(kind)


def model_config(
    fields: Fields,
    rows: int | None = None,
    dtype: str = "float32",
    where: str = "config.json",
    tensors: Collection[str] = (),
) -> ModelConfig:
    """The ModelConfig for the fields of a folder.

    Args:
      fields: the parsed config.json, in either form.
      rows: rows of the stored embedding; None: padded_vocab_size, or vocab_size where that is absent.
      dtype: stored dtype; becomes param_dtype.
      where: the file, for error messages.
      tensors: names of the stored tensors, which tell retrofits from the paper's models; none: the latter.

    Raises:
      InputError: an architecture that rdlm cannot build, a value of the wrong type or out of range, or fields that
        contradict each other. The message names the field as the reference does.
    """
    kind = check_kind(fields, where)
    if kind == "parcae":
        return parcae.model_config(fields, rows, dtype, where)
    if kind in plain.FAMILIES:
        return plain.model_config(fields, rows, dtype, where)
    fields = dict(fields)
    retrofit = bool(tensors) and not any(name.endswith(SANDWICH) for name in tensors)
    loose = ("rope_scaling", "norm_class_name") if retrofit else ()
    for name, wanted in FIXED.items():
        if name not in loose and fields.get(name, wanted) != wanted:
            raise InputError(f"{where}: {name} = {fields[name]!r}: rdlm builds only {wanted!r}")
    for alias, name in ALIASES.items():
        if fields.get(alias) is not None and fields.setdefault(name, fields[alias]) != fields[alias]:
            raise InputError(f"{where}: {alias} = {fields[alias]!r} contradicts {name} = {fields[name]!r}")
    values = {ours: typed(fields, name, kind, default, where) for name, (ours, kind, default) in FIELDS.items()}
    for name, (ours, _, _) in FIELDS.items():
        if ours in COUNTS and values[ours] > plain.LARGEST_COUNT:
            raise InputError(f"{where}: {name} = {values[ours]}: must be at most {plain.LARGEST_COUNT}")
    if values["test_time_noise_type"] not in NOISES:
        found = values["test_time_noise_type"]
        raise InputError(f"{where}: test_time_noise_type = {found!r}: must be one of {', '.join(NOISES)}")
    D, H, vocab = values["embed_dim"], values["num_heads"], values["vocab_size"]
    scale = _initial(fields, "embed_scale", abs(D) ** 0.5, where)
    try:
        if retrofit:
            values |= _retrofitted(fields, any(name.endswith(OLMO) for name in tensors), scale, where)
        elif not math.isclose(scale, abs(D) ** 0.5, rel_tol=1e-6):
            raise InputError(f"{where}: init_values.embed_scale = {scale!r}: rdlm builds only sqrt(n_embd) = {D**0.5}")
        return ModelConfig(
            **values,
            num_kv_heads=_kv_heads(fields, D, H, where),
            padded_vocab_size=_rows(fields, vocab, rows, where),
            param_dtype=dtype,  # type: ignore[arg-type]
        )
    except InputError as error:
        names = {name: (ours, None) for name, (ours, _, _) in FIELDS.items()}
        raise named_by(names | {"num_key_value_heads": ("num_kv_heads", None)}, error, where) from error


def _initial(fields: Fields, name: str, default: float, where: str) -> float:
    """A number of `init_values`."""
    values = fields.get("init_values")
    given = values if isinstance(values, dict) and values.get(name) is not None else {}
    return typed(given, name, float, default, f"{where}: init_values")


def _retrofitted(fields: Fields, olmo: bool, embed_scale: float, where: str) -> dict[str, Json]:
    """What is different in a retrofit: a plain transformer's blocks and rotary fields, and the start of the state."""
    if fields.get("initial_state_mode", "random") != "random":
        raise InputError(f"{where}: initial_state_mode = {fields['initial_state_mode']!r}: rdlm builds only 'random'")
    theta, scaling = plain.rotary(fields, where)
    return {
        "rope_base": theta,
        "rope_scaling": scaling,
        "embed_scale": embed_scale,
        "max_length": typed(fields, "max_position_embeddings", int, FIELDS["block_size"][2], where),
        "block": plain.FAMILIES["olmo2" if olmo else "llama"].block,
        "loop": Loop(bridge=False, start_std=_initial(fields, "std", START_STD, where)),
    }


def _kv_heads(fields: Fields, D: int, H: int, where: str) -> int | None:
    """Number of key heads. Checks the fields that the reference derives from others.

    If its config class is given `num_attention_heads`, it computes num_key_value_heads and head_dim from its default of
    55 heads, and saves these wrong values; n_layers is 8 by default, for any other counts. Its model reads
    neither head_dim nor n_layers. Exactly these wrong values are ignored; any other contradiction is an error.
    """
    stale_heads = FIELDS["n_heads"][2]
    kv = typed(fields, "num_key_value_heads", int, H, where) if fields.get("num_key_value_heads") is not None else H
    if kv == stale_heads and kv > H:
        kv = H
    if H > 0 and D > 0:
        head_dim = fields.get("head_dim")
        if head_dim not in (None, D // H, D // stale_heads):
            raise InputError(f"{where}: head_dim = {head_dim!r}: must be n_embd / n_heads = {D} / {H} = {D // H}")
    parts = [fields.get(f"n_layers_in_{p}", d) for p, d in (("prelude", 2), ("recurrent_block", 4), ("coda", 2))]
    if fields.get("n_layers") not in (None, sum(parts), 8):
        raise InputError(f"{where}: n_layers = {fields['n_layers']!r}: must be {' + '.join(map(str, parts))}")
    return kv


def _rows(fields: Fields, vocab: int, rows: int | None, where: str) -> int:
    """Rows of the embedding: those stored, if the config allows that number."""
    padded = fields.get("padded_vocab_size")
    padded = vocab if padded is None else typed(fields, "padded_vocab_size", int, vocab, where)
    multiple = typed(fields, "padding_multiple", int, PADDING, where)
    if multiple < 1:
        raise InputError(f"{where}: padding_multiple = {multiple}: must be at least 1")
    allowed = {vocab, padded, -(-vocab // multiple) * multiple}
    if rows is not None and rows not in allowed:
        raise InputError(
            f"{where}: vocab_size = {vocab}: transformer.wte.weight has {rows} rows, expected one of "
            f"{sorted(allowed)} (vocab_size, padded_vocab_size, or vocab_size rounded up to padding_multiple)"
        )
    return padded if rows is None else rows


def model_fields(config: ModelConfig, dtype: str) -> Fields:
    """config.json of a model, as its own code would write it. `dtype`: of the tensors."""
    if parcae.holds(config):
        return parcae.model_fields(config)
    if config.loop.injection == "none":
        return plain.model_fields(config, dtype)
    fields = reference_fields(config, dtype)
    if config.block.norm_output == "sum":
        return fields
    fields.pop("tie_word_embeddings", None)  # the class of retrofits refuses it
    return fields | {
        "init_values": fields["init_values"] | {"embed_scale": config.embed_scale, "std": config.loop.start_std},
        "max_position_embeddings": config.max_length,
        **plain.rotary_fields(config),
    }


def reference_fields(config: ModelConfig, dtype: str) -> Fields:
    """The fields that the reference would write for `config`, derived ones included. `dtype`: of the tensors."""
    window = config.attention_window
    require(window is None, "attention_window", window, "must be None for the reference, which has no window")
    fields = {name: getattr(config, ours) for name, (ours, _, _) in FIELDS.items()}
    for name in ("rope_base", "test_time_noise"):
        fields[name] = whole(fields[name])
    fields |= {name: FIXED[name] for name in WRITTEN}
    depth = config.prelude_layers + config.coda_layers + config.core_layers * config.mean_recurrence
    std = (2 / (5 * config.embed_dim)) ** 0.5
    # A padding_multiple that gives the same number of rows, so that the reference's training and inference code agree.
    powers = [PADDING >> i for i in range(13)]
    fits = [m for m in powers if -(-config.vocab_size // m) * m == config.rows]
    fields |= {
        "activation_checkpoint_impl": "per-iteration",
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": "raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
        },
        "effective_expected_depth": depth,
        "head_dim": config.head_dim,
        "init_orthogonal": False,
        "init_values": {
            "embed_scale": config.embed_dim**0.5,
            "embedding": std,
            "out_proj": std / (2 * depth) ** 0.5,
            "std": std,
        },
        "n_layers": len(config.layers),
        "num_key_value_heads": config.kv_heads,
        "padded_vocab_size": config.rows,
        "padding_multiple": fits[0] if fits else config.rows,
        "sampling_scheme": "poisson-lognormal-filling",
        "torch_dtype": dtype,
        "transformers_version": "4.53.3",
    }
    if not config.tie_embeddings:
        fields["tie_word_embeddings"] = False
    return dict(sorted(fields.items()))
