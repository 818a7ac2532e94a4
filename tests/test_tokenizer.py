"""Tokenizers: texts survive the round trip, files say how text is split, streams never split a character."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_ops.llama.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")

NORMAL, UNKNOWN, CONTROL, USER, BYTE = (
    gguf.TokenType.NORMAL,
    gguf.TokenType.UNKNOWN,
    gguf.TokenType.CONTROL,
    gguf.TokenType.USER_DEFINED,
    gguf.TokenType.BYTE,
)
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


class Field:
    def __init__(self, value):
        self.value = value

    def contents(self):
        return self.value


class Metadata:
    """The part of gguf.GGUFReader that a tokenizer reads."""

    def __init__(self, values, chat_template=None):
        self.values = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
        self.values["tokenizer.chat_template"] = chat_template

    def get_field(self, key):
        value = self.values.get(key)
        return None if value is None else Field(value)


def byte_level(pre, *, merged=(), special=("<end>",), user=(), chat_template=None, **values):
    """Byte-level BPE whose merges build each word of `merged` from left to right."""
    tokens, merges = list(ALPHABET), []
    for word in merged:
        for i in range(1, len(word)):
            if word[: i + 1] not in tokens:
                tokens.append(word[: i + 1])
                merges.append(f"{word[:i]} {word[i]}")
    types = [NORMAL] * len(tokens) + [CONTROL] * len(special) + [USER] * len(user)
    tokens += [*special, *user]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
        "eos_token_id": tokens.index(special[0]),
        "add_bos_token": False,
        **values,
    }
    return Tokenizer.from_gguf(Metadata(values, chat_template))


def pieces(tokenizer, text):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_byte_level_round_trip(pre, text):
    tokenizer = byte_level(pre, merged=["Ġthe", "123"])
    expected = text
    if pre == "qwen2":  # Qwen normalizes
        import unicodedata

        expected = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == expected


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("smollm", ["a", "1", "2", "3", "4", "5"]),
        ("qwen2", ["a", "1", "2", "3", "4", "5"]),
        ("llama-bpe", ["a", "123", "4", "5"]),
        ("gpt-2", ["a", "1234", "5"]),
    ],
)
def test_digits_are_split_as_each_model_does(pre, expected):
    assert pieces(byte_level(pre, merged=["1234"]), "a12345") == expected


@pytest.mark.parametrize(
    "pre, expected", [("gpt-2", ["don", "'", "T"]), ("llama-bpe", ["don", "'T"]), ("qwen2", ["don", "'T"])]
)
def test_contractions_are_split_as_each_model_does(pre, expected):
    assert pieces(byte_level(pre, merged=["don", "'T"]), "don'T") == expected


def test_llama3_keeps_a_piece_that_is_a_token_whole():
    values = {"tokens": [*ALPHABET, "ab", "bc", "abc"], "token_type": [NORMAL] * 259, "merges": ["b c", "a b", "ab c"]}
    assert pieces(byte_level("llama-bpe", eos_token_id=0, **values), "abc") == ["abc"]
    assert pieces(byte_level("gpt-2", eos_token_id=0, **values), "abc") == ["a", "bc"]


def test_special_tokens_in_the_text_are_one_id_and_left_out_of_decoded_text():
    tokenizer = byte_level("smollm", special=("<|im_end|>",), user=("<tool>",))
    ids = tokenizer.encode("a<|im_end|><tool>b")
    assert ids == [ALPHABET.index("a"), 256, 257, ALPHABET.index("b")]
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special=False) == "a<|im_end|><tool>b"
    assert tokenizer.eos_token_ids == (256,) and tokenizer.vocab_size == 258


def test_bos_is_added_where_the_file_asks_for_it():
    special = ("<end>", "<begin>")
    tokenizer = byte_level("llama-bpe", special=special, bos_token_id=257, add_bos_token=True, eot_token_id=257)
    assert tokenizer.encode("a") == [257, ALPHABET.index("a")]
    assert tokenizer.encode("a", add_special=False) == [ALPHABET.index("a")]
    assert tokenizer.bos_token_id == 257 and tokenizer.eos_token_ids == (256, 257)
    # Silence means yes for Llama 3 and no for the others, as in llama.cpp.
    assert byte_level("llama-bpe", special=special, bos_token_id=257, add_bos_token=None).encode("a")[0] == 257
    assert byte_level("qwen2", special=special, bos_token_id=257, add_bos_token=None).encode("a")[0] != 257


def sentencepiece(words, **values):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(words)
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
    values = {
        "model": "llama",
        "tokens": tokens + list(words),
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **values,
    }
    return Tokenizer.from_gguf(Metadata(values))


def test_sentencepiece_joins_the_best_scores_first():
    tokenizer = sentencepiece(["bc", "ab", "▁a", "▁ab", "▁", "a", "b", "c"])
    assert pieces(tokenizer, "abc") == ["<s>", "▁a", "bc"]
    assert pieces(tokenizer, "ab a") == ["<s>", "▁ab", "▁a"]
    without_prefix = sentencepiece(["bc", "ab", "▁", "a", "b", "c"], add_space_prefix=False)
    assert pieces(without_prefix, "abc") == ["<s>", "a", "bc"]


def test_sentencepiece_falls_back_to_bytes():
    tokenizer = sentencepiece(["▁", "a"])
    assert pieces(tokenizer, "aé") == ["<s>", "▁", "a", "<0xC3>", "<0xA9>"]
    for text in ("aé 你好 a", "  two  spaces ", "🦙", "a\n\ta"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama"),
        ({"pre": "falcon"}, "tokenizer.ggml.pre 'falcon' is not supported; supported: gpt-2, smollm, llama-bpe, qwen2"),
        ({"pre": None}, "tokenizer.ggml.pre None"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["no such"]}, "damaged"),
        ({"token_type": [NORMAL]}, "token_type has 1 entries for 257 tokens"),
        ({"add_bos_token": True}, "no tokenizer.ggml.bos_token_id"),
        ({"model": "llama"}, "lacks tokenizer.ggml.scores"),
    ],
)
def test_unsupported_gguf_tokenizers_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        byte_level(values.pop("pre", "gpt-2"), **values)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    steps = [stream.step(i) for i in ids]
    return steps, stream.flush()


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("a é你🦙\u0301\n'")))
def test_stream_joins_to_the_text_in_whole_characters(text):
    for tokenizer in (byte_level("smollm"), sentencepiece(["▁", "a", "▁a"])):
        ids = tokenizer.encode(text)
        steps, rest = streamed(tokenizer, ids)
        assert "".join(steps) == text and rest == ""
        assert not any("\ufffd" in step for step in steps)


def test_stream_waits_for_the_last_byte_of_a_character():
    tokenizer = byte_level("smollm")
    steps, rest = streamed(tokenizer, tokenizer.encode("é🦙"))
    assert steps == ["", "é", "", "", "", "🦙"] and rest == ""
    cut, rest = streamed(tokenizer, tokenizer.encode("é🦙")[:-1])
    assert cut == ["", "é", "", "", ""] and rest == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=30))
def test_stream_of_any_ids_joins_to_their_decoded_text(ids):
    tokenizer = byte_level("smollm")
    steps, rest = streamed(tokenizer, ids)
    assert "".join(steps) + rest == tokenizer.decode(ids)


TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'forbidden' %}{{ raise_exception('role forbidden') }}{% endif %}
    {{- '<' + message.role + '>' + message.content + eos_token }}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_chat_fills_the_template():
    tokenizer = byte_level("gpt-2", special=("<end>", "<begin>"), bos_token_id=257, chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.chat(messages) == "<begin><user>Hi<end><assistant>"
    assert tokenizer.chat(messages, add_generation_prompt=False) == "<begin><user>Hi<end>"
    with pytest.raises(ValueError, match="role forbidden"):
        tokenizer.chat([{"role": "forbidden", "content": ""}])
    with pytest.raises(ValueError, match=r"messages\[1\] must be a dict with 'role' and 'content'"):
        tokenizer.chat([*messages, {"role": "user"}])


@pytest.mark.parametrize(
    "template", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for %}"]
)
def test_templates_run_in_a_sandbox(template):
    tokenizer = byte_level("gpt-2", chat_template=template)
    with pytest.raises(ValueError, match="chat template refused"):
        tokenizer.chat([{"role": "user", "content": "Hi"}])


def test_chat_without_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        byte_level("gpt-2").chat([{"role": "user", "content": "Hi"}])


def test_text_that_was_no_utf8_is_refused():
    with pytest.raises(ValueError, match="no UTF-8"):
        Tokenizer(backend=None).encode("a\udcff")


def test_wrong_text_type():
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        byte_level("gpt-2").encode(b"text")


def write_folder(folder, **files):
    byte_level("gpt-2", special=("<end>", "<begin>")).backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.from_folder(folder)


def test_folder(tmp_path):
    settings = {"bos_token": {"content": "<begin>"}, "eos_token": "<end>", "chat_template": TEMPLATE}
    tokenizer = write_folder(tmp_path, tokenizer_config=settings)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (257, (256,))
    assert tokenizer.decode(tokenizer.encode("round trip")) == "round trip"
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "<begin><user>Hi<end><assistant>"

    tokenizer = write_folder(tmp_path, config={"eos_token_id": 3})
    assert tokenizer.eos_token_ids == (3,)
    named = {"chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]}
    tokenizer = write_folder(tmp_path, generation_config={"eos_token_id": [7, 8]}, tokenizer_config=named)
    assert tokenizer.eos_token_ids == (7, 8)
    assert tokenizer.chat([]) == "yes"
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert Tokenizer.from_folder(tmp_path).chat([]) == "from its own file"


def test_damaged_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
