"""The parallel sampler in float64 numpy, one prompt at a time, written from docs/parallel.md.

A position is a record with its token, its state and what its rule has seen; the window is a list of them. Positions
keep their keys and values in `Oracle.held`, which every recurrence overwrites.
"""

import dataclasses

import numpy as np
from oracle import Oracle, latest_value

from rdlm.config import CachePolicy


@dataclasses.dataclass
class Position:
    """A position of the window."""

    at: int
    token: int
    state: np.ndarray
    seen: list  # the states that the rule saw, the initial one first
    logits: list = dataclasses.field(default_factory=list)
    embedded: np.ndarray | float = 0.0
    ran: int = 0
    settled: int = 0


@dataclasses.dataclass
class Sampled:
    """What `sample` returns."""

    tokens: list
    steps: list
    frozen: list  # tokens that each outer step made final
    tokens_forward: int
    standing_waves: int
    windows: list  # after each outer step, (position, recurrences, state) of what is left
    close: bool  # a decision was too close to call in float32


@dataclasses.dataclass
class Draws:
    """The random parts: functions of the position, and of the outer step for the noise."""

    initial: object
    noise: object
    filler: object


class ParallelOracle(Oracle):
    """A model that keeps one recurrence."""

    def __init__(self, params, config):
        super().__init__(params, config, CachePolicy(recurrences=1))

    def embed(self, window):
        at, e = [x.at for x in window], self.w["wte"][[x.token for x in window]] * np.sqrt(self.config.embed_dim)
        for layer in range(self.config.prelude_layers):
            e = self._block(f"prelude_{layer}", 0, e, at)
        return e

    def recur(self, s, e, at):
        x = s @ self.w["adapter"][0] + e @ self.w["adapter"][1]
        for layer in range(self.config.core_layers):
            x = self._block(f"core_{layer}", 0, x, at)
        return x

    def sample(self, prompt, max_new_tokens, num_steps, parallel, kind, draws, stop=(), warm=False, min_steps=0):
        """Greedy tokens. kind: the rule, a name of `latest_value` or "fixed"; its threshold is parallel's."""
        L, V = len(prompt), self.config.vocab_size
        first = self.process(prompt, np.stack([draws.initial(i) for i in range(L)]), num_steps).logits[-1, :V]
        out = Sampled([int(first.argmax())], [num_steps], [], 0, 0, [], self.near(first))
        window = [self.enter(L, out.tokens[0], draws.initial(L))]
        while len(out.tokens) < max_new_tokens and out.tokens[-1] not in stop:
            at = [x.at for x in window]
            e = self.embed(window)
            if parallel.ema:
                e = np.stack(
                    [(1 - parallel.ema) * new + parallel.ema * x.embedded for new, x in zip(e, window, strict=True)]
                )
            s = []
            for x, new in zip(window, e, strict=True):
                x.embedded = new
                share = parallel.noise / (1 + x.ran if parallel.schedule == "damped" else 1)
                mixed = (1 - share) * x.state + (share * draws.noise(x.at, len(out.frozen)) if share else 0)
                s.append(mixed)
            s = np.stack(s)
            for _ in range(parallel.inner):
                s = self.recur(s, e, at)
            logits = self._logits(s, at)[:, :V]
            out.close |= any(map(self.near, logits))
            drawn = logits.argmax(-1).tolist()
            done = []
            for j, x in enumerate(window):
                x.state, x.ran = s[j], x.ran + parallel.inner
                x.seen.append(s[j])
                x.logits.append(logits[j])
                now = x.token if j == 0 else drawn[j - 1]
                x.settled = x.settled + parallel.inner if now == x.token else 0
                x.token = now
                done.append(self.decide(out, x, kind, parallel.threshold) and x.ran > min_steps)
            if parallel.freeze == "last":
                leave = max([j for j, d in enumerate(done) if d], default=0)
            else:
                ready = [(d or x.settled >= num_steps) and x.settled > 0 for d, x in zip(done, window, strict=True)]
                leave = ready.index(False) if False in ready else len(ready)
            out.tokens_forward += len(window) * parallel.inner
            new = len(out.tokens)
            for j in range(leave):
                if len(out.tokens) < max_new_tokens and out.tokens[-1] not in stop:
                    out.tokens.append(drawn[j])
                    out.steps.append(window[j].ran)
            out.frozen.append(len(out.tokens) - new)
            states, end = [x.state for x in window], window[-1].at + 1
            for h in range(parallel.headway):
                if len(window) - (leave if parallel.freeze == "prefix" else 0) == parallel.window:
                    out.standing_waves += 1
                    break
                token = drawn[-1] if h == 0 else draws.filler(end + h)
                behind = len(window) - parallel.headway - leave
                start = states[behind + leave] if warm and behind >= 0 else draws.initial(end + h)
                window.append(self.enter(end + h, token, start))
            window = window[leave:]
            out.windows.append([(x.at, x.ran, x.state) for x in window])
        return out

    def decide(self, out, x, kind, threshold):
        if kind == "fixed":
            return x.ran >= threshold
        value = latest_value(kind, np.array(x.seen), np.array(x.logits))
        if kind == "argmax_stability":
            return value >= threshold
        out.close |= abs(value - threshold) < 1e-3 * threshold
        return value < threshold

    @staticmethod
    def enter(at, token, state):
        return Position(at, token, state, [state])

    @staticmethod
    def near(logits):
        top = np.sort(logits)[-2:]
        return bool(top[1] - top[0] < 1e-4)
