# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Train a toy and read its depth curve
#
# A model of 132,000 parameters learns the running parity of 8 bits. Every token sees only itself and the one
# before it, so information about earlier bits has to travel through recurrences. Afterwards the same weights solve
# words of 16 and 32 bits, if they may take more recurrences. It takes under a minute on a CPU.
#
# In a hosted notebook (Colab or Kaggle, with a TPU if one is free) upload the repository as the folder `rdlm-source`
# first. The next cell installs it there and does nothing elsewhere.

# %%
import os
import subprocess
import sys

if os.path.isdir("rdlm-source"):
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "./rdlm-source[plots]"], check=True)

# %%
import jax
import jax.numpy as jnp
import optax

import rdlm
from rdlm.recurrence import sample_steps
from rdlm.tasks import WordProblem, batch

# %% [markdown]
# The task: `BOS b1 ... b8`, and after every bit the parity of the bits so far. Instances are functions of
# (seed, index), so data never run out.

# %%
task = WordProblem("Z2", length=8)
example = batch(task, seed=0, index=0, size=1)
print("bits    ", example["tokens"][0, 1:])
print("answers ", example["labels"][0, 1:])

# %% [markdown]
# The model: one layer each of prelude, core and coda, with the core run 8 times on average in training.

# %%
config = rdlm.ModelConfig(
    vocab_size=task.vocab_size,
    embed_dim=64,
    num_heads=4,
    mlp_dim=128,
    prelude_layers=1,
    core_layers=1,
    coda_layers=1,
    mean_recurrence=8,
    backprop_depth=4,
    attention_window=2,
)
params = rdlm.init_params(config, jax.random.key(0))
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# A training step draws (n, k), runs n recurrences without gradient and k with, and updates the weights. Both numbers
# are traced, so this compiles once.

# %%
STEPS = 300
rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, warmup_steps=50, decay_steps=STEPS, end_value=1e-4)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01))


@jax.jit
def train_step(params, moments, data, key):
    depth_key, state_key = jax.random.split(key)
    steps = sample_steps(depth_key, config.mean_recurrence, config.backprop_depth)
    row_keys = jax.random.split(state_key, len(data["tokens"]))  # every row starts from noise of its own
    loss, gradients = jax.value_and_grad(rdlm.loss)(params, config, data, steps=steps, key=row_keys)
    updates, moments = optimizer.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, loss


moments = optimizer.init(params)
for i in range(STEPS):
    made = batch(task, seed=0, index=i, size=64)
    data = {"tokens": jnp.asarray(made["tokens"]), "labels": jnp.asarray(made["labels"])}
    params, moments, loss = train_step(params, moments, data, jax.random.key(i))
    if i % 50 == 0 or i + 1 == STEPS:
        print(f"step {i:3}: loss {loss:.3f}")

# %% [markdown]
# Now the depth curve: accuracy over all answers, on words of the training length, twice and four times that. Only r
# changes; the weights stay.

# %%
DEPTHS = (1, 2, 4, 8, 16, 32, 64)


@jax.jit
def accuracy(tokens, labels, r):
    said = rdlm.forward(params, config, tokens, r).logits.argmax(-1)
    return jnp.sum((said == labels) & (labels >= 0)) / jnp.sum(labels >= 0)


curves = {}
for length in (8, 16, 32):
    test = batch(WordProblem("Z2", length), seed=1_000_000, index=0, size=128)
    curves[length] = [float(accuracy(test["tokens"], test["labels"], r)) for r in DEPTHS]
    print(f"{length:2} bits:", "  ".join(f"r={r} {a:.2f}" for r, a in zip(DEPTHS, curves[length], strict=True)))

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3.5))
for length, curve in curves.items():
    axes.plot(DEPTHS, curve, marker="o", label=f"{length} bits")
axes.axvline(config.mean_recurrence, color="gray", linestyle=":", label="mean r of training")
axes.set(xscale="log", xticks=DEPTHS, xticklabels=DEPTHS, xlabel="recurrences r", ylabel="accuracy")
axes.legend()
figure.savefig("depth_curve.png", bbox_inches="tight")

# %% [markdown]
# ![accuracy against r](depth_curve.png)
#
# At r = 8 the model solves the length it was trained on. Longer words need more recurrences: each one carries the
# parity one bit further. Nothing but r has changed. The study "Depth and length" has five seeds and three more tasks.
#
# Things to try: `attention_window=None` (the model then learns a shortcut, and depth buys little), a smaller
# `mean_recurrence`, or the group S3 (`WordProblem("S3", 16)`, with a window of 5 and some 1,000 steps).
