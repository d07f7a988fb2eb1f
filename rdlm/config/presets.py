"""Named runs. A preset is a RunConfig; the command line overrides any field of it."""

from __future__ import annotations

import dataclasses

from rdlm.config.errors import InputError, did_you_mean
from rdlm.config.model import ModelConfig
from rdlm.config.run import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    RecurrenceConfig,
    RunConfig,
)

# The published model (spec section 1): 3,564,976,800 parameters.
HUGINN_3P5B = ModelConfig(
    vocab_size=65536, embed_dim=5280, num_heads=55, mlp_dim=17920, compute_dtype="bfloat16"
)  # fmt: skip

# Its TPU-native twin: heads of 128, and widths that divide by 256, so that every matrix fills the MXU's tiles and
# shards over any power of two up to 256 devices. 40 heads of 128, MLP 3.55 times the width: 3.56e9 parameters.
HUGINN_TPU = dataclasses.replace(HUGINN_3P5B, embed_dim=5120, num_heads=40, mlp_dim=19200)

NANO = ModelConfig(
    vocab_size=384, embed_dim=32, num_heads=2, mlp_dim=64, prelude_layers=1, core_layers=1, coda_layers=1,
    max_length=256, mean_recurrence=4, backprop_depth=2,
)  # fmt: skip

# Two layers and no prelude: nearly all its computation is the loop, so minutes on a CPU are enough to see depth pay.
QUICKSTART = ModelConfig(
    vocab_size=2048, embed_dim=128, num_heads=4, mlp_dim=384, prelude_layers=0, core_layers=1, coda_layers=1,
    max_length=1024, mean_recurrence=8, backprop_depth=4,
)  # fmt: skip

SMALL = ModelConfig(
    vocab_size=32768, embed_dim=1024, num_heads=8, mlp_dim=3584, prelude_layers=2, core_layers=4, coda_layers=2,
    max_length=2048, mean_recurrence=16, backprop_depth=8, compute_dtype="bfloat16",
)  # fmt: skip


def _presets() -> dict[str, RunConfig]:
    quickstart = RunConfig(
        model=QUICKSTART,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, cooldown_steps=150),
        data=DataConfig(tokenizer_size=2048, sequence_length=128, batch_size=16),
        checkpoint=CheckpointConfig(every=200),
        evaluation=EvaluationConfig(every=200, batches=8),
        steps=600,
    )
    pod = RunConfig(
        model=HUGINN_3P5B,
        mesh=MeshConfig(data=1, fsdp=-1),  # no chip holds it alone
        recurrence=RecurrenceConfig(remat="layer"),
        optimizer=OptimizerConfig(
            name="ellis_adam", learning_rate=4e-5, warmup_steps=4096, cooldown_steps=4096, eps=1e-6, weight_decay=4e-5
        ),
        data=DataConfig(tokenizer_size=65536, sequence_length=4096, batch_size=4096),
        checkpoint=CheckpointConfig(every=10),  # some 20 minutes on 256 chips: docs/scale.md
        evaluation=EvaluationConfig(every=100, batches=2, depths=(1, 4, 8, 16, 32, 64)),
        steps=238_418,
    )
    small = RunConfig(
        model=SMALL,
        recurrence=RecurrenceConfig(remat="layer"),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=1000, cooldown_steps=4000),
        data=DataConfig(tokenizer_size=32768, sequence_length=2048, batch_size=256),
        checkpoint=CheckpointConfig(every=100),
        steps=40_000,
    )
    nano = RunConfig(
        model=NANO,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, cooldown_steps=4),
        data=DataConfig(tokenizer_size=384, sequence_length=64, batch_size=4),
        checkpoint=CheckpointConfig(every=5),
        evaluation=EvaluationConfig(every=10, batches=2, depths=(1, 2, 4, 8)),
        steps=20,
    )
    # Fixed-depth twin of the quickstart: same parameters, same data order, the core run exactly once.
    twin = dataclasses.replace(
        quickstart,
        model=dataclasses.replace(QUICKSTART, mean_recurrence=1, backprop_depth=1),
        recurrence=RecurrenceConfig(scheme="non-recurrent"),
        evaluation=dataclasses.replace(quickstart.evaluation, depths=(1,)),
    )
    table = {
        "quickstart": quickstart,
        "quickstart_twin": twin,
        "nano": nano,
        "small": small,
        "huginn_3p5b": pod,
        "huginn_tpu": dataclasses.replace(pod, model=HUGINN_TPU),
    }
    return {name: dataclasses.replace(run, preset=name) for name, run in table.items()}


PRESETS = _presets()


def preset(name: str) -> RunConfig:
    """The preset called `name`.

    Raises:
      InputError: no such preset; the message suggests the closest.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}.{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
