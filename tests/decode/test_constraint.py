"""Requests whose tokens a constraint chooses from, beside others."""

import dataclasses

import jax
import numpy as np
import pytest
from engine_cases import MANY, NEW, TINY, Ask, crowd, engine, generated, new_engine, outcome, params, submit

from rdlm.config import InputError, Parallel, Sampling, Speculative
from rdlm.decode import Engine, generate
from rdlm.decode.lanes import advance, insert
from rdlm.decode.loop import begin
from rdlm.decode.running import Running, _Made

KIND, V = "latest, kl", TINY.vocab_size


def bits(tokens):
    words = np.zeros(-(-V // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


class Only:
    """Always the same tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def allowed(self):
        return bits(self.tokens)

    def accept(self, token):
        assert token in self.tokens


class Turns:
    """Token j is j modulo 7, whatever else; what is not comes to light at once."""

    def __init__(self, fails_at=None):
        self.count, self.fails_at = 0, fails_at

    def allowed(self):
        if self.count == self.fails_at:
            raise RuntimeError("no more")
        return bits(range(self.count % 7, V, 7))

    def accept(self, token):
        self.count += 1


def in_turn(tokens):
    return [token % 7 for token in tokens] == [j % 7 for j in range(len(tokens))]


def shallow():
    """A crowd of which many tokens take one recurrence, so that a step has time for several of them."""
    some = [Sampling(), Sampling(temperature=0.9), Sampling(temperature=1.2, top_k=5, repetition_penalty=1.3)]
    return [
        dataclasses.replace(ask, sampling=some[i % 3], depth=1 + i % 4, comes=0) for i, ask in enumerate(crowd(KIND))
    ]


def served_with(constraints, batch, e=None):
    """The requests of `batch`, with a constraint or None each, and their outcomes."""
    e = engine(KIND) if e is None else e
    served = [submit(e, KIND, ask, constraint=c) for ask, c in zip(batch, constraints, strict=True)]
    e.run()
    return served, [outcome(s) for s in served]


def test_what_a_constraint_forbids_has_no_probability():
    rng, batch = np.random.default_rng(0), shallow()
    allowed = [np.sort(rng.permutation(V)[:9]).tolist() if i % 2 else None for i in range(MANY)]
    biased = [
        ask if few is None else dataclasses.replace(ask, sampling=dataclasses.replace(
            ask.sampling, logit_bias=tuple((t, -1e5) for t in range(V) if t not in few)))
        for ask, few in zip(batch, allowed, strict=True)
    ]  # fmt: skip
    served, got = served_with([few and Only(few) for few in allowed], batch)
    assert got == generated(KIND, biased)
    assert got != generated(KIND, batch)
    others = [ids for served_, few in zip(served, allowed, strict=True) if few for ids in served_.tokens]
    assert len(set(others)) > 9
    # As the model itself says: what is forbidden counts.
    whole, _ = served_with([None] * MANY, [Ask((1, 2, 3))] * MANY)
    first = whole[0].tokens[0]
    (same, other), _ = served_with([Only([first]), Only([first + 1])], [Ask((1, 2, 3))] * 2)
    assert same.log_probs[0] == whole[0].log_probs[0] > other.log_probs[0]


def test_every_token_has_a_mask_of_its_own_and_nobody_else_notices():
    batch = shallow()
    masked = [i % 3 == 0 for i in range(MANY)]
    _, free = served_with([None] * MANY, batch)
    sizes = [f._cache_size() for f in (begin, insert, advance)]
    served, together = served_with([Turns() if m else None for m in masked], batch)
    assert [f._cache_size() for f in (begin, insert, advance)] == sizes
    for i, s in enumerate(served):
        assert in_turn(s.tokens) == masked[i]
        assert len(s.tokens) == NEW
        if masked[i]:
            assert served_with([Turns()], [batch[i]])[1] == [together[i]]
        else:
            assert together[i] == free[i]


def test_generate_takes_constraints_too():
    batch = shallow()
    masked = [i % 3 == 0 for i in range(MANY)]
    _, served = served_with([Turns() if m else None for m in masked], batch)
    got = generated(KIND, batch, constraint=[Turns() if m else None for m in masked])
    assert got == served
    assert [in_turn(tokens) for tokens, _, _ in got] == masked  # so some are not


def test_on_two_copies_of_the_model():
    batch = shallow()
    masked = [i % 3 == 0 for i in range(MANY)]
    _, one = served_with([Turns() if m else None for m in masked], batch)
    served, two = served_with([Turns() if m else None for m in masked], batch, new_engine(KIND, data=2))
    assert two == one
    assert [in_turn(s.tokens) for s in served] == masked


class Heard(Only):
    """Notes what it is told."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.told = []

    def accept(self, token):
        self.told.append(token)


def test_a_constraint_hears_of_no_token_that_ends_a_text():
    end = dataclasses.replace(Ask((1, 2)), sampling=Sampling(stop_tokens=(7,)))
    one, other, whole = Heard([7]), Heard([8]), Heard([9])
    out = generated(KIND, [end, end], constraint=[one, other])
    assert [tokens for tokens, _, _ in out] == [[7], [8] * NEW]
    assert (one.told, other.told) == ([], [8] * (NEW - 1))
    third = generated(
        KIND, [end, end], constraint=[whole, None], on_token=lambda i, *_: i == 0 and len(whole.told) == 2
    )
    assert (third[0][0], whole.told) == ([9, 9, 9], [9, 9])
    with pytest.raises(RuntimeError, match="no more"):
        generated(KIND, [end, end], constraint=[None, Turns(fails_at=2)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"constraint": Turns()}, "constraint: give a list of 2, one object or None for each new text"),
        ({"constraint": [Turns(), None, None]}, "give a list of 2"),
        ({"constraint": [Only([1])] * 2}, "give a list of 2, one object"),
        ({"constraint": [Turns(), object()]}, "must be an object with the methods"),
        ({"constraint": [None, Turns()], "sampling": Sampling(min_tokens=(0, 2))}, "with Sampling.min_tokens"),
        ({"constraint": [None, Turns()], "speculative": Speculative(2, 2)}, "with speculative; leave one"),
        ({"constraint": [None, Turns()], "parallel": Parallel()}, "with parallel; leave one"),
    ],
)
def test_generate_refuses_by_name(fields, words):
    with pytest.raises(InputError, match=words):
        generate(params(), TINY, [[1], [2]], max_new_tokens=2, num_steps=2, **fields)


def test_control_masks_of_the_token_before(monkeypatch):
    monkeypatch.setattr(Running, "_allow", lambda self: None)
    (served,), _ = served_with([Turns()], shallow()[:1])
    assert not in_turn(served.tokens)


def test_a_constraint_that_fails_ends_its_own_request():
    batch = shallow()
    _, free = served_with([None] * MANY, batch)
    constraints = [None] * MANY
    constraints[2], constraints[5] = Turns(fails_at=3), Only([])
    with pytest.raises(InputError, match="allows no token"):
        served_with(constraints, batch)
    engine(KIND).run()
    constraints[2], constraints[5] = Turns(fails_at=3), None
    served, together = served_with(constraints, batch)
    assert str(served[2].error) == "no more"
    assert in_turn(served[2].tokens)
    assert len(served[2].tokens) == 3
    assert [x for i, x in enumerate(together) if i != 2] == [x for i, x in enumerate(free) if i != 2]


@pytest.mark.parametrize(
    "words", [np.zeros(1, np.uint32), np.zeros(2, np.int32), np.array([0, 2**31], np.uint32)]
)  # fmt: skip
def test_a_constraint_that_says_nothing_the_engine_can_use(words):
    constraint = Only([])
    constraint.allowed = lambda: words
    with pytest.raises(InputError, match="constraint: allows"):
        submit(engine(KIND), KIND, Ask((1,)), constraint=constraint)


def test_lanes_of_one_recurrence_wait_for_their_masks():
    e = Engine(engine(KIND).params, TINY, lanes=2, max_new_tokens=NEW, capacity=16, num_steps=1)
    served = [e.submit([3], constraint=Turns()), e.submit([3])]
    e.step()
    assert [len(s.tokens) for s in served] == [2, NEW]  # with the prompt comes a token of each
    e.run()
    assert in_turn(served[0].tokens)


def test_an_interrupted_step_draws_no_token_with_an_old_mask(monkeypatch):
    e = Engine(engine(KIND).params, TINY, lanes=2, max_new_tokens=NEW, capacity=16, num_steps=1)
    whole = e.submit([3], constraint=Turns())
    e.run()
    cut, read = e.submit([3], constraint=Turns()), _Made.read
    e.step()

    def interrupted(lanes):
        read(lanes)
        raise KeyboardInterrupt

    for _ in range(2):
        monkeypatch.setattr(_Made, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            e.step()
        monkeypatch.setattr(_Made, "read", read)
        e.step()
    e.run()
    assert cut.tokens == whole.tokens
    assert in_turn(cut.tokens)


def test_refused_beside_a_constraint():
    e = engine(KIND)
    with pytest.raises(InputError, match="constraint: cannot be combined with Sampling"):
        submit(e, KIND, Ask((1,), sampling=Sampling(min_tokens=2)), constraint=Turns())
    for nothing in (object(), Turns):
        with pytest.raises(InputError, match="must be an object with the methods"):
            submit(e, KIND, Ask((1,)), constraint=nothing)
    with pytest.raises(InputError, match="constraint: every request needs one of its own"):
        e.samples((1,), 2, jax.random.key(0), constraint=Turns())
