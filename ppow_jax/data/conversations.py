"""Conversations: token ids, which of them the target wrote, and where they came from."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppow_jax.data.prompt import Prompt
from ppow_jax.data.prompts import read_jsonl
from ppow_jax.errors import UserError
from ppow_jax.targets.chat import Message
from ppow_jax.targets.tokenizer import Tokenizer, first_messages

_SAMPLE = 64  # imported rows whose ids are decoded and encoded again
_ROUND_TRIPS = 0.5  # share of them that must come back; text of this tokenizer: about 0.97


class Question(NamedTuple):
    """What is asked next.

    Attributes:
      text: all so far as the template renders it, up to where the answer begins.
      ids: of what is new in it; of all of it, if `afresh`.
      length: tokens of all of it.
      afresh: whether the template has changed what was said before, as most that drop earlier thinking do.
    """

    text: str
    ids: list[int]
    length: int
    afresh: bool


@dataclasses.dataclass
class Text:
    """Token ids, a mask of those that the target wrote, and their features.

    `features` has the fields of `target_outputs.Features`, one row a token; None if they are not kept.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    assistant: list[bool] = dataclasses.field(default_factory=list)
    features: dict[str, np.ndarray] | None = None


class _Answer(NamedTuple):
    """Tokens `start` to `end` of a text; `content`: the answer where the data has it, else None."""

    text: Text
    start: int
    end: int
    content: str | None


@dataclasses.dataclass
class Conversation:
    """A dialogue as it grows, as one text, or as several where the template changes what was said before.

    A target that is served reads each turn as its template renders it then. Where that only adds to the text
    so far, the text goes on, with the very ids that were written. Where it does not, the turn has a text of
    its own, in which what was said before is part of the prompt.
    """

    prompt: Prompt
    texts: list[Text] = dataclasses.field(default_factory=lambda: [Text()])
    _rendered: str = ""  # what the last text's tokens stand for, up to its last answer
    _answers: list[_Answer] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Of the last text."""
        return self.texts[-1].tokens

    @property
    def assistant(self) -> list[bool]:
        """Of the last text."""
        return self.texts[-1].assistant

    def check(self, tokenizer: Tokenizer) -> None:
        """Renders all turns, with some answers, before any is asked.

        Raises:
          UserError: naming the prompt: the template refuses it.
        """
        with _naming(self.prompt):
            tokenizer.render(dialogue(self.prompt, ["x"] * (len(self.prompt.turns) - 1)))

    def question(self, tokenizer: Tokenizer, turn: int) -> Question:
        """The user's message number `turn`, the next one, with the template around it.

        Raises:
          UserError: naming the prompt: the template refuses it, or it cannot be encoded.
        """
        with _naming(self.prompt):
            answers = [_content(tokenizer, answer) for answer in self._answers[:turn]]
            return self._next(tokenizer, tokenizer.render(dialogue(self.prompt, answers)))

    def ask(self, question: Question) -> None:
        """Appends what the user said, or begins another text with all of it."""
        if question.afresh:
            self.texts.append(Text())
        self.tokens.extend(question.ids)
        self.assistant.extend([False] * len(question.ids))
        self._rendered = question.text

    def answer(self, ids: list[int], content: str | None = None) -> None:
        """Appends what the target wrote, its end-of-turn token included, or what the data says it did."""
        start = len(self.tokens)
        self.tokens.extend(ids)
        self.assistant.extend([True] * len(ids))
        self._answers.append(_Answer(self.texts[-1], start, len(self.tokens), content))

    def take(self, tokenizer: Tokenizer, longest: int) -> int:
        """Appends the answers that the prompt itself has, and returns how many.

        It stops before a text of more than `longest` tokens.

        Raises:
          UserError: naming the prompt: the template refuses it, or does not tell what the assistant wrote.
        """
        for turn, answer in enumerate(self.prompt.answers):
            messages = dialogue(self.prompt, self.prompt.answers[:turn])
            with _naming(self.prompt):
                before, ids = tokenizer.written([*messages, {"role": "assistant", "content": answer}])
                question = self._next(tokenizer, before)
            if question.length + len(ids) > longest:
                return turn
            self.ask(question)
            self.answer(ids, answer)
        return len(self.prompt.answers)

    def records(self) -> list[dict[str, Any]]:
        """The form in which conversations are stored: the texts, all under the id of the prompt."""
        return [
            {
                "id": self.prompt.id,
                "category": self.prompt.category,
                "tokens": np.asarray(text.tokens, np.int32),
                "assistant": np.asarray(text.assistant, np.uint8),
            }
            for text in self.texts
        ]

    def _next(self, tokenizer: Tokenizer, text: str) -> Question:
        """A rendered text as what it adds to the last one, if it only adds."""
        if self._answers:
            start = self._answers[-1].start
            known = self._rendered + tokenizer.added(self.tokens[:start], self.tokens[start:])
            if text.startswith(known):
                ids = tokenizer.encode_after(text[len(known) :])
                return Question(text, ids, len(self.tokens) + len(ids), afresh=False)
        ids = tokenizer.encode(text)
        return Question(text, ids, len(ids), afresh=bool(self._answers))


def _content(tokenizer: Tokenizer, answer: _Answer) -> str:
    """An answer as a server hands it out: without special tokens and the token that ends the turn."""
    if answer.content is not None:
        return answer.content
    before, ids = answer.text.tokens[: answer.start], answer.text.tokens[answer.start : answer.end]
    finished = bool(ids) and ids[-1] in tokenizer.stop_ids
    return tokenizer.added(before, ids[:-1] if finished else ids, special=False)


@contextlib.contextmanager
def _naming(prompt: Prompt) -> Iterator[None]:
    """Puts the prompt before what is said of an error."""
    try:
        yield
    except UserError as e:
        raise UserError(f"prompt {prompt.id!r}: {e}") from e


def dialogue(prompt: Prompt, answers: Sequence[str]) -> list[Message]:
    """The messages up to the question after those answers."""
    messages = first_messages(prompt.turns[0], prompt.system)
    for answer, user in zip(answers, prompt.turns[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": user}]
    return messages


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
        turns, responses = row.get("turns"), row.get("response_ids")
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
