"""Responses that were written elsewhere: what is taken, and what is refused with its line."""

import dataclasses

import pytest
import runs

from ppow_jax.data import conversations
from ppow_jax.data.conversations import import_responses, read_responses
from ppow_jax.errors import UserError
from ppow_jax.targets.tokenizer_gguf import from_gguf

A, B, AB, END = range(4)  # the text ab is the one token AB
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
)
TOKENIZER = from_gguf(
    {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.bos_token_id": END, "tokenizer.chat_template": TEMPLATE,
    }
)  # fmt: skip


def imported(path, *rows) -> list[conversations.Conversation]:
    return import_responses(str(runs.write_jsonl(path, rows)), TOKENIZER, 4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "r.jsonl"


@pytest.mark.parametrize(
    ("row", "tokens", "assistant"),
    [
        ({"response_ids": [[AB, A]]}, [A, AB, A, END], [0, 1, 1, 1]),
        ({"response_ids": [[AB]], "finished": [True]}, [A, AB, END], [0, 1, 1]),
        ({"response_ids": [[AB]], "finished": [False]}, [A, AB], [0, 1]),
        ({"response_ids": [[AB]], "finished": None}, [A, AB, END], [0, 1, 1]),
        ({"response_ids": [[AB, END]]}, [A, AB, END], [0, 1, 1]),  # it has the end-of-turn token itself
        ({"response_ids": [[AB, END]], "finished": [True]}, [A, AB, END], [0, 1, 1]),
        ({"response_ids": [[]]}, [A, END], [0, 1]),  # the target ended at once
        ({"response_ids": [[]], "finished": [False]}, [A], [0]),
        (
            {"turns": ["a", "b"], "response_ids": [[AB], [A]], "finished": [True, False]},
            [A, AB, END, B, A],
            [0, 1, 1, 0, 1],
        ),
        (
            {"turns": ["a", "b"], "response_ids": [[AB], [A]], "finished": [False, True]},
            [A, AB, END, B, A, END],
            [0, 1, 0, 0, 1, 1],
        ),
        ({"turns": ["a", "b"], "response_ids": [[], [A]]}, [A, END, B, A, END], [0, 1, 0, 1, 1]),
        ({"turns": ["a", "b"], "response_ids": [[AB]]}, [A, AB, END], [0, 1, 1]),  # the second is dropped
        (
            {"turns": None, "messages": [{"role": "user", "content": "b"}], "response_ids": [[A]]},
            [B, A, END],
            [0, 1, 1],
        ),
    ],
)
def test_what_is_taken(path, row, tokens, assistant):
    (found,) = imported(path, {"turns": ["a"]} | row)
    assert (found.tokens, found.assistant) == (tokens, [bool(x) for x in assistant])


def test_ids_system_text_and_what_is_dropped(path, caplog):
    rows = [{"turns": ["a", "b"], "system": "Be brief.", "response_ids": [[A]]}]
    rows.append({"id": 7, "category": "c", "turns": ["a"], "response_ids": [[A]]})
    with caplog.at_level("WARNING", logger="ppow_jax"):
        one, two = imported(path, *rows)
        assert not caplog.records
        read_responses(str(path), "respond.responses")
    assert (one.prompt.id, one.prompt.system) == ("respond.responses/1", "Be brief.")
    assert (two.prompt.id, two.prompt.category) == ("7", "c")
    assert f"{path}: 1 turns have no list in 'response_ids'; they are dropped" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response_ids": [[A, 4]]}, "found the token id 4, expected ids below 4; was it written by another"),
        ({"response_ids": [[10**60]]}, "found the token id 10000"),
        ({"response_ids": [[-1]]}, "found -1 as a token id, expected 0 or more"),
        ({"response_ids": [[True]]}, "found True as a token id"),
        ({"response_ids": [[1.0]]}, "found 1.0 as a token id"),
        ({"response_ids": [["x"]]}, "found 'x' as a token id"),
        ({"response_ids": [A, B]}, "found [0, 1] as 'response_ids', expected one list of token ids a turn"),
        ({"response_ids": []}, "found [] as 'response_ids'"),
        ({"response_ids": "ab"}, "found 'ab' as 'response_ids'"),
        ({}, "found None as 'response_ids'"),
        ({"response_ids": [[A], [B]]}, "found 2 lists in 'response_ids' but 1 turns, expected at most one"),
        ({"response_ids": [[A]], "finished": []}, "found [] as 'finished', expected true or false for each"),
        ({"response_ids": [[A]], "finished": ["length"]}, "found ['length'] as 'finished', expected true or"),
        ({"response_ids": [[A]], "finished": ["true"]}, "found ['true'] as 'finished'"),
        ({"response_ids": [[A]], "finished": [1]}, "found [1] as 'finished'"),
        ({"response_ids": [[A]], "finished": [None]}, "found [None] as 'finished'"),
        ({"response_ids": [[A]], "finished": True}, "found True as 'finished'"),
        (
            {"response_ids": [[A, END, A]]},
            "found the end-of-turn token 3 as number 2 of the 3 ids of answer 1",
        ),
        (
            {"response_ids": [[END, END]]},
            "found the end-of-turn token 3 as number 1 of the 2 ids of answer 1",
        ),
        (
            {"response_ids": [[A, END]], "finished": [False]},
            "found the end-of-turn token 3 as number 2 of the 2",
        ),
        ({"turns": [3], "response_ids": [[A]]}, "message 1 of 'turns': found 3, expected a string"),
        ({"id": "ok", "response_ids": [[A]]}, "its id 'ok' is that of"),
    ],
)
def test_malformed_responses_are_named_with_the_line(path, row, message):
    with pytest.raises(UserError) as caught:
        imported(path, {"id": "ok", "turns": ["a"], "response_ids": [[A]]}, {"turns": ["a"]} | row)
    assert str(caught.value).startswith(f"{path}:2: {message}") and len(str(caught.value)) < 300


def test_a_row_that_the_chat_template_refuses_is_named(path):
    template = "{% if messages[0]['content'] == 'b' %}{{ raise_exception('no b') }}{% endif %}a"
    strict = dataclasses.replace(TOKENIZER, template=template)
    runs.write_jsonl(path, [{"turns": [x], "response_ids": [[A]]} for x in "ab"])
    with pytest.raises(
        UserError, match=rf"^{path}:2: prompt 'respond.responses/2': chat template: line 1: no b$"
    ):
        import_responses(str(path), strict, 4)


def test_files_are_checked_without_a_tokenizer(path):
    """All but what only the target knows: its vocabulary, and where a turn ends."""
    runs.write_jsonl(path, [{"turns": ["a"], "response_ids": [[10**6, END, A]]}])
    (found,) = read_responses(str(path), "respond.responses")
    assert found.responses == [[10**6, END, A]] and found.place == f"{path}:1"
    runs.write_jsonl(path, [])
    with pytest.raises(UserError, match="holds no responses; expected at least one"):
        read_responses(str(path), "respond.responses")


def test_rows_that_are_no_text_are_left_out(path, caplog):
    tools = {"messages": [{"role": "tool", "content": "1"}], "response_ids": [[A]]}
    runs.write_jsonl(path, [tools, {"turns": ["a"], "response_ids": [[A]]}])
    with caplog.at_level("WARNING", logger="ppow_jax"):
        assert len(read_responses(str(path), "respond.responses")) == 1
    assert f"{path}: left out of 2 rows: 1 with tools (the first: {path}:1)" in caplog.text


def test_responses_of_another_tokenizer_are_refused(path):
    own = [{"turns": ["a"], "response_ids": [[AB, A]]}] * 3
    foreign = [{"turns": ["a"], "response_ids": [[A, B]]}] * 4  # decodes to ab, which is one token
    assert len(imported(path, *own, *foreign[:1])) == 4
    with pytest.raises(UserError, match=r"only 3 of 7 responses keep their ids .* another tokenizer's"):
        imported(path, *own, *foreign)


def test_texts_are_cut_to_a_length(path):
    found = imported(
        path, {"turns": ["a"], "response_ids": [[AB, A]]}, {"turns": ["a"], "response_ids": [[]]}
    )
    assert conversations.cut(found, 3) == 1
    assert [(c.tokens, c.assistant) for c in found] == [
        ([A, AB, A], [False, True, True]),
        ([A, END], [False, True]),
    ]
