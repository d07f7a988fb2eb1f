# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Write an exit rule and compare it
#
# An exit rule decides after every recurrence which tokens may stop. Here we write one in ten lines and compare it with
# fixed depths and with the rules that are there, on the model of `make quickstart`. It takes a few seconds on a CPU.
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
import jax.numpy as jnp
import numpy as np

import rdlm
from rdlm.exits import ExitRule

run = rdlm.load("runs/quickstart")
text = """Geography - note: the island has a narrow coastal plain that rises to mountains in the interior. The
climate is tropical, with a rainy season from May to October. Natural resources are fish, timber and arable land. Most
of the population lives in the capital, which is also the largest port; agriculture employs more than half of the labor
force."""
tokens = np.asarray([run.tokenizer.encode(text)[:200]])
print(tokens.shape[1], "tokens")

# %% [markdown]
# ## The rule
#
# A rule is a small class. Its fields are thresholds, and changing one compiles nothing. `init` gives what the rule
# remembers before the first recurrence. `update` sees the state of every token after a recurrence and returns what to
# remember, and a value per token. A token stops when its value is below the threshold.
#
# Ours stops a token when the *norm* of its state has settled: cheaper than comparing whole states, and perhaps too
# cheap.


# %%
class NormDiff(ExitRule):
    threshold: float = 0.01

    def init(self, s0, vocab):
        return jnp.linalg.norm(s0, axis=-1)

    def update(self, previous, seen):
        norm = jnp.linalg.norm(seen.state, axis=-1)
        return norm, jnp.abs(norm - previous) / norm


# %% [markdown]
# ## The comparison
#
# Against the model at its full depth of 16 recurrences: how many recurrences does a token take on average, and how
# often is its likeliest next token the same?

# %%
FULL = 16
forward = jax.jit(rdlm.forward, static_argnums=1)
best = forward(run.params, run.config, tokens, FULL).logits.argmax(-1)


def compare(name, num_steps=FULL, rule=None):
    out = forward(run.params, run.config, tokens, num_steps, exit_rule=rule)
    agreement = float(jnp.mean(out.logits.argmax(-1) == best))
    print(f"{name:23} {float(out.steps.mean()):5.2f} recurrences, {agreement:6.1%} as at full depth")
    return float(out.steps.mean()), agreement


results = {"fixed depth": [compare(f"r = {r}", r) for r in (1, 2, 3, 4, 6, 8)]}
rules = {"kl": rdlm.exits.kl, "latent_diff": rdlm.exits.latent_diff, "norm_diff (ours)": NormDiff}
thresholds = {"kl": (1e-1, 1e-2, 1e-3, 1e-4), "latent_diff": (0.3, 0.1, 0.03, 0.01)}
for name, make in rules.items():
    tried = thresholds.get(name, (0.01, 0.003, 0.001, 0.0003))
    results[name] = [compare(f"{name} {t:g}", rule=make(t)) for t in tried]

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3.5))
for name, points in results.items():
    axes.plot(*zip(*points, strict=True), marker="o", label=name)
axes.set(xlabel="mean recurrences", ylabel="agreement with full depth")
axes.legend()
figure.savefig("exit_rules.png", bbox_inches="tight")

# %% [markdown]
# ![agreement against mean recurrences](exit_rules.png)
#
# A rule is better where its curve lies further to the upper left. Ours is too cheap: the core ends in a norm, so all
# states have nearly the same length, and a token's length settles long before its direction does. Two things to keep
# in mind:
#
# * `kl` reads logits, so each of its checks costs coda and head. Rules on the state cost almost nothing. Fewer
#   recurrences are not always fewer FLOPs.
# * These thresholds are guesses. `experiments/calibrate_exits.py` finds one that keeps a promise on held-out text.
#
# The rule works everywhere a rule does, in generation too:

# %%
out = run.generate("Geography", max_new_tokens=24, num_steps=FULL, exit_rule=NormDiff(0.01))
print(out.text)
print(out.steps[0])
