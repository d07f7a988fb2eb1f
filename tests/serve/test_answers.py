"""What is written down of the items of a request."""

import numpy as np
import pytest

from rdlm.config import Sampling
from rdlm.serve.answers import Writer
from rdlm.serve.depth import DepthChoice
from rdlm.serve.protocol import Wanted
from rdlm.serve.scores import PromptScores
from rdlm.serve.worker import Ask, End, Token
from rdlm.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes_only()
BEGIN = TOKENIZER.encode("").tolist()


def ids_of(text):
    return TOKENIZER.encode(text, bos=False).tolist()


def items(prompt, tokens, stop):
    """What the worker hands over for an answer of these tokens."""
    yield PromptScores([-1.0] * (len(prompt) - 1), [[]] * (len(prompt) - 1))
    stream = TOKENIZER.decode_stream(after=prompt, stop=stop)
    for token in tokens:
        yield Token(stream.push(token), token, 1, -1.0)
    yield End("stop" if stream.stopped else "length", stream.end())


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("prompt", "answer", "stop", "text", "offsets"),
    [
        ("ab", "cde", (), "abcde", [0, 0, 1, 2, 3, 4]),  # the begin token, whose name is no part of the text
        ("a🦉", "b🦉c", (), "a🦉b🦉c", [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4]),
        ("a", "bcde", ("cdx",), "abcde", [0, 0, 1, 2, 3, 4]),  # held back, then shown
        ("a", "bcde", ("cde",), "ab", [0, 0, 1, 2, 2, 2]),
    ],
)
def test_offsets_of_tokens_are_places_in_the_text(prompt, answer, stop, text, offsets, streamed):
    prompt = BEGIN + ids_of(prompt)
    depth = DepthChoice("none", "none", 1, None)
    ask = Ask([np.asarray(prompt, np.int32)], [9], 1, depth, Sampling(), seed=0, stop=stop, scores=True)
    writer = Writer(ask, Wanted(chat=False, log_probs=True, token_ids=False, usage=False, echo=True), "m", TOKENIZER)
    chunks = []
    for item in items(prompt, ids_of(answer), stop):
        writer.add(0, item)
        if streamed and (chunk := writer.chunk(0)) is not None:
            chunks.append(chunk["choices"][0])
    found = chunks if streamed else writer.whole()["choices"]
    assert "".join(choice["text"] for choice in found) == text
    assert [i for choice in found for i in choice["logprobs"]["text_offset"]] == offsets
    assert sum(len(choice["logprobs"]["tokens"]) for choice in found) == len(offsets)
