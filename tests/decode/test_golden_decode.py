"""Decoding: the public reference's cases replayed, token by token and with its exits, lookups and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import LOGITS, cases, model, of_kind

from rdlm import exits
from rdlm.config import CachePolicy, Sampling
from rdlm.decode import decode_step, generate, prefill, probabilities
from rdlm.decode.sampling import as_arrays

# The reference's lookups that we offer (docs/semantics.md, Cache policy). `full` hides tokens that stopped earlier.
POLICIES = {"full": CachePolicy(lookup="skip"), "skip": CachePolicy(lookup="skip")}
POLICIES |= {"latest-m4": CachePolicy(), "available-m4": CachePolicy()}
for slots in (4, 8, 16):  # of the four core layers of model A
    POLICIES |= {f"{name}-compress-s{slots}": CachePolicy(slots // 4) for name in ("latest-m4", "full")}
RULES = {
    "kl": exits.kl,
    "minp-kl": exits.min_p_kl,
    "entropy-diff": exits.entropy_diff,
    "latent-diff": exits.latent_diff,
    "cosine": exits.cosine,
    "argmax-stability": exits.argmax_stability,
}


def lookup(entry):
    """The reference's name of the cache lookup of a case."""
    return entry.get("options", {}).get("cache_lookup_strategy", entry.get("lookup"))


def offered(*kinds):
    """Cases whose lookup we offer, but the one that pins stale logits, a defect we do not copy."""
    found = of_kind(*kinds, models=("A", "A2"))
    return [(m, c) for m, c in found if lookup(cases(m)[c]) in POLICIES and "stale" not in c]


def test_every_case_is_replayed():
    left_out = {c for c, e in cases("A").items() if (lookup(e) or "full") not in POLICIES}
    assert {c for c in left_out if not c.startswith("diffusion")} == {
        "mixed_depth/always-last-m4", "mixed_depth/latest-m4-compress-anchor",
        "lookup/latest-m4-compress-r4_r6", "lookup/latest-m4-compress-anchor_r11",
    }  # fmt: skip
    numbers = [len(offered(kind)) for kind in ("mixed_depth", "lookup", "adaptive", "adaptive_opt")]
    assert numbers == [7 + 1, 11 + 2, 12 + 6, 5]


start = jax.jit(prefill, static_argnums=1, static_argnames=("cache", "capacity", "max_steps"))
step = jax.jit(decode_step, static_argnums=1, donate_argnums=2)


def prefilled(name, arrays, length, r, policy):
    """The first `length` tokens of a case in one pass, padded to rows of 8."""
    (params, config), given = model(name), arrays.get("sequences", arrays.get("input_ids"))
    tokens, state = np.zeros((len(given), 8), np.int32), np.zeros((len(given), 8, config.embed_dim), np.float32)
    tokens[:, :length], state[:, :length] = given[:, :length], arrays["input_states"][:, :length]
    return start(params, config, tokens, jnp.int32(r), lengths=np.full(len(given), length), state=state,
                 cache=policy, capacity=32, max_steps=8)  # fmt: skip


@pytest.mark.parametrize(("name", "case"), offered("decode"))
def test_cached_decoding(name, case):
    (params, config), entry = model(name), cases(name)[case]
    arrays, r = entry["arrays"], entry["num_steps"]
    out, cache = prefilled(name, arrays, 7, r, POLICIES[entry["lookup"]])
    np.testing.assert_allclose(out.logits[:, :7], arrays["prefill_logits"], **LOGITS)
    logits = [out.logits[0, 6]]
    for t in range(7, 30):
        out, cache = step(params, config, cache, arrays["sequences"][:, t], jnp.int32(r),
                          state=arrays["input_states"][:, t])  # fmt: skip
        logits.append(out.logits[0])
    np.testing.assert_allclose(np.stack(logits), arrays["step_logits"], **LOGITS)
    np.testing.assert_allclose(out.latents.ravel(), arrays["last_latents"].ravel(), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("name", "case"), offered("mixed_depth"))
def test_mixed_depths(name, case):
    (params, config), entry = model(name), cases(name)[case]
    arrays = entry["arrays"]
    out, cache = prefilled(name, arrays, 5, entry["prefill_steps"], POLICIES[entry["lookup"]])
    logits = [out.logits[0, 4]]
    for t, r in enumerate(entry["steps"], start=5):
        out, cache = step(params, config, cache, arrays["input_ids"][:, t], jnp.int32(r),
                          state=arrays["input_states"][:, t])  # fmt: skip
        logits.append(out.logits[0])
    np.testing.assert_allclose(np.stack(logits), arrays["logits"], **LOGITS)


@pytest.mark.parametrize(("name", "case"), of_kind("chunked"))
def test_prefill_in_chunks(name, case):
    (params, config), entry = model(name), cases(name)[case]
    arrays, split = entry["arrays"], entry["split"]
    first, cache = prefilled(name, arrays, split, entry["num_steps"], POLICIES["full"])
    second, _ = step(params, config, cache, arrays["input_ids"][:, split:], jnp.int32(entry["num_steps"]),
                     state=arrays["input_states"][:, split:])  # fmt: skip
    logits = np.concatenate([first.logits[:, :split], second.logits], axis=1)
    np.testing.assert_allclose(logits, arrays["logits"], **LOGITS)


def replay(name, case, **options):
    """`generate` on a case: (tokens, steps), and what the reference made of it."""
    (params, config), entry = model(name), cases(name)[case]
    arrays = entry["arrays"]
    n = arrays["sequences"].shape[1] - arrays["input_ids"].shape[1]
    out = generate(params, config, list(arrays["input_ids"]), max_new_tokens=n, init_scale=0.0,
                   cache=POLICIES[lookup(entry)], **options)  # fmt: skip
    return out.tokens[0].tolist(), out.steps[0].tolist(), arrays["sequences"][0, -n:].tolist()


@pytest.mark.parametrize(("name", "case"), offered("lookup", "continuous_compute"))
def test_greedy_decoding(name, case):
    entry = cases(name)[case]
    warm = "normalized" if entry["kind"] == "continuous_compute" else False
    tokens, steps, expected = replay(name, case, num_steps=entry["num_steps"], warm_start=warm)
    assert tokens == expected
    assert set(steps) == {entry["num_steps"]}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), offered("adaptive", "adaptive_opt"))
def test_adaptive_decoding(name, case):
    entry = cases(name)[case]
    options = entry.get("options", {})
    tokens, steps, expected = replay(
        name, case, num_steps=entry["max_steps"], exit_rule=RULES[entry["criterion"]](entry["threshold"]),
        prefill_exit="never" if options.get("do_not_exit_in_prefill") else "together",
        min_steps=options.get("min_steps", 0), check_every=options.get("check_criterion_every_n_steps", 1),
        warm_start="raw" if options.get("continuous_compute") else False,
    )  # fmt: skip
    assert tokens == expected
    assert steps == entry["arrays"]["steps"].tolist()
    assert len(set(steps)) > 1


def sampling_rows(entry):
    """(present [B, V], Sampling as arrays) of a sampling case."""
    arrays, options = entry["arrays"], {k: v for k, v in entry["options"].items() if v is not None}
    present = np.zeros(arrays["logits"].shape, bool)
    for row, history in zip(present, arrays["history"], strict=True):
        row[history] = True
    return present, jax.device_put(as_arrays(Sampling(**options), len(present)))


@pytest.mark.parametrize(("name", "case"), of_kind("sampling"))
def test_sampling_probabilities(name, case):
    entry = cases(name)[case]
    present, options = sampling_rows(entry)
    ours = probabilities(jnp.asarray(entry["arrays"]["logits"]), jnp.asarray(present), options)
    np.testing.assert_allclose(ours, entry["arrays"]["probs"], atol=1e-6, rtol=1e-4)
