"""The parallel sampler: ordinary tokens at window 1, the oracle's at any setting, the published code's by its rule."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import cases, model
from oracle import random_params
from parallel_oracle import Draws, ParallelOracle

from rdlm import exits
from rdlm.config import CachePolicy, InputError, ModelConfig, Parallel, Sampling, Speculative
from rdlm.decode import generate, parallel
from rdlm.exits import ExitRule
from rdlm.recurrence import initial_state

TINY = ModelConfig(
    vocab_size=24, embed_dim=16, num_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1, coda_layers=1,
    max_length=64, mean_recurrence=8, backprop_depth=2,
)  # fmt: skip
PARAMS = random_params(TINY, 5)
ONE_SET = CachePolicy(recurrences=1)
RAGGED = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9]]


def sampled(prompts, settings, **options):
    """`generate` in parallel."""
    return generate(PARAMS, TINY, prompts, **{"max_new_tokens": 9, "num_steps": 8, "parallel": settings, **options})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_window_of_one_gives_the_tokens_of_ordinary_decoding_for_200_prompts(temperature):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, TINY.vocab_size, rng.integers(1, 12)).tolist() for _ in range(200)]
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=temperature), "key": jax.random.key(3)}
    plain = generate(PARAMS, TINY, prompts, num_steps=8, cache=ONE_SET, **options)
    out = sampled(prompts, Parallel(window=1, inner=8), **options)
    for right, found in zip(plain.tokens, out.tokens, strict=True):
        np.testing.assert_array_equal(found, right)
    assert len({tuple(t) for t in plain.tokens}) > 100, "prompts must lead to different tokens"
    assert out.core_passes == plain.core_passes == 12 * 8
    assert (np.concatenate(out.steps) == 8).all()


start_at = jax.jit(lambda key, position: initial_state(key, position[None], TINY.embed_dim)[0])


@jax.jit
def noise_at(key, position, outer):
    return start_at(jax.random.fold_in(jax.random.fold_in(key, parallel._NOISE), outer), position)


@jax.jit
def filler_at(key, position):
    here = jax.random.fold_in(jax.random.fold_in(key, parallel._FILLER), position)
    return jax.random.randint(here, (), 0, TINY.vocab_size)


def draws(key):
    """The random parts as docs/parallel.md states them."""

    def number(function):
        return lambda *at: np.asarray(function(key, *map(jnp.int32, at)), np.float64)

    return Draws(number(start_at), number(noise_at), lambda position: int(filler_at(key, position)))


@dataclasses.dataclass
class Case:
    """Prompts, and all that is asked for them. Lists have an entry per prompt."""

    settings: Parallel  # its rule is `rule`
    rule: str
    prompts: list
    keys: jax.Array
    thresholds: list
    num_steps: list
    min_steps: list
    stop: list
    max_new_tokens: int
    warm: bool = False

    @classmethod
    def drawn(cls, rng, settings, rule, rows, warm):
        """A case at random; nothing of it compiles another program than `settings`, `rule`, `rows` and `warm` do."""
        thresholds = {
            "latent_diff": lambda: 10 ** rng.uniform(-2, 0.3),
            "kl": lambda: 10 ** rng.uniform(-4, 0),
            "argmax_stability": lambda: int(rng.integers(1, 5)),
            "fixed": lambda: int(rng.integers(1, 12)),
        }
        each = range(rows)
        return cls(
            settings=settings,
            rule=rule,
            prompts=[rng.integers(0, TINY.vocab_size, rng.integers(1, 8)).tolist() for _ in each],
            keys=jax.random.split(jax.random.key(int(rng.integers(2**31))), rows),
            thresholds=[thresholds[rule]() for _ in each],
            num_steps=rng.integers(settings.inner, 13, rows).tolist(),
            min_steps=rng.integers(0, 5, rows).tolist(),
            stop=[(int(rng.integers(TINY.vocab_size)),) for _ in each],
            max_new_tokens=int(rng.integers(2, 10)),
            warm=warm,
        )

    def made(self, **options):
        """What `generate` makes of it."""
        rule = exits.fixed(self.thresholds) if self.rule == "fixed" else getattr(exits, self.rule)(self.thresholds)
        return generate(
            PARAMS, TINY, self.prompts, max_new_tokens=self.max_new_tokens, num_steps=self.num_steps, exit_rule=rule,
            prefill_exit="never", min_steps=self.min_steps, sampling=Sampling(stop_tokens=tuple(self.stop)),
            warm_start="raw" if self.warm else False, key=self.keys,
            parallel=dataclasses.replace(self.settings, rule=None, threshold=None), **options,
        )  # fmt: skip

    def right(self, row):
        """The oracle's answer for one of the prompts."""
        settings = dataclasses.replace(self.settings, threshold=float(self.thresholds[row]))
        return ParallelOracle(PARAMS, TINY).sample(
            self.prompts[row], self.max_new_tokens, self.num_steps[row], settings, self.rule, draws(self.keys[row]),
            self.stop[row], self.warm, self.min_steps[row],
        )  # fmt: skip


def compare(case, monkeypatch):
    """Prompts that were compared with the oracle, and states; no decision of these was too close to call in float32."""
    seen = []

    def spy(*args):
        wave = parallel.advance(*args)
        p, w = wave
        outer, size, ran, states = map(np.array, (w.outer_steps, w.size, w.ran, w.states))
        for row in np.flatnonzero(~np.asarray(p.done)):  # what a finished row still computes means nothing
            seen.append((row, outer[row], size[row], ran[row], states[row]))
        return wave

    monkeypatch.setattr(sys.modules["rdlm.decode.generate"], "advance", spy)
    made, prompts, states = case.made(on_token=lambda *_: None), 0, 0
    for row in range(len(case.prompts)):
        right = case.right(row)
        if right.close:
            continue
        prompts += 1
        assert made.tokens[row].tolist() == right.tokens, case
        assert made.steps[row].tolist() == right.steps, case
        assert made.parallel.frozen[row].tolist() == right.frozen, case
        assert made.parallel.outer_steps[row] == len(right.frozen)
        assert made.parallel.tokens_forward[row] == right.tokens_forward
        assert made.parallel.standing_waves[row] == right.standing_waves
        for _, outer, size, ran, found in (x for x in seen if x[0] == row and x[1] > 0):
            window = right.windows[outer - 1]
            assert (size, ran[:size].tolist()) == (len(window), [x[1] for x in window])
            for j, (_, recurrences, state) in enumerate(window):
                if recurrences:  # a position gets its state when it first runs
                    np.testing.assert_allclose(found[j], state, atol=2e-4)
                    states += 1
    return prompts, states


KINDS = [
    ("latent_diff", "prefix", 4), ("latent_diff", "prefix", 1), ("kl", "prefix", 1), ("argmax_stability", "prefix", 4),
    ("fixed", "prefix", 4), ("latent_diff", "last", 4),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(len(KINDS)))
def test_the_oracle_gives_the_same_tokens_states_and_counters(seed, monkeypatch):
    """Everything else is drawn: what selects the program once per seed, what `Case.drawn` lists eight times."""
    rng, (rule, freeze, rows) = np.random.default_rng(seed), KINDS[seed]
    window, warm = int(rng.integers(2, 7)), bool(rng.integers(2))
    settings = Parallel(
        window=window,
        inner=int(rng.integers(1, 4)),
        headway=int(rng.integers(1, min(window, 3) + 1)),
        freeze=freeze,
        noise=float(rng.choice([0.0, rng.uniform(0, 0.6)])),
        schedule=str(rng.choice(["damped", "constant"])),
        ema=float(rng.choice([0.0, rng.uniform(0, 0.6)])),
    )
    prompts = states = 0
    for _ in range(8):
        case = Case.drawn(rng, settings, rule, rows, warm)
        if freeze == "last":  # with a low threshold it would stand still
            case.thresholds, case.min_steps = rng.uniform(1.5, 2.5, rows).tolist(), [0] * rows
        found = compare(case, monkeypatch)
        prompts, states = prompts + found[0], states + found[1]
    assert prompts >= 6 * rows
    assert states > prompts


NOISY = Parallel(window=5, inner=2, threshold=0.3, noise=0.5, headway=2)


def test_a_request_does_not_depend_on_its_batch():
    settings = NOISY
    options = {"sampling": Sampling(temperature=1.0), "max_new_tokens": 9}
    keys = jax.random.split(jax.random.key(2), 4)
    out = sampled(RAGGED, settings, key=keys, **options)
    for row, prompt in enumerate(RAGGED):  # alone among copies of another prompt: the same compiled shape
        others = [prompt if i == 3 - row else [1, 2] for i in range(4)]
        alone = sampled(others, settings, key=keys[::-1], **options)
        np.testing.assert_array_equal(alone.tokens[3 - row], out.tokens[row])
        np.testing.assert_array_equal(alone.log_probs[3 - row], out.log_probs[row])
        np.testing.assert_array_equal(alone.parallel.frozen[3 - row], out.parallel.frozen[row])
    other = sampled(RAGGED, settings, key=jax.random.key(9), **options)
    assert not np.array_equal(np.concatenate(other.tokens), np.concatenate(out.tokens))


def test_a_listener_hears_every_token_and_ends_its_prompt():
    settings, heard = Parallel(window=4, inner=2, threshold=0.2), []
    plain = sampled(RAGGED, settings)
    out = sampled(RAGGED, settings, on_token=lambda row, token, steps: heard.append((row, token, steps)) or token < 0)
    for row, tokens in enumerate(plain.tokens):
        np.testing.assert_array_equal(out.tokens[row], tokens)
        assert [h[1:] for h in heard if h[0] == row] == list(zip(tokens, plain.steps[row], strict=True))
    out = sampled(RAGGED, settings, on_token=lambda row, token, steps: row == 1)
    np.testing.assert_array_equal(out.tokens[1], plain.tokens[1][:1])
    np.testing.assert_array_equal(out.tokens[2], plain.tokens[2])


# The published code, at batch size 1. Of its cases, no_prefill is left out: it overwrites tokens of the prompt.


class PublishedDiff(ExitRule):
    """Its relative change. After m positions have left, it compares a state with that of the position m further on."""

    threshold: float
    kind = "published_diff"

    def init(self, s0, vocab):
        return s0, jnp.zeros(s0.shape[:-1], jnp.int32)

    def update(self, previous, seen):
        before, offset = previous  # both move with the window, so the first offset says how many have left
        W = before.shape[1]
        index = jnp.arange(W)[None] + offset[:, :1]
        found = jnp.take_along_axis(before, jnp.minimum(index, W - 1)[..., None], axis=1)
        value = jnp.linalg.norm(seen.state - found, axis=-1) / jnp.linalg.norm(seen.state, axis=-1)
        here = jnp.broadcast_to(jnp.arange(W)[None], index.shape)
        return (seen.state, here), jnp.where(index < W, value, jnp.nan)


class PublishedStability(exits.Reached):
    """Its token stability: in how many outer steps, not in a row, a position's token stayed as it was."""

    threshold: float
    kind = "published_stability"
    needs_logits = True

    def init(self, s0, vocab):
        return jnp.full(s0.shape[:-1], -1, jnp.int32), jnp.zeros(s0.shape[:-1], jnp.int32)

    def update(self, previous, seen):
        after, count = previous  # the token after each position; that of the first one is final
        drawn = jnp.argmax(seen.logits, axis=-1).astype(jnp.int32)
        same = jnp.pad((after == drawn)[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return (drawn, count + same), (count + same).astype(jnp.float32)


@pytest.mark.parametrize("case", ["plain", "defaults_scale0", "cc_wave", "token_stability", "fixed"])
def test_the_published_code_gives_the_same_tokens_and_counters(case):
    (params, config), entry = model("A"), cases("A")[f"diffusion/{case}"]
    given, expected, n = entry["options"], entry["arrays"]["sequences"][0], entry["max_new_tokens"]
    inner, r, prompt = given["inner_recurrence"], given["num_steps"], entry["arrays"]["input_ids"][0]
    settings = Parallel(
        window=given.get("max_wavefront", 40), inner=inner, headway=entry["headway"], freeze="last",
        ema=given.get("ema_embeds", 0.1), noise=given.get("state_noise_mixing", 0.5),
    )  # fmt: skip
    rule = {
        "latent-diff": PublishedDiff(given.get("exit_t", 0.0)),
        "token-stability": PublishedStability(r // inner + 1),
        "fixed": exits.fixed(r + inner),
    }[given["freeze_strategy"]]
    out = generate(
        params, config, [prompt], max_new_tokens=n, num_steps=r, exit_rule=rule, prefill_exit="never", init_scale=0.0,
        parallel=settings, warm_start="raw" if given.get("continuous_compute") else False,
    )  # fmt: skip
    # The published code may overshoot max_new_tokens; we never do.
    np.testing.assert_array_equal(out.tokens[0], expected[len(prompt) : len(prompt) + n])
    assert out.parallel.outer_steps[0] == entry["diffusion_steps"]
    # It counts the prefill as one pass over the prompt.
    assert out.core_passes - r == entry["num_core_forward_passes"] - 1
    assert out.parallel.tokens_forward[0] == entry["num_tokens_forward"] - len(prompt)
    assert out.parallel.standing_waves[0] == entry["num_standing_waves"]


# Refusals.

BAD_SETTINGS = [
    (dict(window=0), "window = 0"), (dict(window=2.5), "window = 2.5"), (dict(inner=0), "inner = 0"),
    (dict(headway=0), "headway = 0"), (dict(window=2, headway=3), "headway = 3"), (dict(noise=1.0), "noise = 1.0"),
    (dict(ema=-0.1), "ema = -0.1"), (dict(threshold=-1.0), "threshold = -1.0"),
    (dict(threshold=float("nan")), "threshold = nan"), (dict(rule="kll"), "rule = 'kll'"),
    (dict(schedule="linear"), "schedule = 'linear'"), (dict(freeze="all"), "freeze = 'all'"),
    (dict(window=1, freeze="last"), "window = 1"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "says"), BAD_SETTINGS)
def test_a_wrong_setting_is_refused(setting, says):
    with pytest.raises(InputError, match=rf"^Parallel\.{says}: ") as refused:
        Parallel(**setting)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache": CachePolicy(4)}, "recurrences=1"),
        ({"cache": CachePolicy(lookup="skip")}, "recurrences=1"),
        ({"speculative": Speculative(1, 2)}, "^parallel: cannot be combined with speculative"),
        ({"parallel": Parallel(inner=9)}, "inner = 9: must be at most num_steps = 8"),
        ({"parallel": Parallel(rule="fixed", threshold=0.5)}, "fixed: r = 0.5"),
        ({"parallel": 4}, "parallel = 4"),
        ({"warm_start": "normalized"}, "warm_start"),
        ({"check_every": 2}, "check_every = 2"),
        ({"exit_rule": exits.gated_kl()}, "gated_kl"),
        ({"exit_rule": exits.gate()}, "gate"),
        ({"exit_rule": exits.kl(), "parallel": Parallel(threshold=0.1)}, "exit_rule"),
        ({"sampling": Sampling(repetition_penalty=1.2)}, "repetition_penalty"),
        ({"sampling": Sampling(presence_penalty=1.0)}, "presence_penalty"),
    ],
)
def test_refusals_are_one_line(options, says):
    with pytest.raises(InputError, match=says) as refused:
        sampled(RAGGED, Parallel(window=4), **options)
    assert "\n" not in str(refused.value)


def test_a_model_with_test_time_noise_is_refused():
    noisy = dataclasses.replace(TINY, test_time_noise=0.1)
    with pytest.raises(InputError, match="test_time_noise"):
        generate(PARAMS, noisy, RAGGED, max_new_tokens=2, parallel=Parallel())


def test_a_wave_that_stands_for_ever_is_given_up():
    with pytest.raises(InputError, match=r"4096 outer steps gave prompts\[0\] only 1 tokens"):
        sampled(RAGGED, Parallel(window=4, inner=2, threshold=0.0, freeze="last"))


def test_a_prompt_whose_logits_are_not_finite_ends_with_freeze_last():
    untied = dataclasses.replace(TINY, tie_embeddings=False)
    params = random_params(untied, 5)
    options = {
        "max_new_tokens": 9,
        "num_steps": 8,
        "parallel": Parallel(window=4, inner=2, threshold=2.0, freeze="last"),
    }
    plain = generate(params, untied, RAGGED, **options).tokens[0]
    place = next(
        i for i, token in enumerate(plain) if i and token not in {*plain[:i], *np.concatenate(RAGGED).tolist()}
    )
    poisoned = {**params, "wte": params["wte"].at[plain[place]].set(jnp.nan)}
    with pytest.raises(InputError, match=r"^prompts\[\d\]: the logits of new token \d are not finite"):
        generate(poisoned, untied, RAGGED, **options)


def test_a_window_that_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"^Parallel.window = 1000000000, .*needs .* GiB .*use a smaller window"):
        sampled(RAGGED, Parallel(window=10**9))
