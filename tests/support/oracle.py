"""A slow oracle of the model, its exits and its cache in float64 numpy, and random models to ask it about.

Written from the definitions: every token holds, for every layer, the keys and values it last wrote into each set; a
query looks them up token by token. Processing all tokens of a prompt in one call is the parallel pass, one token per
call is token-by-token decoding; they differ only in what earlier tokens hold when a query comes by.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rdlm.config import CachePolicy
from rdlm.model import init_params


def random_params(config, seed=0):
    """Parameters of which every one matters (random norms and biases too), and whose recurrence settles."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name, noise = jax.tree_util.keystr(path), rng.normal(size=x.shape)
        if "scale" in name:
            return 1 + 0.2 * noise
        if "bias" in name:
            return 0.5 * noise
        if "adapter" in name:
            noise[0] *= 0.5  # the half that multiplies the state
        return noise / np.sqrt(x.shape[-1] if "wte" in name or "head" in name else x.shape[-2])

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    with jax.ensure_compile_time_eval():
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), jax.tree_util.tree_map_with_path(draw, shapes))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def latest_value(kind, states, logits):
    """The value of an exit rule (docs/model.md, Exit rules) after a check, from all a token showed so far.

    states: [n + 1, D], the initial state and the state at each of n checks. logits: [n, V].
    """
    new, old = states[-1], states[-2]
    if kind == "latent_diff":
        return np.linalg.norm(new - old) / np.linalg.norm(new)
    if kind == "cosine":
        return 1 - (new / np.linalg.norm(new)) @ (old / np.linalg.norm(old))
    if kind == "argmax_stability":
        best = logits.argmax(-1).tolist()
        changes = [i for i in range(1, len(best)) if best[i] != best[i - 1]]
        return len(best) - 1 - (changes[-1] if changes else 0)
    p = np.exp(log_softmax(logits))
    uniform = np.full(p.shape[-1], 1 / p.shape[-1])
    if kind == "entropy_diff":
        entropy = -(p * np.log(p + 1e-10)).sum(-1)
        return abs(entropy[-1] - (entropy[-2] if len(entropy) > 1 else 100.0))
    if kind == "min_p_kl":
        p = np.where(p < 0.1 * p.max(-1, keepdims=True), uniform, p)
        p = p / p.sum(-1, keepdims=True)
    before = p[-2] if len(p) > 1 else uniform
    return (before * (np.log(before) - np.log(p[-1]))).sum()


@dataclasses.dataclass
class Processed:
    """What a call returns: arrays over its tokens, and how many decisions were made and how many were too close."""

    logits: np.ndarray
    state: np.ndarray
    steps: np.ndarray
    decisions: int
    close: int


class Oracle:
    """One sequence, growing by `process`."""

    def __init__(self, params, config, policy=CachePolicy()):
        self.w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.config, self.policy, self.length = config, policy, 0
        self.held = {}  # (layer, position) -> {set: (k [H, Q], v [H, Q])}

    def process(
        self, tokens, s0, num_steps, rule=None, threshold=None, min_steps=0, check_every=1, follow=None, close=1e-3,
        gate=None, twice=False, together=False,
    ):  # fmt: skip
        """Process `tokens` together behind those held.

        s0: [L, D]. num_steps: most recurrences, one number or one per token. rule: a name of `latest_value`.
        follow: steps [L] to follow in decisions closer than `close` (relative) to the threshold.
        gate: the rule is evaluated at checks where ||s - s at the check before|| / ||s|| is below; None: at all.
        twice: stop when the rule would at two evaluations in a row. together: all stop with the last token, which
        alone is asked.
        """
        cfg, L = self.config, len(tokens)
        at = np.arange(self.length, self.length + L)
        self.length += L
        num_steps = np.broadcast_to(num_steps, L)
        e = self.w["wte"][np.asarray(tokens)] * np.sqrt(cfg.embed_dim)
        for layer in range(cfg.prelude_layers):
            e = self._block(f"prelude_{layer}", 0, e, at)
        s, steps, active = np.array(s0, np.float64), np.zeros(L, int), np.ones(L, bool)
        # What the rule has seen of every token: states and logits, the state at the last check, would it have stopped?
        states, looks = [[x.copy()] for x in s], [[] for _ in s]
        checked, before, behind = s.copy(), np.zeros(L, bool), np.zeros(L, bool)
        decisions = near = 0
        for i in range(max(num_steps)):
            on = np.flatnonzero(active)
            if len(on) == 0:
                break
            x = s[on] @ self.w["adapter"][0] + e[on] @ self.w["adapter"][1]
            keep = i if self.policy.recurrences is None else i % self.policy.recurrences
            for layer in range(cfg.core_layers):
                x = self._block(f"core_{layer}", keep, x, at[on])
            s[on], steps[on], behind[on] = x, steps[on] + 1, True
            if rule is not None and i >= min_steps and (i - min_steps) % check_every == 0:
                asked = on[-1:] if together else on
                if gate is not None:
                    moved = np.linalg.norm(s[asked] - checked[asked], axis=-1) / np.linalg.norm(s[asked], axis=-1)
                    checked[asked] = s[asked]
                    decisions, near = decisions + len(asked), near + np.sum(np.abs(moved - gate) < close * gate)
                    asked = asked[moved < gate]
                if len(asked):  # the coda catches up with every state that has changed
                    late = np.flatnonzero(behind)
                    known = self._logits(s[late], at[late])[:, : cfg.vocab_size]
                    logits = dict(zip(late, known, strict=True))
                    behind[:] = False
                for t in asked:
                    states[t].append(s[t].copy())
                    looks[t].append(logits[t])
                    with np.errstate(all="ignore"):
                        value = latest_value(rule, np.array(states[t]), np.array(looks[t]))
                    if rule == "argmax_stability":
                        stop = value >= threshold
                        best = np.sort(logits[t])
                        hard = best[-1] - best[-2] < 1e-4
                    else:
                        stop = value < threshold
                        hard = abs(value - threshold) < close * threshold
                    stop, before[t] = stop and (before[t] or not twice), stop
                    decisions, near = decisions + 1, near + hard
                    if hard and follow is not None:
                        stop = follow[t] == steps[t]
                    active[slice(None) if together else t] &= not stop
            active &= steps < num_steps
        return Processed(self._logits(s, at), s, steps, decisions, near)

    def _logits(self, s, at):
        x = self._norm(s, self.w["ln_f"])
        for layer in range(self.config.coda_layers):
            x = self._block(f"coda_{layer}", 0, x, at)
        head = self.w["wte"] if self.config.tie_embeddings else self.w["head"]
        return self._norm(x, self.w["ln_f"]) @ head.T

    def _norm(self, x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps) * weight["scale"]

    def _rotate(self, x, position):
        Q = self.config.head_dim
        angle = position * self.config.rope_base ** (-np.arange(0, Q, 2) / Q)
        turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def _block(self, name, keep, x, at):
        """One layer for the tokens x [n, D] at positions `at`, which write set `keep`."""
        w, cfg = self.w[name], self.config
        mixed = self._attention(name, keep, self._norm(x, w["norm_1"]), at)
        x = self._norm(mixed @ w["attn"]["proj"] + x, w["norm_2"])
        z = self._norm(x, w["norm_3"])
        gate, up = z @ w["mlp"]["fc"][0], z @ w["mlp"]["fc"][1]
        assert gate.shape[-1] == cfg.mlp_dim
        return self._norm((gate / (1 + np.exp(-gate)) * up) @ w["mlp"]["proj"] + x, w["norm_4"])

    def _attention(self, name, keep, x, at):
        w, cfg = self.w[name]["attn"], self.config
        H, K, Q = cfg.num_heads, cfg.kv_heads, cfg.head_dim
        bias = w["qk_bias"] if cfg.qk_bias else np.zeros((2, H, Q))
        qkv = (x @ w["qkv"]).reshape(len(x), K, H // K + 2, Q)
        queries = []
        for token, position in zip(qkv, at, strict=True):
            q = token[:, :-2].reshape(H, Q)
            k, v = (np.repeat(part, H // K, axis=0) for part in (token[:, -2], token[:, -1]))
            queries.append(self._rotate(q + bias[0], position))
            mine = self.held.setdefault((name, position), {})
            mine[keep] = self._rotate(k + bias[1], position), v
        out = []
        for q, position in zip(queries, at, strict=True):
            first = max(0, position + 1 - (cfg.attention_window or position + 1))
            seen = [self._read(name, keep, p) for p in range(first, position)] + [self.held[name, position][keep]]
            k, v = (np.stack(part) for part in zip(*[kv for kv in seen if kv is not None], strict=True))
            scores = np.einsum("hq,thq->ht", q, k) / np.sqrt(Q)
            out.append(np.einsum("ht,thq->hq", np.exp(log_softmax(scores)), v).ravel())
        return np.array(out)

    def _read(self, name, keep, position):
        """What a later query that writes set `keep` sees of the token at `position`; None: it is hidden."""
        written = self.held[name, position]
        if keep in written:
            return written[keep]
        if self.policy.lookup == "skip":
            return None
        return written[max(m for m in written if m < keep)]
