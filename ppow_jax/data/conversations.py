"""Conversations: token ids, which of them the target wrote, and where they came from."""

import contextlib
import dataclasses
import itertools
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ppow_jax.data import rows
from ppow_jax.data.prompt import Prompt
from ppow_jax.data.prompts import of_rows
from ppow_jax.errors import UserError
from ppow_jax.parallel.console import log
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

    `features` has the fields of `target_outputs.Features`, one row a token; none if they are not kept.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    assistant: list[bool] = dataclasses.field(default_factory=list)
    features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class _Answer(NamedTuple):
    """Tokens `start` to `end` of a text."""

    text: Text
    start: int
    end: int


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

    @property
    def answered(self) -> int:
        """Turns that have an answer."""
        return len(self._answers)

    def check(self, tokenizer: Tokenizer) -> None:
        """Renders and encodes all turns, with some answers, before any is asked.

        Raises:
          UserError: naming the prompt: the template refuses it, or it cannot be encoded.
        """
        with _naming(self.prompt):
            tokenizer.encode(tokenizer.render(dialogue(self.prompt, ["x"] * (len(self.prompt.turns) - 1))))

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

    def answer(self, ids: list[int]) -> None:
        """Appends what the target wrote, its end-of-turn token included."""
        start = len(self.tokens)
        self.tokens.extend(ids)
        self.assistant.extend([True] * len(ids))
        self._answers.append(_Answer(self.texts[-1], start, len(self.tokens)))

    def take(self, tokenizer: Tokenizer, longest: int) -> None:
        """Appends the answers that the prompt itself has.

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
                return
            self.ask(question)
            self.answer(ids)

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
        if not ids:
            raise UserError(
                f"found no tokens in {text!r}, which the template makes of it; expected at least one"
            )
        return Question(text, ids, len(ids), afresh=bool(self._answers))


def _content(tokenizer: Tokenizer, answer: _Answer) -> str:
    """An answer as a server hands it out: without special tokens and the token that ends the turn."""
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
        if not (isinstance(responses, list) and responses and all(isinstance(x, list) for x in responses)):
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
    """Cuts texts to so many tokens; returns how many were longer."""
    longer = [text for c in conversations for text in c.texts if len(text.tokens) > length]
    for text in longer:
        del text.tokens[length:], text.assistant[length:]
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
