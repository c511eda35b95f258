"""Rows in the forms that are in use, as turns, system text and answers."""

import pytest

from ppow_jax.data import dialogue
from ppow_jax.data.dialogue import LeftOut
from ppow_jax.errors import UserError

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM, AGAIN = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "more"}


def human(text) -> dict:
    return {"from": "human", "value": text}


def said(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"turns": "hi"}, (("hi",), "", ())),
        ({"turns": ["hi", "more"]}, (("hi", "more"), "", ())),
        ({"turns": [USER, AGAIN]}, (("hi", "more"), "", ())),  # each is a turn
        ({"turns": [USER, REPLY, "more"]}, (("hi", "more"), "", ())),  # one of two is answered
        ({"turns": [USER, REPLY, AGAIN, REPLY]}, (("hi", "more"), "", ("yo", "yo"))),
        ({"turns": ["hi"], "system": "Be brief."}, (("hi",), "Be brief.", ())),
        ({"turns": ["hi"], "system": None}, (("hi",), "", ())),
        ({"turns": ["hi"], "messages": [AGAIN]}, (("hi",), "", ())),  # the first form that it has
        ({"turns": None, "messages": [AGAIN]}, (("more",), "", ())),
        ({"messages": [SYSTEM, USER, REPLY]}, (("hi",), "Be brief.", ("yo",))),
        ({"messages": [said("developer", "A"), said("system", "B"), USER]}, (("hi",), "A\n\nB", ())),
        ({"messages": [SYSTEM, USER], "system_prompt": "A"}, (("hi",), "A\n\nBe brief.", ())),
        ({"messages": [REPLY, USER]}, (("hi",), "", ())),  # a greeting
        ({"messages": [REPLY, USER, REPLY], "tools": "[]"}, (("hi",), "", ("yo",))),
        ({"messages": [USER, AGAIN, REPLY, REPLY]}, (("hi\n\nmore",), "", ("yo\n\nyo",))),
        ({"messages": [USER, said("assistant", None)]}, (("hi",), "", ())),
        ({"messages": [USER, said("assistant", " ")]}, (("hi",), "", ())),
        ({"messages": [USER, said("assistant", "yo", tool_calls=None)], "tools": []}, (("hi",), "", ("yo",))),
        ({"messages": [said("User", [{"type": "text", "text": "a"}, "b"])]}, (("a\nb",), "", ())),
        ({"messages": [said("user", [{"type": "input_text", "text": "a"}])]}, (("a",), "", ())),
        ({"messages": {"role": ["user", "assistant"], "content": ["hi", "yo"]}}, (("hi",), "", ("yo",))),
        ({"conversations": [human("hi"), {"from": "gpt", "value": "yo"}]}, (("hi",), "", ("yo",))),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "gpt", "value": "?"}, human("hi")]},
            (("hi",), "S", ()),
        ),
        ({"conversations": [USER]}, (("hi",), "", ())),  # keys as they come
        ({"conversation": [USER, REPLY]}, (("hi",), "", ("yo",))),
        ({"prompt": "hi"}, (("hi",), "", ())),
        ({"prompt": [SYSTEM, USER]}, (("hi",), "Be brief.", ())),
        ({"prompt": "hi", "completion": "yo"}, (("hi",), "", ("yo",))),
        ({"question": "hi", "answer": "yo"}, (("hi",), "", ("yo",))),
        ({"question": "hi", "answer": 7}, (("hi",), "", ())),
        ({"text": "hi", "answer": "yo"}, (("hi",), "", ())),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, (("Add.\n\n1 2",), "", ("3",))),
        ({"instruction": "Add.", "input": "", "output": ""}, (("Add.",), "", ())),
        ({"instruction": "Add.", "input": None}, (("Add.",), "", ())),
        ({"document": "hi", "summary": "h"}, (("hi",), "", ())),
    ],
)
def test_forms(row, expected):
    assert dialogue.read(row, "p:1") == expected


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"turns": []}, "where the user says nothing"),
        ({"prompt": None}, "where the user says nothing"),
        ({"messages": [SYSTEM, REPLY]}, "where the user says nothing"),
        ({"turns": ["hi", " \n"]}, "with an empty question"),
        ({"conversations": [human(None)]}, "with an empty question"),
        ({"prompt": ""}, "with an empty question"),
        ({"messages": [USER, SYSTEM]}, "with a system message behind the first question"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "with tools"),
        ({"conversations": [human("hi")], "tools": "[{}]"}, "with tools"),
        ({"messages": [USER, said("assistant", None, tool_calls=[{"id": "1"}])]}, "with tools"),
        ({"messages": [USER, said("assistant", None, function_call={"name": "f"})]}, "with tools"),
        ({"messages": [USER, said("tool", "1")]}, "with tools"),
        ({"conversations": [human("hi"), {"from": "observation", "value": "1"}]}, "with tools"),
        ({"messages": [said("user", [{"type": "tool_result", "content": "1"}])]}, "with tools"),
        ({"messages": [said("user", [{"type": "image_url", "image_url": {}}])]}, "with more than text"),
        ({"messages": [said("user", "<image>", images=["x.png"])]}, "with more than text"),
        ({"prompt": "<image>", "images": ["x.png"]}, "with more than text"),
    ],
)
def test_rows_that_are_left_out(row, why):
    with pytest.raises(LeftOut, match=f"^{why}$"):
        dialogue.read(row, "p:1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "query": "hi"}, "found the fields query; expected one of turns, messages,"),
        ({}, "found the fields none; expected one of turns"),
        ({"turns": 3}, "found 3 in 'turns', expected a list of messages"),
        ({"messages": {"role": "user", "content": "hi"}}, "found an object in 'messages', expected a list"),
        ({"question": ["hi"]}, "found a list in 'question', expected a string"),
        ({"turns": ["a", 3]}, "message 2 of 'turns': found 3, expected a string or an object of role and"),
        ({"turns": ["a", None]}, "message 2 of 'turns': found null, expected a string or an object of role"),
        (
            {"messages": ["hi"]},
            "message 1 of 'messages': found a string, expected an object of role and content",
        ),
        (
            {"messages": [{"content": "hi"}]},
            "message 1 of 'messages': found None as its 'role', expected one of",
        ),
        (
            {"messages": [said("wizard", "hi")]},
            "message 1 of 'messages': found 'wizard' as its 'role', expected",
        ),
        (
            {"conversations": [{"from": 3, "value": "hi"}]},
            "message 1 of 'conversations': found 3 as its 'from'",
        ),
        ({"messages": [{"role": "user", "text": "hi"}]}, "message 1 of 'messages': it has no 'content'"),
        ({"messages": [said("user", 3)]}, "message 1 of 'messages': found 3, expected a string or a list of"),
        ({"messages": [said("user", [3])]}, "message 1 of 'messages': found 3 among its parts"),
        ({"messages": [said("user", [{"type": "text"}])]}, "message 1 of 'messages': found null as a part's"),
        ({"turns": ["hi"], "system": True}, "'system': found true or false, expected a string"),
        ({"turns": ["hi"], "system": float("nan")}, "'system': found nan, expected a string"),
        ({"instruction": "hi", "input": 3}, "'input': found 3, expected a string"),
        (
            {"turns": ["half \ud83d"]},
            "message 1 of 'turns': found '\\ud83d', half of a surrogate pair; write",
        ),
        ({"messages": [USER, said("assistant", "\udc00")]}, "message 2 of 'messages': found '\\udc00', half"),
        ({"prompt": "a\0b"}, "'prompt': found the character NUL"),
    ],
)
def test_malformed_rows(row, message):
    with pytest.raises(UserError) as caught:
        dialogue.read(row, "p.jsonl:7")
    assert str(caught.value).startswith(f"p.jsonl:7: {message}") and "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed
