"""Rows of data as dialogues, in the forms that are in use.

A row is read by the first of `FIELDS` that it has:

- `turns`: the user's messages, as strings or as objects of `role` and `content`; or one string;
- `messages` (OpenAI's) and `conversations` (ShareGPT's): objects of `role` and `content`, or `from` and
  `value`;
- `prompt`: a string, or messages;
- `instruction` (Alpaca's; with `input` behind it), `question`, `text` and so on: a string.
"""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ppow_jax.errors import UserError
from ppow_jax.targets.chat import Message

_LISTS = ("turns", "messages", "conversations", "conversation", "prompt")  # may hold several messages
FIELDS = (*_LISTS, "instruction", "question", "text", "document", "article", "en")
_ANSWERS = {"prompt": "completion", "instruction": "output", "question": "answer"}
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
USED = (*FIELDS, *_ANSWERS.values(), *_SYSTEM, *_TOOLS, "input")

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_call", "function_response", "observation"), "tool"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_BETWEEN = "\n\n"  # messages that are joined


class Dialogue(NamedTuple):
    """What is said in a row, as `Prompt` has it."""

    turns: tuple[str, ...]
    system: str
    answers: tuple[str, ...]


class LeftOut(Exception):
    """A row that is sound, but that is no prompt of text alone; says why."""


def read(row: Mapping[str, Any], place: str) -> Dialogue:
    """The dialogue of a row.

    Of `messages`, `conversations` and `prompt`, messages of one role in a row are joined by an empty line; of
    `turns` each of the user's is a turn. What an assistant says before the first question is dropped.

    Args:
      row: its fields.
      place: where it stands, for messages.

    Raises:
      UserError: a field of another form.
      LeftOut: tools, parts that are not text, or nothing that the user says.
    """
    if any(_given(row.get(name)) for name in _TOOLS):
        raise LeftOut("with tools")
    if any(_given(row.get(name)) for name in _MEDIA):
        raise LeftOut("with more than text")
    name = next((name for name in FIELDS if row.get(name) is not None), None)
    if name is None and any(name in row for name in FIELDS):
        raise LeftOut("where the user says nothing")
    if name is None:
        found = ", ".join(str(name) for name in row if name not in ("id", "category"))[:200] or "none"
        raise UserError(f"{place}: found the fields {found}; expected one of {', '.join(FIELDS)}")
    system = [_text(row[key], f"{place}: {key!r}") for key in _SYSTEM if row.get(key) is not None]
    value = row[name]
    if isinstance(value, str):
        spoken = list(_question(row, name, place))
    elif name in _LISTS:
        spoken = list(_messages(value, name, place))
    else:
        raise UserError(f"{place}: found {_kind(value)} in {name!r}, expected a string")
    return _folded(system, spoken, joined=name != "turns")


def spoken(messages: Any, place: str) -> list[Message]:
    """A dialogue in progress: messages up to a question, in the forms that `messages` of a row may have.

    Raises:
      UserError: another form, tools, parts that are not text, or a last message that is not the user's.
    """
    try:
        found = [{"role": role, "content": text} for role, text in _messages(messages, "messages", place)]
    except LeftOut as e:
        raise UserError(f"{place}: found messages {e}, expected text alone") from e
    if not found or found[-1]["role"] != "user":
        role = repr(found[-1]["role"]) if found else "none"
        raise UserError(f"{place}: found {role} as the last message's role, expected 'user', who asks")
    return found


def _question(row: Mapping[str, Any], name: str, place: str) -> Iterator[tuple[str, str]]:
    """A question and, where the data has it, its answer."""
    question = _text(row[name], f"{place}: {name!r}")
    if name == "instruction" and row.get("input") is not None:
        given = _text(row["input"], f"{place}: 'input'")
        question = _BETWEEN.join(filter(str.strip, (question, given)))
    yield "user", question
    answer = row.get(_ANSWERS.get(name, ""))
    if isinstance(answer, str):
        yield "assistant", _text(answer, f"{place}: {_ANSWERS[name]!r}")


def _messages(messages: Any, name: str, place: str) -> Iterator[tuple[str, str]]:
    """(role, text) of each message."""
    if isinstance(messages, Mapping) and all(isinstance(column, list) for column in messages.values()):
        # as some libraries keep a list of objects: an object of lists
        messages = [dict(zip(messages, item, strict=False)) for item in zip(*messages.values(), strict=False)]
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise UserError(f"{place}: found {_kind(messages)} in {name!r}, expected a list of messages")
    for number, message in enumerate(messages, 1):
        where = f"{place}: message {number} of {name!r}"
        if name == "turns" and isinstance(message, str):
            yield "user", _text(message, where)
            continue
        if not isinstance(message, Mapping):
            expected = "a string or an object" if name == "turns" else "an object"
            raise UserError(f"{where}: found {_kind(message)}, expected {expected} of role and content")
        who, what = ("from", "value") if "from" in message else ("role", "content")
        role = _ROLES.get(str(message.get(who)).lower())
        if role is None:
            found, roles = reprlib.repr(message.get(who)), ", ".join(_ROLES)
            raise UserError(f"{where}: found {found} as its {who!r}, expected one of {roles}")
        if role == "tool" or any(_given(message.get(call)) for call in ("tool_calls", "function_call")):
            raise LeftOut("with tools")
        if any(_given(message.get(medium)) for medium in _MEDIA):
            raise LeftOut("with more than text")
        if what not in message:
            raise UserError(f"{where}: it has no {what!r}, expected its text there")
        yield role, _text(message[what], where)


def _text(content: Any, place: str) -> str:
    """The text of a message: a string, null (nothing is said), or parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return checked(content, place)
    if not isinstance(content, list):
        raise UserError(f"{place}: found {_kind(content)}, expected a string or a list of parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, Mapping):
            raise UserError(f"{place}: found {_kind(part)} among its parts, expected objects of text")
        kind = str(part.get("type", "text"))
        if kind not in _TEXT_PARTS:
            raise LeftOut("with tools" if "tool" in kind or "function" in kind else "with more than text")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{place}: found {_kind(part.get('text'))} as a part's 'text', expected a string")
        texts.append(checked(part["text"], place))
    return "\n".join(texts)


def checked(text: str, place: str) -> str:
    """The text, if all of it can be said.

    Raises:
      UserError: NUL, or half of a surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = text[e.start]
        raise UserError(
            f"{place}: found {half!r}, half of a surrogate pair; write the whole character, or take it out"
        ) from e
    if "\0" in text:
        raise UserError(f"{place}: found the character NUL ('\\0'), which is no text; take it out")
    return text


def _folded(system: list[str], spoken: list[tuple[str, str]], joined: bool) -> Dialogue:
    """Messages as turns, each with what was answered."""
    turns: list[str] = []
    answers: list[str] = []
    before = ""
    for role, text in spoken:
        if role == "system" and turns:
            raise LeftOut("with a system message behind the first question")
        if role == "user" and not text.strip():
            raise LeftOut("with an empty question")
        if role == "system":
            system = [*system, text]
        elif role == "user" and joined and before == "user":
            turns[-1] += _BETWEEN + text
        elif role == "user":
            turns.append(text)
            answers.append("")
        elif turns:
            answers[-1] = _BETWEEN.join(filter(None, (answers[-1], text)))
        before = role
    if not turns:
        raise LeftOut("where the user says nothing")
    paired = all(answer.strip() for answer in answers)
    return Dialogue(tuple(turns), _BETWEEN.join(filter(str.strip, system)), tuple(answers) if paired else ())


def _given(value: Any) -> bool:
    """Whether a field says anything."""
    if isinstance(value, str):
        return value not in ("", "[]")
    return len(value) > 0 if hasattr(value, "__len__") else bool(value)  # an array has no truth of its own


def _kind(value: Any) -> str:
    """How JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), reprlib.repr(value))
