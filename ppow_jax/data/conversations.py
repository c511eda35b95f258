"""Conversations: token ids, which of them the target wrote, and where they came from."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from ppow_jax.data.prompt import Prompt
from ppow_jax.data.prompts import read_jsonl
from ppow_jax.errors import UserError
from ppow_jax.targets.tokenizer import Tokenizer

_SAMPLE = 64  # imported rows whose ids are decoded and encoded again
_ROUND_TRIPS = 0.5  # share of them that must come back; text of this tokenizer: about 0.97


@dataclasses.dataclass
class Conversation:
    """A dialogue as it grows: all ids so far, a mask of those that the target wrote, and their features.

    `features` has the fields of `target_outputs.Features`, one row a token; none if they are not kept.
    """

    prompt: Prompt
    tokens: list[int] = dataclasses.field(default_factory=list)
    assistant: list[bool] = dataclasses.field(default_factory=list)
    features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

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


def import_responses(path: str, tokenizer: Tokenizer, vocab_size: int) -> list[Conversation]:
    """Conversations from a JSONL file with `turns`, `response_ids` and, optionally, `finished`.

    `response_ids` holds one list of ids a turn, the end-of-turn token left out; `finished` says
    whether that token followed. Turns beyond the responses are dropped.

    Raises:
      UserError: no rows, malformed fields, ids outside the vocabulary, or ids of another tokenizer.
    """
    key = "respond.responses"
    conversations = []
    for number, row in enumerate(read_jsonl(path, key), 1):
        turns, responses = row.get("turns", ()), row.get("response_ids", ())
        lists = isinstance(turns, list) and isinstance(responses, list) and responses
        if not lists or not all(isinstance(t, str) for t in turns):
            raise UserError(f"{path}: object {number} lacks 'turns' or 'response_ids'")
        finished = row.get("finished", [True] * len(responses))
        paired = isinstance(finished, list) and len(finished) == len(responses)
        if not paired or not all(isinstance(r, list) for r in responses):
            raise UserError(
                f"{path}: object {number}: expected one list of ids a turn in 'response_ids' and, if "
                "there, one true or false for each in 'finished'"
            )
        ids = list(itertools.chain.from_iterable(responses))
        wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < vocab_size]
        if wrong:
            raise UserError(
                f"{path}: object {number} has the token id {wrong[0]!r}, expected ids below "
                f"{vocab_size}; was it written by another model?"
            )
        prompt = Prompt(str(row.get("id", number)), str(row.get("category", "")), tuple(turns))
        conversation = Conversation(prompt)
        for turn, response in enumerate(responses[: len(prompt.turns)]):
            conversation.ask(conversation.question(tokenizer, turn))
            conversation.answer(response + [tokenizer.stop_ids[0]] * bool(finished[turn]))
        conversations.append(conversation)
    if not conversations:
        raise UserError(f"{key}: {path!r} holds no responses; expected at least one")
    _check_tokenizer(path, conversations, tokenizer)
    return conversations


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
