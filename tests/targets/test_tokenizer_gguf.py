"""Tokenizers of GGUF files: how text is split, what ends a turn, and metadata that are refused."""

from typing import Any

import pytest
import tokenizers

from ppow_jax.errors import UserError
from ppow_jax.targets import tokenizer_gguf
from ppow_jax.targets.tokenizer import Tokenizer, with_stops
from ppow_jax.targets.tokenizer_gguf import from_gguf


def metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """One token a byte, 1 and 2 as one, and two that end a turn; a change to None takes a key away."""
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*"12?ab!ĠĊ'", "12", "<end>", "<eot>"],
        "merges": ["1 2"],
        "token_type": [1] * 10 + [3, 4],
        "eos_token_id": 10,
        "eot_token_id": 11,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    named["tokenizer.chat_template"] = "{% for m in messages %}{{ m.content }}<eot>{% endfor %}"
    named |= {f"tokenizer.{'' if 'template' in k else 'ggml.'}{k}": v for k, v in changes.items()}
    return {key: value for key, value in named.items() if value is not None}


def tokenizer_of(pre: str) -> Tokenizer:
    return with_stops(from_gguf(metadata(pre)))


def test_how_text_is_split_before_merges():
    pieces = lambda pre, text: [  # noqa: E731
        piece for piece, _ in tokenizer_of(pre).core.pre_tokenizer.pre_tokenize_str(text)
    ]
    assert pieces("gpt-2", "ab 1212!") == ["ab", "Ġ1212", "!"]
    assert pieces("smollm", "ab 1212!") == ["ab", "Ġ", "1", "2", "1", "2", "!"]
    assert pieces("llama-bpe", "ab 1212!") == ["ab", "Ġ", "121", "2", "!"]
    assert pieces("qwen2", "ab 1212!") == ["ab", "Ġ", "1", "2", "1", "2", "!"]
    assert pieces("llama-bpe", "!ab'Sa ?\n\n b") == ["!ab", "'S", "a", "Ġ?ĊĊ", "Ġb"]
    with pytest.raises(UserError, match=r"'tekken' is not supported.*llama-bpe.*tokenizer.json"):
        tokenizer_of("tekken")


def test_stops_of_a_file_the_one_that_its_template_writes_first():
    found = tokenizer_of("qwen2")
    assert found.stop_ids == (11, 10) and found.bos == "" and found.eos == "<end>"
    assert found.first_turn("12") == [0, 1, 11] and tokenizer_of("llama-bpe").first_turn("12") == [9, 11]


def test_special_tokens_of_a_file_of_which_most_say_less():
    found = from_gguf(metadata(token_type=None, eot_token_id=None, bos_token_id=9))
    assert found.stop_ids == (10,) and found.variables == {"bos_token": "12", "eos_token": "<end>"}
    assert found.encode("<end>") == []  # not marked as a token: its letters have none
    assert from_gguf(metadata(eos_token_id=None)).stop_ids == (11,)
    assert from_gguf(metadata(eom_token_id=3)).stop_ids == (10, 11, 3)


TOKENS = metadata()["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "llama"},
            "GGUF tokenizer 'llama' with pre-tokenizer 'gpt-2' is not supported; expected 'gpt2'",
        ),
        ({"pre": None}, "with pre-tokenizer '' is not supported; expected 'gpt2' with one of gpt-2,"),
        ({"pre": 5}, "found tokenizer.ggml.pre 5, expected a text"),
        ({"model": None}, "found no 'tokenizer.ggml.model', which a tokenizer has; the model's"),
        ({"chat_template": None}, "has no chat template; use an instruct model"),
        ({"chat_template": ["x"]}, "found tokenizer.chat_template ['x'], expected a text"),
        ({"tokens": None}, "found no 'tokenizer.ggml.tokens', which a tokenizer has"),
        ({"tokens": "abc"}, "found tokenizer.ggml.tokens 'abc', expected a list of texts"),
        ({"tokens": [*TOKENS[:-1], 7]}, "found tokenizer.ggml.tokens with 7 in it, expected a list of texts"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "found tokenizer.ggml.tokens 'a' twice, expected every token once"),
        ({"tokens": TOKENS[:-1]}, "found tokenizer.ggml.token_type 12 kinds, expected 11, as many as tokens"),
        ({"token_type": [1] * 13}, "found tokenizer.ggml.token_type 13 kinds, expected 12"),
        (
            {"token_type": ["x"] * 12},
            "found tokenizer.ggml.token_type with 'x' in it, expected a list of whole",
        ),
        ({"token_type": 3}, "found tokenizer.ggml.token_type 3, expected a list of whole numbers"),
        ({"merges": None}, "found no 'tokenizer.ggml.merges', which a tokenizer has"),
        ({"merges": ["12"]}, "found tokenizer.ggml.merges '12', expected two tokens whose union is one"),
        ({"merges": ["1 a"]}, "found tokenizer.ggml.merges '1 a', expected two tokens whose union is one"),
        (
            {"merges": [["1", "2"]]},
            "found tokenizer.ggml.merges with ['1', '2'] in it, expected a list of texts",
        ),
        ({"eos_token_id": 12}, "found tokenizer.ggml.eos_token_id 12, expected a whole number from 0 to 11"),
        ({"bos_token_id": -1}, "found tokenizer.ggml.bos_token_id -1, expected a whole number from 0 to 11"),
        ({"eot_token_id": "11"}, "found tokenizer.ggml.eot_token_id '11', expected a whole number from 0"),
        ({"bos_token_id": True}, "found tokenizer.ggml.bos_token_id True, expected a whole number from 0"),
        (
            {"eos_token_id": None, "eot_token_id": None},
            "found tokenizer.ggml.eos_token_id nowhere, expected the",
        ),
    ],
)
def test_metadata_that_are_not_right(changes, message):
    with pytest.raises(UserError) as caught:
        from_gguf(metadata(**changes), "m.gguf")
    assert str(caught.value).startswith("m.gguf: ") and "\n" not in str(caught.value)
    assert message in str(caught.value), str(caught.value)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_tokenizer_written_into_a_file_is_the_same_tokenizer(pre):
    """More rows than tokens, as embeddings often have, are filled up with tokens that no text has."""
    tokenizer = from_gguf(metadata(pre, bos_token_id=9))
    written = tokenizer_gguf.metadata(tokenizer, 14)
    assert written["tokenizer.ggml.pre"] == pre and written["tokenizer.ggml.merges"] == ["1 2"]
    assert written["tokenizer.ggml.tokens"] == [*TOKENS, "[PAD12]", "[PAD13]"]
    assert written["tokenizer.ggml.token_type"] == [1] * 10 + [3, 3, 5, 5]
    assert (written["tokenizer.ggml.bos_token_id"], written["tokenizer.ggml.eos_token_id"]) == (9, 10)
    back = from_gguf(written)
    for text in ("12 1212!", "ab'!<eot>", "!1 2\n"):
        assert back.encode(text) == tokenizer.encode(text)
    assert back.template == tokenizer.template and back.variables == tokenizer.variables


def test_a_tokenizer_that_has_no_name_in_gguf_files():
    tokenizer = from_gguf(metadata())
    tokenizer.core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"splits text in its own way .* expected byte-level BPE as of gpt-2"):
        tokenizer_gguf.metadata(tokenizer, 12)
