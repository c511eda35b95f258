"""Conversations: token ids, which of them the target wrote, and where they came from."""

import dataclasses
import itertools
import reprlib
from typing import Any, NamedTuple

import numpy as np

from ppow_jax.data import rows
from ppow_jax.data.prompt import Prompt
from ppow_jax.data.prompts import of_rows
from ppow_jax.errors import UserError
from ppow_jax.parallel.console import log
from ppow_jax.targets.tokenizer import Tokenizer

_SAMPLE = 64  # imported rows whose ids are decoded and encoded again
_ROUND_TRIPS = 0.5  # share of them that must come back; text of this tokenizer: about 0.97


@dataclasses.dataclass
class Conversation:
    """A dialogue as it grows: all ids so far, a mask of those that the target wrote, and their features.

    `features` has the fields of `target_outputs.Features`, one row a token; None if they are not kept.
    """

    prompt: Prompt
    tokens: list[int] = dataclasses.field(default_factory=list)
    assistant: list[bool] = dataclasses.field(default_factory=list)
    features: dict[str, np.ndarray] | None = None

    def question(self, tokenizer: Tokenizer, turn: int) -> list[int]:
        """The ids of the user's message number `turn`, the next one, and of the template around it."""
        message = self.prompt.turns[turn]
        if turn == 0:
            return tokenizer.first_turn(message)
        ids = tokenizer.next_turn(message)
        # A response may have ended with the end-of-turn token itself.
        return ids[1:] if self.tokens[-1] == ids[0] else ids

    def ask(self, ids: list[int]) -> None:
        """Appends what the user said."""
        self.tokens += ids
        self.assistant += [False] * len(ids)

    def answer(self, ids: list[int]) -> None:
        """Appends what the target wrote, its end-of-turn token included."""
        self.tokens += ids
        self.assistant += [True] * len(ids)

    def record(self) -> dict[str, Any]:
        """The form in which conversations are stored."""
        return {
            "id": self.prompt.id,
            "category": self.prompt.category,
            "tokens": np.asarray(self.tokens, np.int32),
            "assistant": np.asarray(self.assistant, np.uint8),
        }


def spans(assistant_T: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of every run of the target's own tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], assistant_T.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


class Answered(NamedTuple):
    """A row of a file of responses.

    Attributes:
      place: where it stands, for messages.
      prompt: what was asked.
      responses: the ids of each answer, at most one a turn.
      finished: of each, whether the end-of-turn token followed; None: not said.
    """

    place: str
    prompt: Prompt
    responses: list[list[int]]
    finished: list[bool | None]


def read_responses(path: str, key: str, warn: bool = True) -> list[Answered]:
    """The rows of a file of prompts (`data.dialogue`) with `response_ids` and, optionally, `finished`.

    Args:
      path: of the file.
      key: the config key that it came from, for messages.
      warn: whether the log says which rows are left out, and how many turns have no response.

    Raises:
      UserError: no rows, or a malformed one.
    """
    found, unanswered = [], 0
    for row, prompt in of_rows(rows.read(path, key), key, path, warn):
        responses, finished = row.values.get("response_ids"), row.values.get("finished")
        listed = isinstance(responses, list) and responses
        if not listed or not all(isinstance(ids, list) for ids in responses):
            raise UserError(
                f"{row.place}: found {reprlib.repr(responses)} as 'response_ids', expected one list of token "
                "ids a turn"
            )
        if len(responses) > len(prompt.turns):
            raise UserError(
                f"{row.place}: found {len(responses)} lists in 'response_ids' but {len(prompt.turns)} turns, "
                "expected at most one list a turn"
            )
        for i in itertools.chain.from_iterable(responses):
            if type(i) is not int or i < 0:  # true and false are ints too
                raise UserError(f"{row.place}: found {reprlib.repr(i)} as a token id, expected 0 or more")
        paired = isinstance(finished, list) and len(finished) == len(responses)
        if finished is not None and not (paired and all(isinstance(f, bool) for f in finished)):
            raise UserError(
                f"{row.place}: found {reprlib.repr(finished)} as 'finished', expected true or false for each "
                "list in 'response_ids': whether the end-of-turn token followed"
            )
        unanswered += len(prompt.turns) - len(responses)
        found.append(Answered(row.place, prompt, responses, finished or [None] * len(responses)))
    if not found:
        raise UserError(f"{key}: {path!r} holds no responses; expected at least one")
    if unanswered and warn:
        log.warning("%s: %d turns have no list in 'response_ids'; they are dropped", path, unanswered)
    return found


def import_responses(path: str, tokenizer: Tokenizer, vocab_size: int) -> list[Conversation]:
    """Conversations from a file that `read_responses` reads.

    An answer ends with the end-of-turn token unless it was not finished; it may have that token itself. Turns
    that have no answer are dropped.

    Raises:
      UserError: as `read_responses`; ids outside the vocabulary, an end-of-turn token within an answer or
        behind one that was not finished, or ids of another tokenizer.
    """
    conversations = []
    for place, prompt, responses, finished in read_responses(path, "respond.responses", warn=False):
        conversation = Conversation(prompt)
        for turn, (ids, ended) in enumerate(zip(responses, finished, strict=True)):
            wrong = next((i for i in ids if i >= vocab_size), None)
            if wrong is not None:
                raise UserError(
                    f"{place}: found the token id {reprlib.repr(wrong)}, expected ids below {vocab_size}; "
                    "was it written by another model?"
                )
            stops = [at for at, i in enumerate(ids) if i in tokenizer.stop_ids]
            if stops and (stops[0] < len(ids) - 1 or ended is False):
                raise UserError(
                    f"{place}: found the end-of-turn token {ids[stops[0]]} as number {stops[0] + 1} of the "
                    f"{len(ids)} ids of answer {turn + 1}, expected it at the end of a finished one, or not "
                    "at all"
                )
            try:
                conversation.ask(conversation.question(tokenizer, turn))
            except UserError as e:  # a chat template that refuses it
                raise UserError(f"{place}: {e}") from e
            conversation.answer(ids + [tokenizer.stop_ids[0]] * (not stops and ended is not False))
        conversations.append(conversation)
    _check_tokenizer(path, conversations, tokenizer)
    return conversations


def cut(conversations: list[Conversation], length: int) -> int:
    """Cuts conversations to so many tokens; returns how many were longer."""
    longer = [c for c in conversations if len(c.tokens) > length]
    for conversation in longer:
        del conversation.tokens[length:], conversation.assistant[length:]
    return len(longer)


def _check_tokenizer(path: str, conversations: list[Conversation], tokenizer: Tokenizer) -> None:
    """A model's own ids nearly always survive decode and encode; another tokenizer's do not."""
    sample = conversations[:: max(1, len(conversations) // _SAMPLE)]
    same = 0
    for conversation in sample:
        start, end = next(iter(spans(np.asarray(conversation.assistant))), (0, 0))  # none: all empty
        ids = [i for i in conversation.tokens[start:end] if i not in tokenizer.stop_ids]
        same += tokenizer.encode(tokenizer.decode(ids)) == ids
    if same < _ROUND_TRIPS * len(sample):
        raise UserError(
            f"{path}: only {same} of {len(sample)} responses keep their ids when decoded and encoded "
            "again; the ids are another tokenizer's"
        )
