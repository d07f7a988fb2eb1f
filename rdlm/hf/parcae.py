"""config.json of Parcae (arXiv 2604.12946), in both directions: fields, what is refused, and which layers have what."""

from __future__ import annotations

import dataclasses

from rdlm.config import Block, InputError, Loop, ModelConfig
from rdlm.hf.fields import Fields, Json, named_by, typed, whole
from rdlm.hf.plain import LARGEST_COUNT

CLASS = "ParcaeConfig"

BLOCK = Block(norm_output="none", qk_norm="rotated", activation="relu2", gated=False)

# Field -> (field of ModelConfig, type).
SHAPE: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "n_embd": ("embed_dim", int),
    "num_attention_heads": ("num_heads", int),
    "num_key_value_heads": ("num_kv_heads", int),
    "intermediate_size": ("mlp_dim", int),
    "n_layers_in_prelude": ("prelude_layers", int),
    "n_layers_in_recurrent_block": ("core_layers", int),
    "n_layers_in_coda": ("coda_layers", int),
    "block_size": ("max_length", int),
    "norm_eps": ("norm_eps", float),
    "tie_embeddings": ("tie_embeddings", bool),
    "mean_recurrence": ("mean_recurrence", int),
    "mean_backprop_depth": ("backprop_depth", int),
}

COUNTS = ("prelude_layers", "core_layers", "coda_layers", "mean_recurrence", "backprop_depth")

# Fields that change what the network computes, with the one value that rdlm builds.
FIXED: Fields = {
    "block_class_name": "TransformerPreNormBlock",
    "mlp_class_name": "BaseMLP",
    "model_class_name": "Parcae",
    "nonlin_name": "ReLU2",
    "norm_class_name": "RMSNorm",
    "init_strategy": "scaled-zero",
    "state_init": "like-init",
    "qk_norm": True,
    "mup_model_scaling_factor": 1,
}

# Fields that do not, with what is written.
FREE: Fields = {
    "activation_checkpoint_impl": "per-iteration",
    "attn_impl": "flash",
    "curriculum_target": "forward",
    "hf_config": {},
    "init_orthogonal": True,
    "lockstep_k": False,
    "lockstep_n": False,
    "name": "parcae",
    "padding_multiple": 64,
    "recurrent_iteration_method": "per-sequence",
    "sampling_scheme": "poisson-truncated-full",
    "skip_initialization": False,
    "strategy": "single",
    "use_fused_head": "pytorch",
}

# Fields of any folder.
COMMON = ("_class_name", "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")

READ = (
    "injection_type",
    "padded_vocab_size",
    "prelude_norm",
    "recurrent_embedding_dimension",
    "recurrent_intermediation_embedding_dimension",
    "rope_settings",
)

# Fields that must be absent or off; so must any other that is not listed here.
OFF: Fields = {
    "bias": False,
    "center_attention": False,
    "clip_qkv": None,
    "debias_attention": False,
    "logit_softcap": None,
    "qk_bias": False,
    "randomize_positions_from": None,
    "recurrent_num_attention_heads": None,
    "simple_ops": False,
    "use_abacus": False,
}

ROPE: Fields = {"use_rope": True, "rope_condense_ratio": 1}


def is_parcae(fields: Fields) -> bool:
    """Whether config.json is of this family, which has no `model_type`."""
    return fields.get("_class_name") == CLASS


def holds(config: ModelConfig) -> bool:
    """Whether a folder of this family could hold a model."""
    return config.block == BLOCK


def value_layers(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers with a table of value embeddings, and layers with a gate: every other one, counted differently.

    Tables are counted through the layers, up to the last. Gates are counted through all recurrences as well, so that
    the coda comes after mean_recurrence times the core, and from layer core_layers * backprop_depth - 1.
    """
    lP, lR, lC = config.prelude_layers, config.core_layers, config.coda_layers
    total, coda = lP + lR + lC, lP + lR * config.mean_recurrence
    unrolled = [*range(lP + lR), *range(coda, coda + lC)]
    tables = tuple(i for i in range(total) if (i - total + 1) % 2 == 0)
    gates = tuple(i for i, j in enumerate(unrolled) if (j - lR * config.backprop_depth + 1) % 2 == 0)
    return tables, gates


def model_config(fields: Fields, rows: int | None, dtype: str, where: str) -> ModelConfig:
    """The ModelConfig of these fields. Arguments and errors as in `rdlm.hf.config.model_config`."""
    known = {*SHAPE, *FIXED, *FREE, *COMMON, *READ}
    for name, value in fields.items():
        if name not in known and value:
            raise InputError(f"{where}: {name} = {value!r}: rdlm does not build it")
    for name, wanted in FIXED.items():
        if fields.get(name, wanted) != wanted:
            raise InputError(f"{where}: {name} = {fields[name]!r}: rdlm builds only {wanted!r}")
    given = fields | {"num_key_value_heads": fields.get("num_key_value_heads") or fields.get("num_attention_heads")}
    values: dict[str, Json] = {}
    for name, (ours, kind) in SHAPE.items():
        if given.get(name) is None:
            raise InputError(f"{where}: {name} is missing")
        values[ours] = typed(given, name, kind, None, where)
        if ours in COUNTS and values[ours] > LARGEST_COUNT:
            raise InputError(f"{where}: {name} = {values[ours]}: must be at most {LARGEST_COUNT}")
    D, vocab = values["embed_dim"], values["vocab_size"]
    twins = {"recurrent_embedding_dimension": D, "recurrent_intermediation_embedding_dimension": values["mlp_dim"]}
    for name, wanted in twins.items():
        if fields.get(name) not in (None, wanted):
            raise InputError(f"{where}: {name} = {fields[name]!r}: rdlm builds only {wanted}, as outside the core")
    padded = typed({"padded_vocab_size": vocab} | fields, "padded_vocab_size", int, vocab, where)
    if rows not in (None, vocab, padded):
        raise InputError(f"{where}: vocab_size = {vocab}: transformer.wte.weight has {rows} rows, expected {padded}")
    injection = typed(fields, "injection_type", str, "diagonal", where)
    if injection not in ("diagonal", "linear", "add"):
        raise InputError(f"{where}: injection_type = {injection!r}: must be diagonal, linear or add")
    try:
        plain = ModelConfig(
            **values,
            padded_vocab_size=padded if rows is None else rows,
            rope_base=_rope_base(fields, where),
            qk_bias=False,
            embed_scale=1.0,
            initial_output="zero",
            block=BLOCK,
            loop=Loop(
                injection=injection,
                start_std=(2 / (5 * D)) ** 0.5 if D > 0 else None,
                bridge=False,
                linear_bridge=True,
                entry_norm=typed(fields, "prelude_norm", bool, True, where),
            ),
            param_dtype=dtype,  # type: ignore[arg-type]
        )
        tables, gates = value_layers(plain)
        return dataclasses.replace(plain, value_tables=tables, value_gates=gates)
    except InputError as error:
        raise named_by(SHAPE, error, where) from error


def _rope_base(fields: Fields, where: str) -> float:
    given = typed(fields, "rope_settings", dict, {}, where)
    for name, value in given.items():
        wanted = ROPE.get(name)
        if name != "rope_base" and value != wanted and (value or name in ROPE):
            raise InputError(f"{where}: rope_settings.{name} = {value!r}: rdlm builds only {wanted!r}")
    base: float = typed(given, "rope_base", float, 50000.0, f"{where}: rope_settings")
    return base


def model_fields(config: ModelConfig) -> Fields:
    """config.json of a model that this family `holds`."""
    fields = {name: getattr(config, ours) for name, (ours, _) in SHAPE.items()}
    fields |= FIXED | FREE | OFF
    fields |= {
        "_class_name": CLASS,
        "injection_type": config.loop.injection,
        "num_key_value_heads": config.kv_heads,
        "padded_vocab_size": config.rows,
        "prelude_norm": config.loop.entry_norm,
        "recurrent_embedding_dimension": config.embed_dim,
        "recurrent_intermediation_embedding_dimension": config.mlp_dim,
        "rope_settings": {"rope_base": whole(config.rope_base), **ROPE},
    }
    return dict(sorted(fields.items()))
