"""The config.json of the public reference, in both directions: fields, defaults, and what rdlm cannot build.

There are two forms: the one published with Huginn-0125 (`num_attention_heads`, few fields) and the one that the
reference writes when it saves a model (`n_heads`, derived fields). Absent fields take the reference's defaults.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rdlm.config import InputError, ModelConfig, require

Json = Any
"""A value of config.json."""
Fields = dict[str, Json]

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

NOISES = ("fixed", "geom", "sqrt", "line", "chi")

LARGEST = {int: 2**31 - 1, float: 1e30, str: math.inf, bool: math.inf}
"""Of numbers, by type of field: what an int32 holds, and what is finite in float32."""
COUNTS = ("prelude_layers", "core_layers", "coda_layers", "mean_recurrence", "backprop_depth")
LARGEST_COUNT = 10_000
"""Of the values of COUNTS. Beyond it a folder is damaged, and building its model would not end."""

PADDING = 4096
"""The reference's default padding_multiple."""


def read_fields(folder: Path) -> Fields:
    """The JSON object in folder/config.json.

    Raises:
      InputError: no folder, no file, or not a JSON object.
    """
    path = folder / "config.json"
    if folder.is_file():
        raise InputError(f"{folder}: is a file; give the folder that holds it and config.json")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not path.is_file():
        raise InputError(f"{path}: missing; expected a Hugging Face model folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def is_reference(fields: Fields) -> bool:
    """Whether these are fields of a Hugging Face folder, as opposed to a run folder's."""
    return "model_type" in fields or "n_embd" in fields


def model_config(
    fields: Fields, rows: int | None = None, dtype: str = "float32", where: str = "config.json"
) -> ModelConfig:
    """The ModelConfig for `fields` of the reference.

    Args:
      fields: the parsed config.json, in either form.
      rows: rows of the stored embedding; None: padded_vocab_size, or vocab_size where that is absent.
      dtype: stored dtype; becomes param_dtype.
      where: the file, for error messages.

    Raises:
      InputError: an architecture that rdlm cannot build, a value of the wrong type or out of range, or fields that
        contradict each other. The message names the field as the reference does.
    """
    fields = dict(fields)
    for name, wanted in FIXED.items():
        if fields.get(name, wanted) != wanted:
            raise InputError(f"{where}: {name} = {fields[name]!r}: rdlm builds only {wanted!r}")
    for alias, name in ALIASES.items():
        if fields.get(alias) is not None and fields.setdefault(name, fields[alias]) != fields[alias]:
            raise InputError(f"{where}: {alias} = {fields[alias]!r} contradicts {name} = {fields[name]!r}")
    values = {ours: _typed(fields, name, kind, default, where) for name, (ours, kind, default) in FIELDS.items()}
    for name, (ours, _, _) in FIELDS.items():
        if ours in COUNTS and values[ours] > LARGEST_COUNT:
            raise InputError(f"{where}: {name} = {values[ours]}: must be at most {LARGEST_COUNT}")
    if values["test_time_noise_type"] not in NOISES:
        found = values["test_time_noise_type"]
        raise InputError(f"{where}: test_time_noise_type = {found!r}: must be one of {', '.join(NOISES)}")
    D, H, vocab = values["embed_dim"], values["num_heads"], values["vocab_size"]
    try:
        return ModelConfig(
            **values,
            num_kv_heads=_kv_heads(fields, D, H, where),
            padded_vocab_size=_rows(fields, vocab, rows, where),
            param_dtype=dtype,  # type: ignore[arg-type]
        )
    except InputError as error:
        message = str(error)
        for name, ours in [*((n, field[0]) for n, field in FIELDS.items()), ("num_key_value_heads", "num_kv_heads")]:
            if message.startswith(f"{ours} = "):
                message = name + message[len(ours) :]
                break
        raise InputError(message if message.startswith(where) else f"{where}: {message}") from error


def _typed(fields: Fields, name: str, kind: type, default: Json, where: str) -> Json:
    value = fields.get(name, default)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) <= LARGEST[kind]:
        raise InputError(f"{where}: {name} = {str(value)[:40]}: must be a number of at most {LARGEST[kind]:g}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where}: {name} = {value!r}: must be of type {kind.__name__}")
    return value


def _kv_heads(fields: Fields, D: int, H: int, where: str) -> int | None:
    """Number of key heads. Checks the fields that the reference derives from others.

    If its config class is given `num_attention_heads`, it computes num_key_value_heads and head_dim from its default of
    55 heads, and saves these wrong values; n_layers is 8 by default, for any other counts. Its model reads
    neither head_dim nor n_layers. Exactly these wrong values are ignored; any other contradiction is an error.
    """
    stale_heads = FIELDS["n_heads"][2]
    kv = _typed(fields, "num_key_value_heads", int, H, where) if fields.get("num_key_value_heads") is not None else H
    if kv == stale_heads and kv > H:
        kv = H
    if H > 0 and D > 0:
        head_dim = fields.get("head_dim")
        if head_dim not in (None, D // H, D // stale_heads):
            raise InputError(f"{where}: head_dim = {head_dim!r}: must be n_embd / n_heads = {D} / {H} = {D // H}")
        scale = (
            fields.get("init_values", {}).get("embed_scale") if isinstance(fields.get("init_values"), dict) else None
        )
        if scale is not None and not (isinstance(scale, (int, float)) and math.isclose(scale, D**0.5, rel_tol=1e-6)):
            raise InputError(f"{where}: init_values.embed_scale = {scale!r}: rdlm builds only sqrt(n_embd) = {D**0.5}")
    parts = [fields.get(f"n_layers_in_{p}", d) for p, d in (("prelude", 2), ("recurrent_block", 4), ("coda", 2))]
    if fields.get("n_layers") not in (None, sum(parts), 8):
        raise InputError(f"{where}: n_layers = {fields['n_layers']!r}: must be {' + '.join(map(str, parts))}")
    return kv


def _rows(fields: Fields, vocab: int, rows: int | None, where: str) -> int:
    """Rows of the embedding: those stored, if the config allows that number."""
    padded = fields.get("padded_vocab_size")
    padded = vocab if padded is None else _typed(fields, "padded_vocab_size", int, vocab, where)
    multiple = _typed(fields, "padding_multiple", int, PADDING, where)
    if multiple < 1:
        raise InputError(f"{where}: padding_multiple = {multiple}: must be at least 1")
    allowed = {vocab, padded, -(-vocab // multiple) * multiple}
    if rows is not None and rows not in allowed:
        raise InputError(
            f"{where}: vocab_size = {vocab}: transformer.wte.weight has {rows} rows, expected one of "
            f"{sorted(allowed)} (vocab_size, padded_vocab_size, or vocab_size rounded up to padding_multiple)"
        )
    return padded if rows is None else rows


def reference_fields(config: ModelConfig, dtype: str) -> Fields:
    """The fields that the reference would write for `config`, derived ones included. `dtype`: of the tensors."""
    window = config.attention_window
    require(window is None, "attention_window", window, "must be None for the reference, which has no window")
    fields = {name: getattr(config, ours) for name, (ours, _, _) in FIELDS.items()}
    for name in ("rope_base", "test_time_noise"):  # the reference writes whole numbers as integers
        fields[name] = int(fields[name]) if float(fields[name]).is_integer() else fields[name]
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
        "n_layers": config.prelude_layers + config.core_layers + config.coda_layers,
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
