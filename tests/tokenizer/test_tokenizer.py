"""The tokenizer: exact, deterministic, and never fooled by text that looks like a special token."""

import json
import random
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from rdlm.config import InputError
from rdlm.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support import foreign_tokenizers

TREES = ["ash", "birch", "cedar", "elm", "hazel", "hornbeam", "maple", "oak", "pine", "rowan", "willow", "yew"]
TEXTS = [
    f"{tree} {i}: the café at {tree}stead, near {TREES[i % 7]}ford, sells {i * 7} kinds of green and black tea\n"
    "🙂🇫🇷, naïve & 日本語\n\n"
    for i, tree in enumerate(TREES * 4)
]
TOKENIZER = Tokenizer.train(TEXTS, 384)
BYTES = Tokenizer.bytes_only()
LOADED: dict[str, Tokenizer] = {}
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))  # everything but lone surrogates


# Training


@pytest.mark.parametrize("size", [263, 300, 384])
def test_vocabulary_has_exactly_the_size_asked_for(size):
    tokenizer = Tokenizer.train(TEXTS, size)
    assert tokenizer.vocab_size == size == len(tokenizer._backend.get_vocab())


def test_training_is_deterministic():
    again, other = Tokenizer.train(iter(TEXTS), 384), Tokenizer.train(TEXTS[:-6], 384)
    assert again._backend.to_str() == TOKENIZER._backend.to_str()
    assert again.hash == TOKENIZER.hash != other.hash


@pytest.mark.parametrize(("size", "match"), [(100, "at least 262"), (10_000, "yield only")])
def test_a_size_that_cannot_be_reached_is_refused(size, match):
    with pytest.raises(InputError, match=match) as caught:
        Tokenizer.train(TEXTS, size)
    assert "\n" not in str(caught.value)


def test_special_tokens_are_the_references():
    assert list(TOKENIZER.special_ids) == list(SPECIAL_TOKENS)
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id) == (0, 1, 5)


# Encoding and decoding


@given(UNICODE)
def test_any_text_survives_the_round_trip_and_its_bytes_are_counted(text):
    ids = TOKENIZER.encode(text, bos=True, eos=True)
    assert ids.dtype == np.int32
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.token_bytes[ids].sum() == len(text.encode())


def test_begin_and_end_are_added_as_asked():
    plain = TOKENIZER.encode("oak", bos=False)
    np.testing.assert_array_equal(TOKENIZER.encode("oak"), [0, *plain])
    np.testing.assert_array_equal(TOKENIZER.encode("oak", eos=True), [0, *plain, 1])
    assert [len(ids) for ids in TOKENIZER.encode_batch(["", "oak"], eos=True)] == [2, len(plain) + 2]


@pytest.mark.parametrize(
    ("says", "begins"), [({}, True), ({"add_bos_token": None}, True), ({"add_bos_token": False}, False)]
)
def test_a_text_begins_as_its_folder_says(says, begins, tmp_path):
    tokenizer = foreign_tokenizers.load("llama2", tmp_path, **says)
    for ids in (tokenizer.encode("the cat"), *tokenizer.encode_batch(["the cat"])):
        assert (int(ids[0]) == tokenizer.bos_id) is begins
    assert tokenizer.encode("the cat", bos=True)[0] == tokenizer.bos_id
    assert tokenizer.encode("the cat", bos=False)[0] != tokenizer.bos_id


def test_text_that_looks_like_a_special_token_stays_text():
    text = "a<|end_text|>b<|begin_text|><|pad|>"
    ids = TOKENIZER.encode(text, bos=False)
    assert not set(ids) & set(TOKENIZER.special_ids.values())
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([1], skip_special=False) == "<|end_text|>"  # control: the real one, same spelling
    assert TOKENIZER.decode([1]) == ""


def test_ids_outside_the_vocabulary_stand_for_nothing():
    a = int(TOKENIZER.encode("a", bos=False)[0])
    assert TOKENIZER.decode([a, 384, 70_000, -100, a]) == "aa"


def test_a_lone_surrogate_is_refused():
    with pytest.raises(InputError, match="half of a surrogate pair"):
        TOKENIZER.encode("\ud800")


def test_token_bytes_are_those_of_each_single_token():
    alone = [len(TOKENIZER.pieces[i]) for i in range(384)]
    expected = [0 if i in TOKENIZER.special_ids.values() else n for i, n in enumerate(alone)]
    np.testing.assert_array_equal(TOKENIZER.token_bytes, expected)
    assert sum(n == 1 for n in expected) == 256  # every byte has its token


# Streaming


def streamed(tokenizer, ids, skip_special=True):
    stream = tokenizer.decode_stream(skip_special)
    return [stream.push(int(i)) for i in ids] + [stream.end()]


@given(st.lists(st.integers(-1, 400), max_size=40), st.booleans())
def test_streamed_pieces_join_to_the_decoded_text_for_any_ids(ids, skip_special):
    # Arbitrary ids are mostly invalid UTF-8: replacement characters must agree too.
    assert "".join(streamed(TOKENIZER, ids, skip_special)) == TOKENIZER.decode(ids, skip_special)


@given(UNICODE)
def test_a_character_split_over_tokens_comes_out_whole(text):
    pieces = streamed(TOKENIZER, TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert pieces[-1] == ""


def test_an_emoji_arrives_with_its_last_token():
    ids = TOKENIZER.encode("🦉", bos=False)
    assert len(ids) > 1  # control: it is split
    assert streamed(TOKENIZER, ids) == [""] * (len(ids) - 1) + ["🦉", ""]
    assert streamed(TOKENIZER, ids[:-1])[-1] == "\ufffd"  # cut short: said at the end, not lost


@given(st.text("ab\n é🙂"), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_a_stop_string_ends_the_text_and_nothing_of_it_is_shown(text, stop):
    ids = TOKENIZER.encode(text).tolist()
    stream = TOKENIZER.decode_stream(stop=stop)
    pieces = [stream.push(i) for i in ids]
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stream.stopped == bool(found)
    assert "".join(pieces) + stream.end() == text[: min(found, default=(0, len(text)))[1]]
    assert TOKENIZER.decode(ids, stop=stop) == "".join(pieces) + stream.end()


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=3))
def test_no_more_is_held_back_than_could_become_a_stop_string(text, stop):
    stream, shown = TOKENIZER.decode_stream(stop=stop), ""
    for end, character in enumerate(text, 1):
        shown += stream.push(*TOKENIZER.encode(character, bos=False).tolist())
        if stream.stopped:
            break
        before = text[:end]
        held = max(n for s in stop for n in range(len(s)) if before.endswith(s[:n]))
        assert shown == before[: end - held]


def test_a_long_stop_string_costs_each_token_next_to_nothing():
    stream, start = TOKENIZER.decode_stream(stop=["ab" * 50_000]), time.perf_counter()
    (a,), (b,), (c,) = (TOKENIZER.encode(x, bos=False).tolist() for x in "abc")
    pieces = [stream.push(i) for i in (a, b, c) * 300]
    assert time.perf_counter() - start < 5  # minutes, where every beginning of it is tried
    assert "".join(pieces) == "abc" * 300


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], "a", [7]])
def test_stop_strings_are_a_list_of_texts(stop):
    with pytest.raises(InputError, match=r"stop = .*list of texts"):
        TOKENIZER.decode_stream(stop=stop)


# Where a text ends

CLOSED = "{% for m in messages %}<|begin_header|>{{ m.role }} {{ m.content }}<|pad|>\n{% endfor %}"
STRICT = "{{ raise_exception('a system message first') }}"


@pytest.mark.parametrize(
    ("template", "generation", "ends"),
    [
        (None, None, {1, 4}),  # the reference's template: <|end_turn|>
        (CLOSED, None, {1, 5}),
        (STRICT, None, {1}),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None, {1}),
        (None, {"eos_token_id": 9}, {1, 4, 9}),
        (None, {"eos_token_id": [9, 3, 100_000]}, {1, 4, 9, 3}),
        (None, {"eos_token_id": None, "temperature": 1}, {1, 4}),
    ],
)
def test_a_text_ends_at_the_end_token_at_the_end_of_a_turn_and_where_its_folder_says(
    template, generation, ends, saved, tmp_path
):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.load(saved("tokenizer_config.json", lambda t: {**t, "chat_template": template}))
    assert set(tokenizer.end_ids) == ends
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.end_ids, again.hash) == (tokenizer.end_ids, tokenizer.hash)
    assert "generation_config" not in (tmp_path / "again/tokenizer_config.json").read_text()


# Identity, saving and loading


def test_a_saved_tokenizer_loads_equal(tmp_path):
    TOKENIZER.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert loaded.hash == TOKENIZER.hash
    assert loaded.special_ids == TOKENIZER.special_ids
    np.testing.assert_array_equal(loaded.token_bytes, TOKENIZER.token_bytes)
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), TOKENIZER.encode(TEXTS[0]))
    # Other readers of the file add the begin token by default, as `encode` does.
    foreign = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "folder" / "tokenizer.json"))
    assert foreign.encode(TEXTS[0]).ids == TOKENIZER.encode(TEXTS[0]).tolist()


@pytest.fixture
def saved(tmp_path):
    """A saved tokenizer and a function that rewrites one of its two files."""
    TOKENIZER.save(tmp_path)

    def rewrite(name, change):
        tree = json.loads((tmp_path / name).read_text())
        tree = change(tree) or tree
        (tmp_path / name).write_text(json.dumps(tree))
        return tmp_path

    return rewrite


def _drop_a_merge(tree):
    tree["model"]["merges"].pop()


def _pad_and_truncate(tree):
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tree["post_processor"] = None


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        ("tokenizer.json", _pad_and_truncate, True),
        ("tokenizer_config.json", lambda tree: {**tree, "chat_template": "x", "model_max_length": 9}, True),
        ("tokenizer.json", _drop_a_merge, False),
        ("tokenizer.json", lambda tree: {**tree, "normalizer": {"type": "NFC"}}, False),
        ("tokenizer_config.json", lambda tree: {**tree, "eos_token": "<|end_turn|>"}, False),
    ],
)
def test_the_hash_changes_with_the_tokenization_and_with_nothing_else(saved, name, change, same):
    loaded = Tokenizer.load(saved(name, change))
    assert (loaded.hash == TOKENIZER.hash) == same
    if same:
        np.testing.assert_array_equal(loaded.encode(TEXTS[0]), TOKENIZER.encode(TEXTS[0]))


def test_tokens_of_the_config_may_be_objects_and_a_missing_pad_is_the_end_token(saved):
    loaded = Tokenizer.load(
        saved(
            "tokenizer_config.json", lambda t: {"bos_token": {"content": t["bos_token"]}, "eos_token": t["eos_token"]}
        )
    )
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 1)


def test_folders_of_others_may_name_no_begin_token_and_keep_their_names_elsewhere(saved, tmp_path):
    loaded = Tokenizer.load(saved("tokenizer_config.json", lambda t: {"bos_token": None, "eos_token": t["eos_token"]}))
    assert (loaded.bos_id, loaded.eos_id) == (1, 1)  # documents begin with the end of the one before
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "special_tokens_map.json")
    assert Tokenizer.load(tmp_path).hash == loaded.hash


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer_config.json", None, "no tokenizer_config.json"),
        ("tokenizer.json", '{"version": "1.0"', "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe\x00", "tokenizer.json: cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", "[]", "expected an object"),
        ("tokenizer_config.json", '{"bos_token": "<|begin_text|>"}', "names no eos_token"),
        ("tokenizer_config.json", '{"eos_token": "Ċ"}', "eos_token = 'Ċ' is also a byte of ordinary text"),
        ("tokenizer_config.json", '{"eos_token": ' + "1" * 5000 + "}", "tokenizer_config.json: not JSON"),
        ("special_tokens_map.json", "[1]", "special_tokens_map.json: expected an object"),
        ("chat_template.json", "{", "chat_template.json: not JSON"),
        ("generation_config.json", "{", "generation_config.json: not JSON"),
        ("generation_config.json", '{"eos_token_id": ["2"]}', "eos_token_id = .'2'.: must be an id"),
        (
            "tokenizer_config.json",
            '{"bos_token": "<s>", "eos_token": "<|end_text|>"}',
            "'<s>' is not in the vocabulary",
        ),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(tmp_path, name, text, match):
    TOKENIZER.save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=match) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        TOKENIZER.save(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.load(tmp_path / "file")


# Tokenizers of others


@pytest.fixture
def word_level(tmp_path):
    vocab = {"<s>": 0, "</s>": 1, "[UNK]": 2, "the": 3, "oak": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return Tokenizer.load(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_encodes_decodes_and_streams(word_level):
    ids = word_level.encode("the oak the", eos=True)
    np.testing.assert_array_equal(ids, [0, 3, 4, 3, 1])
    assert word_level.decode(ids) == "the oak the"  # its begin and end are special by their role alone
    assert streamed(word_level, ids) == ["", "the", " oak", " the", "", ""]


def test_it_does_not_guess_bytes(word_level):
    assert not word_level.token_bytes.any()


@pytest.mark.parametrize("kind", foreign_tokenizers.KINDS)
def test_tokenizers_of_every_kind_decode_stream_and_count_bytes(kind, tmp_path):
    tokenizer = foreign_tokenizers.load(kind, tmp_path)
    for text in ("the cat sat", "the old owl", "mat on mat"):
        ids = tokenizer.encode(text, eos=True)
        assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == text
        # What a prompt is continued with keeps its space.
        before, after = ids[:3], ids[3:]
        assert tokenizer.decode(before) + tokenizer.decode(after, after=before) == text
        alone = [tokenizer.decode([i], after=ids[:at]) for at, i in enumerate(ids)]
        assert "".join(alone) == text
        prefix = kind in ("llama2", "mistral", "t5")  # a space before the text
        size = 0 if kind == "bert" else len(text) + prefix
        assert tokenizer.token_bytes[ids].sum() == size


@pytest.mark.parametrize("kind", ["llama2", "mistral", "gemma"])
@given(text=UNICODE)
def test_byte_fallback_keeps_any_text(kind, text, tmp_path_factory):
    tokenizer = LOADED.setdefault(kind, None) or foreign_tokenizers.load(kind, tmp_path_factory.mktemp(kind))
    LOADED[kind] = tokenizer
    text = "a" + text.replace("▁", "")  # the character that stands for a space, and the space before a text
    ids = tokenizer.encode(text, eos=True)
    assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + (kind != "gemma")


def test_a_spelled_byte_stays_text(tmp_path):
    pieces = [(piece, 0.0) for piece in [*foreign_tokenizers.SPECIAL, *foreign_tokenizers.BYTES]]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, ("▁", -2.0), ("▁a", -3.0), ("é", -5.0)], 0, True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = foreign_tokenizers.llama2().decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = Tokenizer.load(tmp_path)
    text = "a <0x41> </s>é🙂"
    ids = tokenizer.encode(text, eos=True)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + 1
    assert set(ids) & {pieces.index(("<0xF0>", 0.0))}, "control: bytes are used"


def test_an_end_token_that_unknown_characters_become_is_refused(tmp_path):
    with pytest.raises(InputError, match="eos_token = '<unk>' also stands for unknown characters"):
        foreign_tokenizers.load("t5", tmp_path / "lossy", eos_token="<unk>")
    tokenizer = foreign_tokenizers.load("gemma", tmp_path / "bytes", eos_token="<unk>")  # nothing is unknown to it
    assert (tokenizer.token_bytes >= 0).all()


def test_characters_that_are_lost_have_no_known_bytes(tmp_path):
    tokenizer = foreign_tokenizers.load("t5", tmp_path)
    assert (tokenizer.token_bytes[tokenizer.encode("🙂", bos=False)] == -1).any()


# Text that spells a special token stays text, whatever the tokenizer


def not_special(tree, config):
    next(t for t in tree["added_tokens"] if t["content"] == "<|end_text|>")["special"] = False


def not_added(tree, config):
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] != "<|end_text|>"]


def merged(tree, config):
    tree["model"]["vocab"]["<|"] = 384
    tree["model"]["merges"] += [["<", "|"]]
    tree["added_tokens"] = [
        t | {"content": "<|", "id": 384} if t["content"] == "<|pad|>" else t for t in tree["added_tokens"]
    ]
    config["pad_token"] = "<|"


def listed(tree, config):
    tree["added_tokens"] += [{**tree["added_tokens"][0], "id": 384, "content": "<|im_end|>", "special": False}]
    config["additional_special_tokens"] = ["<|im_end|>", "<|never|>"]


def one_character(tree, config):
    tree["added_tokens"] += [{**tree["added_tokens"][0], "id": 384, "content": "中"}]


def one_byte(tree, config):
    tree["added_tokens"] += [{**tree["added_tokens"][0], "id": 384, "content": c} for c in "<¤"]


def overlapping(tree, config):
    more = [{**tree["added_tokens"][0], "id": 384 + i, "content": c} for i, c in enumerate(["<x>", "x>y"])]
    tree["added_tokens"] += more


def ending_with_spaces(tree, config):
    tree["added_tokens"] = [t | {"lstrip": True, "rstrip": True, "single_word": True} for t in tree["added_tokens"]]


SPELLED = ["a<|end_text|>b", "<| <|im_end|>", "<x>y §中", "<|end_text|>", "< <|begin_header|> >", "<<|", "x>y"]


@pytest.mark.parametrize(
    "change", [not_special, not_added, merged, listed, one_character, one_byte, overlapping, ending_with_spaces]
)
def test_spelled_special_tokens_stay_text_in_documents_and_chats(change, tmp_path):
    TOKENIZER.save(tmp_path)
    tree, config = (json.loads((tmp_path / f).read_text()) for f in ("tokenizer.json", "tokenizer_config.json"))
    change(tree, config)
    # A template that completes what a message begins or ends with.
    config["chat_template"] = "{% for m in messages %}<{{ m.content }}y<|end_text|>{% endfor %}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    special = set(tokenizer.special_ids.values())
    for text in SPELLED:
        ids = tokenizer.encode(text, bos=False)
        assert not special & set(ids.tolist()), text
        assert tokenizer.decode(ids) == text
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        assert [i for i in ids.tolist() if i in special] == [tokenizer.eos_id], text
        assert tokenizer.decode(ids) == f"<{text}y"


@pytest.mark.parametrize("kind", foreign_tokenizers.KINDS)
def test_spelled_special_tokens_stay_text_in_tokenizers_of_every_kind(kind, tmp_path):
    tokenizer = foreign_tokenizers.load(kind, tmp_path)
    for text in ("a</s>b", "</s>", "the <s> cat</s>"):
        ids = tokenizer.encode(text, bos=False).tolist()
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids), text
        if kind != "bert":
            assert tokenizer.decode(ids) == text


def test_a_role_may_be_part_of_a_special_token_but_not_hold_the_end_of_one(tmp_path):
    TOKENIZER.save(tmp_path)
    tree, config = (json.loads((tmp_path / f).read_text()) for f in ("tokenizer.json", "tokenizer_config.json"))
    tree["added_tokens"] += [{**tree["added_tokens"][0], "id": 384, "content": "<|user|>"}]
    config["chat_template"] = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    for role, special in (("user", [384]), ("x|><|user", []), ("<|user", []), ("user|><|pad|><|x", [])):
        ids = tokenizer.encode_chat([{"role": role, "content": "y"}]).tolist()
        assert [i for i in ids if i in tokenizer.special_ids.values()] == special, role
        assert tokenizer.decode(ids, skip_special=False) == f"<|{role}|>y"


def test_special_tokens_in_other_fields_of_a_message_and_behind_a_chat_stay_text():
    template = "{% for m in messages %}{{ m.content }}{{ m.calls | tojson }}{% endfor %}"
    tokenizer = Tokenizer(TOKENIZER._backend, {**TOKENIZER._config, "chat_template": template})
    calls = [{"<|end_text|>": ["<|pad|>", 1, None, True]}]
    written = tokenizer.write_chat([{"role": "user", "content": "x", "calls": calls}]) + "<|end_turn|>"
    ids, _ = tokenizer.encode_written(written)
    assert not set(ids.tolist()) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == "x" + json.dumps(calls) + "<|end_turn|>"


def test_a_token_added_by_hand_counts_its_own_bytes(saved):
    def add(tree):
        token = {**tree["added_tokens"][0], "id": 384, "content": "Héron", "special": False}
        tree["added_tokens"].append(token)

    tokenizer = Tokenizer.load(saved("tokenizer.json", add))
    ids = tokenizer.encode("Héron oak", bos=False)
    assert ids[0] == 384
    assert tokenizer.token_bytes[384] == 6
    assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == "Héron oak"


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_batches_encode_like_single_texts(seed):
    texts = random.Random(seed).sample(TEXTS, 3)
    for text, ids in zip(texts, TOKENIZER.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, TOKENIZER.encode(text))


def test_chat_follows_the_reference_template():
    chat = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "<|end_turn|> 1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    written = (
        "<|begin_text|><|begin_header|>system<|end_header|>\n\nBe brief.<|end_turn|>"
        "<|begin_header|>user<|end_header|>\n\n<|end_turn|> 1+1?<|end_turn|>"
        "<|begin_header|>Huginn<|end_header|>\n\n2<|end_turn|>"
    )
    ids = TOKENIZER.encode_chat(chat)
    assert TOKENIZER.decode(ids, skip_special=False) == written + "<|begin_header|>Huginn<|end_header|>\n\n"
    closed = TOKENIZER.encode_chat(chat, reply=False)
    assert TOKENIZER.decode(closed, skip_special=False) == written + "<|end_text|>"
    end_turn = TOKENIZER.special_ids["<|end_turn|>"]
    assert (ids == end_turn).sum() == 3, "a special token spelled out by a user stays text"


def test_the_assistants_words_and_the_end_of_its_turn_are_what_it_says():
    chat = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": " 2 é🙂 <|end_turn|>"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    ids, said = TOKENIZER.encode_conversation(chat, reply=False)
    np.testing.assert_array_equal(ids, TOKENIZER.encode_chat(chat, reply=False))
    assert TOKENIZER.decode(ids[said], skip_special=False) == "2 é🙂 <|end_turn|><|end_turn|>yes<|end_turn|>"
    assert not TOKENIZER.encode_conversation(chat[:1])[1].any()


def direct(messages, reply):
    """The rules of the chat format, written down without a template."""
    special, text = TOKENIZER.special_ids, lambda words: TOKENIZER.encode(words, bos=False).tolist()
    ids, said = [TOKENIZER.bos_id], [False]
    for message in messages:
        ours = message["role"] == "assistant"
        head = [special["<|begin_header|>"], *text("Huginn" if ours else message["role"]), special["<|end_header|>"]]
        head += text("\n\n")
        body = [*text(message["content"].strip()), special["<|end_turn|>"]]
        ids += head + body
        scored = ours and bool(message["content"].strip())  # an empty reply teaches nothing
        said += [False] * len(head) + [scored] * len(body)
    tail = [special["<|begin_header|>"], *text("Huginn"), special["<|end_header|>"], *text("\n\n")]
    tail = tail if reply else [TOKENIZER.eos_id]
    return ids + tail, said + [False] * len(tail)


PIECES = [*"ab 1.\n", "é", "<|end_turn|>", "<|begin_header|>", "{{", "{% if %}", "<"]
WORDS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@given(
    st.lists(st.tuples(st.sampled_from(["user", "system", "assistant"]), WORDS), min_size=1, max_size=5), st.booleans()
)
def test_the_template_renders_the_rules_of_the_reference_for_any_conversation(turns, reply):
    messages = [{"role": role, "content": words} for role, words in turns]
    ids, said = TOKENIZER.encode_conversation(messages, reply)
    expected, ours = direct(messages, reply)
    assert ids.tolist() == expected
    assert said.tolist() == ours


@pytest.mark.parametrize("where", ["tokenizer_config.json", "list", "chat_template.jinja", "chat_template.json"])
def test_a_template_of_the_folder_is_used(saved, tmp_path, where):
    template = (
        "{%- for m in messages %}\n{{ m.role | upper }}: "
        "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    )
    if where == "chat_template.jinja":
        (tmp_path / where).write_text(template)
        saved("tokenizer_config.json", lambda tree: {**tree, "chat_template": "an older one"})
    elif where == "chat_template.json":
        (tmp_path / where).write_text(json.dumps({"chat_template": template}))
        saved("tokenizer_config.json", lambda tree: tree)
    else:
        value = template if where != "list" else [{"name": "default", "template": template}]
        saved("tokenizer_config.json", lambda tree: {**tree, "chat_template": value})
    tokenizer = Tokenizer.load(tmp_path)
    ids, said = tokenizer.encode_conversation([{"role": "user", "content": "tea"}])
    assert tokenizer.decode(ids, skip_special=False) == "USER: tea<|end_text|>"
    assert tokenizer.decode(ids[said]).strip() == "tea"  # a token that only begins before it counts as well
    tokenizer.save(tmp_path / "again")
    np.testing.assert_array_equal(
        Tokenizer.load(tmp_path / "again").encode_chat([{"role": "user", "content": "tea"}]), ids
    )


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for %}", "chat template: "),
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "chat template: "),
        ("{{ 1 + 'a' }}", "chat template: "),
        ("{{ 1 // 0 }}", "chat template: .*zero"),
        ("{% for i in range(10**9) %}{% endfor %}", "chat template: .*range"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "chat template: .*recursion"),
        ("{{ messages[0]['content']['x'].y }}", "chat template: "),
        ("{{ {} | tojson | nothing }}", "chat template: "),
        (7, "chat template: must be text, not int"),
        ({"default": "x"}, "chat template: must be text, not dict"),
        ([{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}], "none of rag, tool_use is named"),
        ([], "chat template: none of an empty list"),
        ([{"name": "default"}], "chat template: must be text, not NoneType"),
        (["x"], "chat template: none of None"),
    ],
)
def test_a_template_that_is_wrong_or_refuses_is_one_line(saved, template, match):
    tokenizer = Tokenizer.load(saved("tokenizer_config.json", lambda tree: {**tree, "chat_template": template}))
    with pytest.raises(InputError, match=match) as caught:
        tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value)


# The reference's ids, bytes only, long texts


def test_special_ids_come_last_as_in_the_reference():
    tokenizer = Tokenizer.train(TEXTS, 384, "last")
    names = list(tokenizer.special_ids)
    assert (tokenizer.vocab_size, len(names)) == (384, 32)
    assert names[:6] == list(SPECIAL_TOKENS)
    # Of 65,536 entries these are the published 65504, 65505, ... 65509.
    assert [tokenizer.special_ids[name] for name in names] == list(range(352, 384))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (352, 353, 357)
    text = TEXTS[0] + "<|end_text|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


@given(UNICODE)
def test_bytes_only_gives_the_bytes_themselves(text):
    assert BYTES.encode(text, bos=False).tolist() == list(text.encode())
    assert BYTES.decode(BYTES.encode(text, eos=True)) == text


def test_bytes_only_has_the_ids_after_the_bytes():
    assert (BYTES.vocab_size, BYTES.bos_id, BYTES.eos_id) == (288, 256, 257)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([*TEXTS[:4], "a\n", "\n", "\nb c", " \n 1", "é\t\n", "<|end_text|>"]), max_size=30),
    st.integers(1, 60),
)
def test_long_texts_encode_in_pieces_as_they_do_whole(parts, long):
    text = "".join(parts)
    for tokenizer in (TOKENIZER, BYTES):
        whole = tokenizer._plain.encode(text, add_special_tokens=False).ids
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rdlm.tokenizer.tokenizer._LONG", long)
            patch.setattr("rdlm.tokenizer.tokenizer._ENCODED_AT_ONCE", 2 * long)
            assert tokenizer.encode(text, bos=False).tolist() == whole
            assert "".join(tokenizer._pieces_of(text)) == text


def test_a_long_text_is_cut(monkeypatch, word_level):
    monkeypatch.setattr("rdlm.tokenizer.tokenizer._LONG", 50)
    assert len(list(TOKENIZER._pieces_of("".join(TEXTS)))) > 20
    assert len(list(word_level._pieces_of("".join(TEXTS)))) == 1  # unknown rules: left whole


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        "hi",
        {"role": "user", "content": "x"},
        ["hi"],
        None,
        7,
        [None],
        [{"role": "user", "content": "half \ud83d"}],
        [{"role": "user\ud83d", "content": "x"}],
        [{"role": "user", "content": "x", "name": ["\ufdd2"]}],
    ],
)
def test_chat_refuses_what_is_no_conversation(messages):
    with pytest.raises(InputError, match="messages"):
        TOKENIZER.encode_chat(messages)


# What the assistant says, where a template does not mark it

CHATML = "{% for m in messages %}<|begin_header|>{{ m['role'] }}\n{{ m['content'] }}<|end_turn|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|begin_header|>assistant\n{% endif %}"
TURNS = [("user", "1+1?"), ("assistant", " 2 <|end_turn|>"), ("user", "sure?"), ("assistant", "yes")]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML + PROMPT, " 2 <|end_turn|><|end_turn|>yes<|end_turn|>"),
        (
            CHATML,  # nothing asks for a reply: the model has to write its header itself
            "<|begin_header|>assistant\n 2 <|end_turn|><|end_turn|><|begin_header|>assistant\nyes<|end_turn|>",
        ),
        (  # the end token once, at the end
            CHATML + PROMPT + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            " 2 <|end_turn|><|end_turn|>yes<|end_turn|>",
        ),
        (  # as Llama 2
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
            " 2 <|end_turn|> <|end_text|> yes <|end_text|>",
        ),
        (  # as Qwen 3: thoughts before the last reply alone
            "{% for m in messages %}<|begin_header|>{{ m.role }}\n"
            "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
            "{{ m.content }}<|end_turn|>\n{% endfor %}" + PROMPT,
            " 2 <|end_turn|><|end_turn|><think>\n\n</think>\n\nyes<|end_turn|>",
        ),
    ],
)
def test_the_assistants_words_are_found_by_what_its_messages_add(template, said):
    tokenizer = Tokenizer(TOKENIZER._backend, {**TOKENIZER._config, "chat_template": template})
    messages = [{"role": role, "content": words} for role, words in TURNS]
    ids, scored = tokenizer.encode_conversation(messages, reply=False)
    assert tokenizer.decode(ids[scored], skip_special=False) == said
    np.testing.assert_array_equal(ids, tokenizer.encode_chat(messages, reply=False))
    assert not tokenizer.encode_conversation(messages[:1], reply=False)[1].any()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }} messages: {% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{{ messages[0].content }}",
    ],
)
def test_a_template_whose_texts_do_not_join_up_is_named(template):
    tokenizer = Tokenizer(TOKENIZER._backend, {**TOKENIZER._config, "chat_template": template})
    messages = [{"role": role, "content": words} for role, words in TURNS]
    with pytest.raises(InputError, match=r"chat template .{.*put {% generation %} and") as caught:
        tokenizer.encode_conversation(messages)
    assert "\n" not in str(caught.value)
    assert tokenizer.encode_chat(messages).size  # a prompt needs no spans


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f<|end_turn|>"}}]}


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (None, '{"name": "f<|end_turn|>"}'),
        (CHATML + PROMPT, '{"name": "f<|end_turn|>"}'),
        (CHATML.replace("m['content']", "m.tool_calls[0].function.name if m.tool_calls else ''"), "f<|end_turn|>"),
    ],
)
def test_tool_calls_are_written_also_by_templates_that_know_none(template, written):
    tokenizer = Tokenizer(TOKENIZER._backend, {**TOKENIZER._config, "chat_template": template})
    messages = [{"role": "user", "content": "call"}, CALL]
    ids, said = tokenizer.encode_conversation(messages, reply=False)
    assert written in tokenizer.decode(ids[said], skip_special=False)
    assert (ids == tokenizer.special_ids["<|end_turn|>"]).sum() == 2
    with_words = tokenizer.encode_chat([messages[0], {**CALL, "content": "I call"}])
    assert ("I call\n" in tokenizer.decode(with_words)) == (written != "f<|end_turn|>")
    if written != "f<|end_turn|>":
        with pytest.raises(InputError, match="'tool_calls' must be a list of objects"):
            tokenizer.encode_chat([{**CALL, "tool_calls": 3}])


# One long unbroken run


@pytest.mark.parametrize("alphabet", ["a", "abcdefgh", "\n", " ", "\u0301"])
def test_training_ends_on_one_long_unbroken_run(alphabet):
    run = "a" + "".join(random.Random(0).choices(alphabet, k=150_000))  # took up to a minute where words were not cut
    with pytest.raises(InputError, match="yield only"):
        Tokenizer.train([run], 300_000)
    assert Tokenizer.train([run, *TEXTS], 300).hash


def test_cutting_long_runs_changes_no_other_training(monkeypatch):
    usual = Tokenizer.train(TEXTS, 384)
    monkeypatch.setattr("rdlm.tokenizer.training._LONGEST_WORD", 50_000)
    assert Tokenizer.train(TEXTS, 384).hash == usual.hash
    monkeypatch.setattr("rdlm.tokenizer.training._LONGEST_WORD", 2)  # control: this does
    with pytest.raises(InputError, match="yield only"):
        Tokenizer.train(TEXTS, 384)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BYTES.encode(None),
        lambda: BYTES.encode(b"bytes"),
        lambda: BYTES.encode_batch(["a", 3]),
        lambda: BYTES.encode_batch("one text"),
        lambda: BYTES.decode("text"),
        lambda: BYTES.decode([1.5]),
        lambda: BYTES.decode(None),
        lambda: BYTES.decode(np.array([1.0])),
        lambda: BYTES.decode([1], after=["a"]),
        lambda: BYTES.decode_stream().push("a"),
        lambda: BYTES.decode_stream(stop=3),
        lambda: BYTES.encode_written(None),
        lambda: Tokenizer.train(None, 300),
        lambda: Tokenizer.train("one text", 300),
        lambda: Tokenizer.train(TEXTS, "300"),
        lambda: Tokenizer.train(TEXTS, 300.0),
        lambda: Tokenizer.train(TEXTS, 300, "middle"),
    ],
)
def test_arguments_of_other_types_are_one_line(wrong):
    with pytest.raises(InputError) as caught:
        wrong()
    assert "\n" not in str(caught.value)
