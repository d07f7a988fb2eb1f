"""What the assistant says in published chat templates, marked by hand: [[...]] is scored."""

import itertools

import numpy as np
import pytest

from rdlm.config import InputError
from tests.support import chat_templates as published

SYSTEM = {"role": "system", "content": "Be brief. "}
TURNS = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "It is 2. "},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes: é."},
]
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
OURO = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
BRIEF = "<|im_start|>system\nBe brief. <|im_end|>\n"
CHATML = (
    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[[It is 2. <|im_end|>]]\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[[Yes: é.<|im_end|>]]\n"
)
THINKING = CHATML.replace("[[Yes", "[[<think>\n\n</think>\n\nYes")
LLAMA = (
    "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[It is 2.<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes: é.<|eot_id|>]]"
)
LLAMA_BRIEF = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
LLAMA_REPLY = "<|start_header_id|>assistant<|end_header_id|>\n\n"
DATES = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
HUGINN = (
    "<|begin_header|>user<|end_header|>\n\n1+1?<|end_turn|>"
    "<|begin_header|>Huginn<|end_header|>\n\n[[It is 2.<|end_turn|>]]"
    "<|begin_header|>user<|end_header|>\n\nSure?<|end_turn|>"
    "<|begin_header|>Huginn<|end_header|>\n\n[[Yes: é.<|end_turn|>]]<|end_text|>"
)
HUGINN_BRIEF = "<|begin_header|>system<|end_header|>\n\nBe brief.<|end_turn|>"


def marked(tokenizer, messages):
    """The conversation as the template writes it, with the scored tokens in [[...]]."""
    ids, scored = tokenizer.encode_conversation(messages, reply=False)
    np.testing.assert_array_equal(ids, tokenizer.encode_chat(messages, reply=False))
    edges = [0, *(np.flatnonzero(scored[1:] != scored[:-1]) + 1), len(ids)]
    runs = [(tokenizer.decode(ids[a:b], skip_special=False), scored[a]) for a, b in itertools.pairwise(edges)]
    return "".join(f"[[{text}]]" if said else text for text, said in runs)


@pytest.mark.parametrize(
    ("tokenizer", "alone", "with_system"),
    [
        pytest.param(published.smollm2, SMOL + CHATML, BRIEF + CHATML, id="smollm2"),
        pytest.param(published.ouro, OURO + CHATML, BRIEF + CHATML, id="ouro"),
        pytest.param(published.qwen3, THINKING, BRIEF + THINKING, id="qwen3"),
        pytest.param(
            published.llama3, "<|begin_of_text|>" + LLAMA, "<|begin_of_text|>" + LLAMA_BRIEF + LLAMA, id="llama3"
        ),
        pytest.param(
            lambda: published.llama3(published.LLAMA3_FIRST),
            "<|begin_of_text|>" + LLAMA + LLAMA_REPLY,
            "<|begin_of_text|>" + LLAMA_BRIEF + LLAMA + LLAMA_REPLY,
            id="llama3, always asking for a reply",
        ),
        pytest.param(
            lambda: published.llama3(published.LLAMA32),
            "<|begin_of_text|>" + DATES + "<|eot_id|>" + LLAMA,
            "<|begin_of_text|>" + DATES + "Be brief.<|eot_id|>" + LLAMA,
            id="llama3.2",
        ),
        pytest.param(
            published.huginn, "<|begin_text|>" + HUGINN, "<|begin_text|>" + HUGINN_BRIEF + HUGINN, id="huginn"
        ),
    ],
)
def test_the_assistants_words_are_those_marked_by_hand(tokenizer, alone, with_system):
    tokenizer = tokenizer()
    assert marked(tokenizer, TURNS) == alone
    assert marked(tokenizer, [SYSTEM, *TURNS]) == with_system
    assert "[[" not in marked(tokenizer, [SYSTEM, TURNS[0]])


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (published.MISTRAL, ["[INST]", "[/INST]"],
         "<|begin_text|>[INST] 1+1? [/INST][[It is 2. <|end_text|>]][INST] Sure? [/INST][[Yes: é.<|end_text|>]]"),
        (published.GEMMA, ["<start_of_turn>", "<end_of_turn>"],
         "<|begin_text|><start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n[[It is 2.<end_of_turn>]]\n"
         "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n[[Yes: é.<end_of_turn>]]\n"),
        (published.PHI3, ["<|user|>", "<|assistant|>", "<|end|>"],
         "<|user|>\n1+1?<|end|>\n<|assistant|>\n[[It is 2. <|end|>]]\n"
         "<|user|>\nSure?<|end|>\n<|assistant|>\n[[Yes: é.<|end|>]]\n<|end_text|>"),
        (published.VICUNA, [],
         "USER: 1+1? ASSISTANT:[[ It is 2. <|end_text|>]]USER: Sure? ASSISTANT:[[ Yes: é.<|end_text|>]]"),
    ],
    ids=["mistral", "gemma", "phi3", "vicuna"],
)  # fmt: skip
def test_so_are_those_of_other_forms(template, special, expected):
    tokenizer = published.by_bytes(template, *special)
    assert marked(tokenizer, TURNS) == expected
    assert marked(tokenizer, TURNS[:2]) == expected.partition("]]")[0] + "]]" + (
        "\n" * (template is published.GEMMA) or "\n<|end_text|>" * (template is published.PHI3)
    )


def think(thoughts, words, **more):
    return {"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{words}", **more}


CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param(  # thoughts of earlier turns are not in the text, so they are not scored
            [TURNS[0], think("one and one", "2"), TURNS[2], think("I am", "Yes")],
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[[2<|im_end|>]]\n"
            "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
            "[[<think>\nI am\n</think>\n\nYes<|im_end|>]]\n",
            id="thoughts in the content",
        ),
        pytest.param(
            [TURNS[0], {"role": "assistant", "content": "2", "reasoning_content": "add"}, TURNS[2]],
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n[[2<|im_end|>]]\n"
            "<|im_start|>user\nSure?<|im_end|>\n",
            id="thoughts in a field",
        ),
        pytest.param(
            [TURNS[0], think("call", "", tool_calls=[CALL]), {"role": "tool", "content": "2"}, think("so", "2")],
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
            f"[[<think>\ncall\n</think>\n\n{CALLED}<|im_end|>]]\n"
            "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
            "[[<think>\nso\n</think>\n\n2<|im_end|>]]\n",
            id="calls and thoughts",
        ),
        pytest.param(  # a question that follows takes the thoughts from several turns
            [TURNS[0], think("call", "I add", tool_calls=[CALL]), {"role": "tool", "content": "2"}, think("so", "2"),
             TURNS[2], think("I am", "Yes")],
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
            f"[[I add\n{CALLED}<|im_end|>]]\n"
            "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n[[2<|im_end|>]]\n"
            "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
            "[[<think>\nI am\n</think>\n\nYes<|im_end|>]]\n",
            id="calls and a question",
        ),
    ],
)  # fmt: skip
def test_thoughts_are_scored_where_the_template_writes_them(messages, expected):
    assert marked(published.qwen3(), messages) == expected


def test_a_call_is_what_the_assistant_says_and_its_result_is_not():
    messages = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        TURNS[1],
    ]
    assert marked(published.llama3(published.LLAMA32), messages).partition("1+1?<|eot_id|>")[2] == (
        '<|start_header_id|>assistant<|end_header_id|>\n\n[[{"name": "add", "parameters": {"a": 1}}<|eot_id|>]]'
        "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[It is 2.<|eot_id|>]]"
    )


@pytest.mark.parametrize("words", ["<|im_end|>", "x<|im_end|>\n<|im_start|>assistant\ny", "", "user"])
def test_words_that_spell_the_template_do_not_move_what_is_scored(words):
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}, *TURNS[2:]]
    said = f"[[{words}<|im_end|>]]" if words else "<|im_end|>"  # an empty reply is not scored
    tokenizer = published.smollm2()
    assert marked(tokenizer, messages) == (
        f"{SMOL}<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n{said}\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n[[Yes: é.<|im_end|>]]\n"
    )


@pytest.mark.parametrize("tokenizer", [published.smollm2, published.qwen3, published.huginn, published.llama3])
def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    tokenizer = tokenizer()
    text = marked(tokenizer, TURNS[1:])
    assert [part.partition("]]")[0].partition("<|")[0].strip() for part in text.split("[[")[1:]] in (
        ["It is 2.", "Yes: é."],
        ["It is 2.", "<think>\n\n</think>\n\nYes: é."],
    )


@pytest.mark.parametrize(
    ("written", "instead"),
    [  # thoughts are asked for that the past does not hold; earlier replies are written in other words
        ("assistant\\n' }}\n    {%- if en", "assistant\\n<think>\\n' }}\n    {%- if en"),
        ("'\\n' + content }}\n        {%- endif %}", "'\\n' + content | upper }}\n        {%- endif %}"),
    ],
)
def test_a_template_in_which_replies_cannot_be_found_is_refused(written, instead):
    assert published.QWEN3.count(written) == 1
    template = published.QWEN3.replace(written, instead)
    tokenizer = published.by_bytes(template, *published.CHATML_TOKENS, eos="<|im_end|>")
    assert tokenizer.encode_chat(TURNS, reply=False).size
    with pytest.raises(
        InputError, match=r"chat template .*so what the assistant says in message 1 cannot be found; put {%"
    ):
        tokenizer.encode_conversation(TURNS, reply=False)


def test_a_header_without_special_tokens_is_not_scored():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    with pytest.raises(InputError, match="what the assistant says in message 1 cannot be found"):
        published.by_bytes(template).encode_conversation(TURNS[:2], reply=False)
    conditional = template.replace("assistant: ", "{% if add_generation_prompt %}assistant: {% endif %}")
    assert marked(published.by_bytes(conditional), TURNS[:2]) == "user: 1+1?\nassistant: [[It is 2. \n]]"
