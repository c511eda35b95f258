"""Prompts and responses that strangers make: each file is read, or refused in one line."""

import copy
import dataclasses
import gzip
import pathlib
from collections.abc import Callable

import strange
from chats import tokenizer
from dice import Dice

from ppow_jax.data import conversations, prompts

PROMPTS = [
    {"id": "one", "category": "c", "turns": ["a", {"role": "user", "content": "b"}], "system": "Be brief."},
    {"id": 2, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                           {"role": "assistant", "content": [{"type": "text", "text": "b"}]}], "tools": None},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "completion": "b", "image": None},
    {"instruction": "a", "input": "b", "output": "c"},
    {"prompt": {"role": ["user"], "content": ["a"]}},
    {"question": "a", "answer": "b"},
]  # fmt: skip
ANSWERED = [
    {"turns": ["a", "b"], "response_ids": [[64, 65], [66, 257]], "finished": [False, True]},
    {"turns": ["a"], "response_ids": [[64]]},
    {"messages": [{"role": "user", "content": "a"}], "response_ids": [[64, 257]], "finished": None},
]


@dataclasses.dataclass(frozen=True)
class Rows(strange.Json):
    """Edits of rows, which become JSON Lines, an array, or lines in gzip."""

    rows: list
    form: str

    def on(self, files: dict) -> None:
        """Changes the files."""
        rows = strange.edited(copy.deepcopy(self.rows), self.edits)
        lines = b"\r\n".join(map(strange.dumped, rows if isinstance(rows, list) else [rows]))
        forms = {
            "array": strange.dumped(rows),
            "bom": b"\xef\xbb\xbf" + lines,
            "gzip": gzip.compress(lines, 1),
        }
        files[self.name] = forms.get(self.form, lines)


def made_of(rows: list, name: str) -> Callable[[Dice], list]:
    """Rows that are changed, and then perhaps the bytes of their file."""
    of_file = strange.changes(others=[name])

    def make(dice: Dice) -> list:
        edited = Rows(name, strange.edits(dice), rows, dice.of(("lines", "array", "bom", "gzip")))
        return [edited, *(of_file(dice) if dice.below(3) == 0 else ())]

    return make


@strange.counts(2)
def test_prompts(count, tmp_path):
    name = "prompts.jsonl"
    place = strange.Place(tmp_path, {name: b"\n".join(map(strange.dumped, PROMPTS))})

    def read(directory: pathlib.Path) -> None:
        prompts.load(f"x={directory / name}", "respond.prompts", warn=False)

    read(place.here)
    strange.examples(count, made_of(PROMPTS, name), lambda made: place.hold(made, read))


@strange.counts(2)
def test_responses(count, tmp_path):
    name = "responses.jsonl"
    place = strange.Place(tmp_path, {name: b"\n".join(map(strange.dumped, ANSWERED))})
    tokens = tokenizer()

    def read(directory: pathlib.Path) -> None:
        found = conversations.import_responses(str(directory / name), tokens, 259)
        conversations.cut(found, 8)
        [conversation.records() for conversation in found]

    read(place.here)
    strange.examples(count, made_of(ANSWERED, name), lambda made: place.hold(made, read))


@strange.counts(4)
def test_answers_of_prompts(count, tmp_path):
    """What a dialogue's own answers become by a template."""
    name = "prompts.jsonl"
    place = strange.Place(tmp_path, {name: strange.dumped(PROMPTS)})
    tokens = tokenizer()

    def read(directory: pathlib.Path) -> None:
        for prompt in prompts.load(f"x={directory / name}", "respond.prompts", warn=False)["x"]:
            conversation = conversations.Conversation(prompt)
            conversation.check(tokens)
            conversation.take(tokens, 64)
            conversation.records()

    read(place.here)
    strange.examples(count // 5, made_of(PROMPTS, name), lambda made: place.hold(made, read, "prompt '"))
