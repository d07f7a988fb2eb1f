"""Named runs. A preset is a RunConfig; the command line overrides any field of it.

Each says what to expect of it: result, time and hardware, as far as they were measured.
"""

from __future__ import annotations

import dataclasses

from rdlm.config.errors import InputError, did_you_mean
from rdlm.config.model import Block, Loop, ModelConfig, RotaryScaling
from rdlm.config.run import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    RecurrenceConfig,
    RunConfig,
)

HUGINN_3P5B = ModelConfig(vocab_size=65536, embed_dim=5280, num_heads=55, mlp_dim=17920, compute_dtype="bfloat16")
"""The published model: 3,564,976,800 parameters."""

HUGINN_TPU = dataclasses.replace(HUGINN_3P5B, embed_dim=5120, num_heads=40, mlp_dim=19200)
"""Its shape for TPUs: 40 heads of 128, and widths that are multiples of 256. 3.56e9 parameters, in a wider MLP.

Every matrix fills the MXU's tiles and shards over any power of two up to 256 devices.
"""

QUICKSTART = RunConfig(
    preset="quickstart",
    model=ModelConfig(
        vocab_size=2048,
        embed_dim=128,
        num_heads=4,
        mlp_dim=384,
        prelude_layers=0,
        core_layers=1,
        coda_layers=1,
        max_length=1024,
        mean_recurrence=8,
        backprop_depth=4,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50, cooldown_steps=150),
    data=DataConfig(tokenizer_size=2048, sequence_length=128, batch_size=16),
    checkpoint=CheckpointConfig(every=200),
    evaluation=EvaluationConfig(every=200, batches=8),
    steps=600,
)
"""Two layers on the World Factbook. Without a prelude nearly all computation is the loop, so minutes on a CPU show it.

Expected: 2.3068 2.1085 2.0928 2.0924 2.0924 2.0924 nats at r = 1 2 4 8 16 32, in 3 min 42 s on 2 CPU cores.
"""

QUICKSTART_TWIN = dataclasses.replace(
    QUICKSTART,
    preset="quickstart_twin",
    model=dataclasses.replace(QUICKSTART.model, mean_recurrence=1, backprop_depth=1),
    recurrence=RecurrenceConfig(scheme="non-recurrent"),
    evaluation=dataclasses.replace(QUICKSTART.evaluation, depths=(1,)),
)
"""The quickstart's fixed-depth twin: same parameters, same data order, the core run exactly once.

Expected: 1.166 bits per byte, where the quickstart has 1.169 at r = 8.
"""

NANO = RunConfig(
    preset="nano",
    model=ModelConfig(
        vocab_size=384,
        embed_dim=32,
        num_heads=2,
        mlp_dim=64,
        prelude_layers=1,
        core_layers=1,
        coda_layers=1,
        max_length=256,
        mean_recurrence=4,
        backprop_depth=2,
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, cooldown_steps=4),
    data=DataConfig(tokenizer_size=384, sequence_length=64, batch_size=4),
    checkpoint=CheckpointConfig(every=5),
    evaluation=EvaluationConfig(every=10, batches=2, depths=(1, 2, 4, 8)),
    steps=20,
)
"""For tests. Expected: it runs, in seconds on a CPU; 20 steps teach it nothing."""

SMALL = RunConfig(
    preset="small",
    model=ModelConfig(
        vocab_size=32768,
        embed_dim=1024,
        num_heads=8,
        mlp_dim=3584,
        prelude_layers=2,
        core_layers=4,
        coda_layers=2,
        max_length=2048,
        mean_recurrence=16,
        backprop_depth=8,
        compute_dtype="bfloat16",
    ),
    recurrence=RecurrenceConfig(remat="layer"),
    optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=1000, cooldown_steps=4000),
    data=DataConfig(tokenizer_size=32768, sequence_length=2048, batch_size=256),
    checkpoint=CheckpointConfig(every=100),
    steps=40_000,
)
"""For one TPU host. Not trained yet.

Compiled for v5e:2x2, one sequence a chip: 1.46 GiB a chip, at most 55 % MFU (roofline; the bound is HBM).
"""

HUGINN_3P5B_RUN = RunConfig(
    preset="huginn_3p5b",
    model=HUGINN_3P5B,
    mesh=MeshConfig(data=1, fsdp=-1),  # no chip holds the model alone
    recurrence=RecurrenceConfig(remat="layer"),
    optimizer=OptimizerConfig(
        name="ellis_adam", learning_rate=4e-5, warmup_steps=4096, cooldown_steps=4096, eps=1e-6, weight_decay=4e-5
    ),
    data=DataConfig(tokenizer_size=65536, sequence_length=4096, batch_size=4096),
    checkpoint=CheckpointConfig(every=10),  # about 20 minutes on 256 chips (docs/scale.md)
    evaluation=EvaluationConfig(every=100, batches=2, depths=(1, 4, 8, 16, 32, 64)),
    steps=238_418,
)
"""The published run: 4 T tokens. Not trained yet.

Compiled for v5e:16x16, one sequence a chip, gradients in bfloat16: at most 78 % MFU (roofline, docs/pods.md).
"""

HUGINN_TPU_RUN = dataclasses.replace(HUGINN_3P5B_RUN, preset="huginn_tpu", model=HUGINN_TPU)
"""The same run in the shape for TPUs. Not trained yet."""

OURO_1P4B = RunConfig(
    preset="ouro_1p4b",
    model=ModelConfig(
        vocab_size=49152,
        embed_dim=2048,
        num_heads=16,
        mlp_dim=5632,
        prelude_layers=0,
        core_layers=24,
        coda_layers=0,
        max_length=65536,
        rope_base=1e6,
        qk_bias=False,
        tie_embeddings=False,
        embed_scale=1.0,
        mean_recurrence=4,
        backprop_depth=4,
        compute_dtype="bfloat16",
        block=Block(norm_output="branch"),
        loop=Loop(injection="none", start="embedding", close=True, bridge=False, gate=True),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    recurrence=RecurrenceConfig(scheme="fixed", remat="layer"),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, cooldown_steps=4000),
    data=DataConfig(tokenizer_size=49152, sequence_length=4096, batch_size=256),
    checkpoint=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(every=500, batches=2, depths=(1, 2, 3, 4)),
    steps=40_000,
)
"""All 24 layers looped four times, with an exit gate (arXiv 2510.25741): 1,434,652,673 parameters. Not trained yet."""

HRM_TEXT_1B = RunConfig(
    preset="hrm_text_1b",
    model=ModelConfig(
        vocab_size=65536,
        embed_dim=1536,
        num_heads=12,
        mlp_dim=4096,
        prelude_layers=0,
        core_layers=16,
        coda_layers=0,
        max_length=4096,
        rope_base=1e4,
        qk_bias=False,
        tie_embeddings=False,
        prefix_attention=True,
        mean_recurrence=2,
        backprop_depth=2,
        compute_dtype="bfloat16",
        block=Block(norm_output="none", norm_weight="none", output_gate=True),
        loop=Loop(injection="none", start="embedding", close=True, bridge=False, low_cycles=3, low_backprop=(0, 3)),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    recurrence=RecurrenceConfig(scheme="fixed", remat="layer"),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, cooldown_steps=4000),
    data=DataConfig(tokenizer_size=65536, sequence_length=4096, batch_size=256),
    checkpoint=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(every=500, batches=2, depths=(1, 2)),
    steps=40_000,
)
"""Two stacks of 16 layers: 2 times 3 low calls and a high one: 1,182,795,264 parameters. Not trained yet."""

RECURRENT_LLAMA_1B = RunConfig(
    preset="recurrent_llama_1b",
    model=ModelConfig(
        vocab_size=128256,
        embed_dim=2048,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=8192,
        prelude_layers=4,
        core_layers=6,
        coda_layers=4,
        max_length=131072,
        rope_base=5e5,
        rope_scaling=RotaryScaling(32.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        qk_bias=False,
        tie_embeddings=False,
        embed_scale=1.0,
        compute_dtype="bfloat16",
        block=Block(norm_output="none"),
        loop=Loop(start_std=(2 / (5 * 5280)) ** 0.5, bridge=False),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    recurrence=RecurrenceConfig(remat="layer"),
    optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, warmup_steps=1000, cooldown_steps=4000),
    data=DataConfig(tokenizer_size=128256, sequence_length=1024, batch_size=512),
    checkpoint=CheckpointConfig(every=100),
    steps=40_000,
)
"""A plain model of 16 layers cut into 4/6/4 (arXiv 2511.07384): 1,385,228,288 parameters. Not trained yet."""

PARCAE_140M = RunConfig(
    preset="parcae_140m",
    model=ModelConfig(
        vocab_size=32768,
        embed_dim=768,
        num_heads=6,
        mlp_dim=3072,
        core_layers=2,
        max_length=2048,
        norm_eps=1e-5,
        qk_bias=False,
        embed_scale=1.0,
        mean_recurrence=8,
        backprop_depth=4,
        value_tables=(1, 3, 5),
        value_gates=(1, 3, 5),
        initial_output="zero",
        compute_dtype="bfloat16",
        block=Block(norm_output="none", qk_norm="rotated", activation="relu2", gated=False),
        loop=Loop(
            injection="diagonal",
            start_std=(2 / (5 * 768)) ** 0.5,
            bridge=False,
            linear_bridge=True,
            entry_norm=True,
        ),
    ),
    recurrence=RecurrenceConfig(scheme="poisson-truncated-full", draw="sequence", remat="layer"),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=8e-3, b1=0.8, b2=0.95, warmup_steps=0, cooldown_steps=20_000, weight_decay=0.1
    ),
    data=DataConfig(tokenizer_size=32768, sequence_length=2048, batch_size=256),
    checkpoint=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(every=500, batches=2, depths=(1, 2, 4, 8, 16)),
    steps=40_000,
)
"""Diagonal injection and value embeddings (arXiv 2604.12946): 144,323,136 parameters, half of them looked up by token.
Not trained yet."""

FINETUNE = RunConfig(
    preset="finetune",
    model=QUICKSTART.model,  # replaced by that of the folder
    recurrence=RecurrenceConfig(remat="layer"),
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=20, cooldown_steps=200, weight_decay=0.01),
    data=DataConfig(tokenizer_size=2048, sequence_length=512, batch_size=8),
    checkpoint=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(every=100, batches=8),
    steps=500,
)
"""With --init FOLDER: a small learning rate and a short warm-up for the model in FOLDER, whose shape replaces this one.

Not measured yet.
"""

PRESETS = {
    run.preset: run
    for run in (
        QUICKSTART,
        QUICKSTART_TWIN,
        NANO,
        SMALL,
        HUGINN_3P5B_RUN,
        HUGINN_TPU_RUN,
        OURO_1P4B,
        HRM_TEXT_1B,
        RECURRENT_LLAMA_1B,
        PARCAE_140M,
        FINETUNE,
    )
}
"""Runs by name."""


def preset(name: str) -> RunConfig:
    """The preset called `name`.

    Raises:
      InputError: no such preset; the message suggests the closest.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}.{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
