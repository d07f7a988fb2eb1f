# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Follow the latent states of a sentence
#
# What happens to a sentence while the core runs over it? We take every state, see when each token settles, what the
# model would say if it stopped early, and whether the noise it started from matters. The model is that of
# `make quickstart`. It takes a few seconds on a CPU.
#
# In a hosted notebook (Colab or Kaggle, with a TPU if one is free) upload the repository as the folder `rdlm-source`
# first. The next cell installs it there, trains the quickstart, and does nothing elsewhere.

# %%
import os
import subprocess
import sys

if os.path.isdir("rdlm-source"):
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "./rdlm-source[plots]", "-r", "rdlm-source/requirements-corpus.txt"], check=True)
    subprocess.run([sys.executable, "rdlm-source/experiments/train.py", "quickstart"], check=True)

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import rdlm
from rdlm.analysis import classify, distances, pca, settled_after
from rdlm.recurrence import trajectory

run = rdlm.load("runs/quickstart")
ids = run.tokenizer.encode("Geography - note: the island has a narrow coastal plain")
names = [run.tokenizer.decode([i]) for i in ids]
tokens = np.asarray([ids])

# %% [markdown]
# ## Every state
#
# `rdlm.bind` puts the model over a text: `bound.s0` is the initial state, `bound.step` one recurrence and `bound.read`
# turns a state into logits. The drivers in `rdlm.recurrence` do the rest; `trajectory` keeps every state.

# %%
R = 64
bound = rdlm.bind(run.params, run.config, tokens)
path = trajectory(bound.step, bound.s0, R)  # [R + 1, B, L, D]
states = np.asarray(path)[:, 0]
print(states.shape)

# %% [markdown]
# ## When does a token settle?
#
# The state after 64 recurrences stands for the limit. A token has settled when it stays within 1 % of it.

# %%
distance = distances(states)  # relative distance to the limit, [R + 1, L]
for name, after, token in zip(names, settled_after(distance), states.transpose(1, 0, 2), strict=True):
    print(f"{name!r:15} within 1 % after {after:2} recurrences: {classify(token).kind}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
left.semilogy(np.maximum(distance, 1e-7))
left.set(xlabel="recurrence", ylabel="distance to the limit", title="every token")
points, _ = pca(states[:, -1])
right.plot(points[:, 0], points[:, 1], marker="o", markersize=3)
right.set(xlabel="first component", ylabel="second component", title=f"path of {names[-1]!r}")
figure.tight_layout()
figure.savefig("latent_states.png")

# %% [markdown]
# ![distances to the limit, and the path of the last token](latent_states.png)
#
# ## What would it have said?
#
# Any state can be read, so we can ask what the model would have said after i recurrences.

# %%
for i in (1, 2, 4, 8, R):
    logits, _ = bound.read(path[i])
    said = run.tokenizer.decode([int(logits[0, -1].argmax())])
    print(f"after {i:2} recurrences, the next token would be {said!r}")

# %% [markdown]
# ## Does the initial noise matter?
#
# Every token starts from noise. Start from other noise and measure how far apart the two runs are.

# %%
other = rdlm.bind(run.params, run.config, tokens, key=jax.random.key(1))
others = np.asarray(trajectory(other.step, other.s0, R))[:, 0]
apart = np.linalg.norm(states - others, axis=-1).mean(-1)
for i in (0, 1, 2, 4, 8, 16, R):
    print(f"after {i:2} recurrences the two are {apart[i] / apart[0]:.1e} of their first distance apart")

# %% [markdown]
# If the distance falls towards zero, the model forgets its noise: the limit depends on the text alone. Larger models
# are less tidy, and the paper shows orbits and drifting states for some tokens. `experiments/trajectories.py` asks six
# such questions of any run folder and draws the answers.
