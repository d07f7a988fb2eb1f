"""Decoding from a cache of int8: the same whoever else is served and in whatever way, and never widened as a whole."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from engine_cases import NEW, TINY, R, alone, crowd, generated, new_engine, outcome, params, serve

from rdlm import exits
from rdlm.config import CachePolicy, Parallel, Speculative
from rdlm.decode import decode_step, generate, prefill
from rdlm.decode.loop import Sizes, decode_tokens, progress_shapes
from rdlm.decode.requests import RequestOptions, as_requests
from rdlm.model import forward, init_params, tensor_parallel

INT8 = CachePolicy(dtype="int8")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [7], [9, 8, 30]]


def tokens(prompts=PROMPTS, model=None, **options):
    model = (params(), TINY) if model is None else model
    out = generate(*model, prompts, max_new_tokens=NEW, num_steps=R, **{"cache": INT8, **options})
    rows = zip(out.tokens, out.steps, out.prompt_steps, strict=True)
    return [tuple(x.tolist() for x in row) for row in rows]


def test_a_row_of_a_batch_is_the_row_alone():
    for options in ({}, {"exit_rule": exits.kl(0.01)}, {"exit_rule": exits.latent_diff(0.2), "warm_start": "raw"}):
        assert tokens(**options) == [tokens([prompt], **options)[0] for prompt in PROMPTS]


def test_an_engine_gives_what_generate_gives():
    batch = crowd("int8")
    whole = generated("int8", batch)
    assert len({r for _, steps, _ in whole for r in steps}) > 3
    e = new_engine("int8", page_size=2, cache_tokens=40, prefill_chunk=3, prompt_cache=10**8)
    found = [outcome(s) for s in serve("int8", batch, e)]
    assert e.preempted > 0
    assert e.prompt_cache_bytes > 0
    one = new_engine("int8", page_size=2, cache_tokens=40, prefill_chunk=3)
    assert found[:6] == [alone("int8", ask, one) for ask in batch[:6]], "in one shape exact as ever"
    # Between shapes an activation may round to another integer.
    same, control = (
        np.mean([ours == theirs for ours, theirs in zip(other, whole, strict=True)])
        for other in (found, generated("latest, kl", batch))
    )
    assert same >= 0.95
    assert control < 0.9


def test_what_is_read_is_what_one_pass_rounds():
    text, r = jnp.array([[1, 2, 3, 4, 5, 6]]), 8
    read = jax.jit(lambda params, text, policy: forward(params, TINY, text, r, cache=policy).logits, static_argnums=2)
    begin = jax.jit(lambda params, text: prefill(params, TINY, text, r, cache=INT8, capacity=8))
    step = jax.jit(lambda params, cache, token: decode_step(params, TINY, cache, token, r))
    whole, (out, cache) = read(params(), text, INT8), begin(params(), text[:, :2])
    found = [out.logits]
    for at in range(2, 6):
        out, cache = step(params(), cache, text[:, at])
        found.append(out.logits[:, None])
    assert cache.core[0].k.dtype == jnp.int8
    off = np.abs(jnp.concatenate(found, 1) - whole).max()
    control = np.abs(read(params(), text, CachePolicy()) - whole).max()
    assert off < control / 10


def test_other_ways_to_decode():
    plain = tokens()
    fast = tokens(speculative=Speculative(2, 3))
    assert [row[:2] for row in fast] == [row[:2] for row in plain]
    one_set = tokens(cache=CachePolicy(1, dtype="int8"))
    window = tokens(parallel=Parallel(window=1, inner=R, threshold=0.0))
    assert [row[0] for row in window] == [row[0] for row in one_set]
    rule = {"exit_rule": exits.latent_diff(0.2)}
    assert tokens(model=tensor_parallel(params(), TINY, 2), **rule) == tokens(**rule)


def floats(policy, B=4, T=512, r=4):
    """(Elements of the largest array of floats in the compiled token loop, of a layer's keys of all recurrences)."""
    config = dataclasses.replace(TINY, max_length=T, embed_dim=64, mlp_dim=32, num_heads=2, num_kv_heads=2)
    request, _ = as_requests(config, [[1]] * B, 8, RequestOptions(num_steps=r))
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    progress = progress_shapes(shapes, config, request, Sizes(policy, r, T, 16))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    text = decode_tokens.lower(shapes, config, progress, request, number, number, False).compile().as_text()
    found = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in found), B * T * config.key_value_widths[0]


def test_no_copy_of_the_cache_is_widened():
    largest, one_set = floats(INT8)
    assert largest <= one_set / 2
    plain, _ = floats(CachePolicy())
    assert plain >= 4 * one_set  # control
