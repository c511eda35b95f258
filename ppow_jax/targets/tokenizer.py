"""The tokenizer of a target: text to ids and back, and conversations to ids by its chat template."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from ppow_jax.errors import UserError
from ppow_jax.targets.chat import ChatTemplate, Message

# Stands for a response while what the template writes behind it is looked for; no letters, which it may fold.
_RESPONSE = "\ufffe0\ufffe"
_QUESTION = "what"  # that a template surely keeps
ENDS = ("<|endoftext|>",)  # end a text whatever the files say


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, and conversations to ids.

    Attributes:
      core: the `tokenizers` object; special tokens in the text are recognised, nothing is cut or padded.
      template: the model's chat template (jinja2).
      stop_ids: ids that end a turn; the first is the one that the template writes (`with_stops`).
      variables: what the template gets beside the conversation: the texts of special tokens as `bos_token`,
        `eos_token`, ..., where the model has them, and what `config.target.template_variables` says.
      rows: of the target's embedding; ids beyond them are refused where a text has one. None: not known.
      model: path or name of the target, for errors.
    """

    core: tokenizers.Tokenizer
    template: str
    stop_ids: tuple[int, ...]
    variables: Mapping[str, Any]
    rows: int | None = None
    model: str = ""

    @property
    def _template_named(self) -> str:
        return f"{self.model}: chat template".removeprefix(": ")

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self.template, self._template_named)

    @property
    def bos(self) -> str:
        """Text of the token that begins texts; empty: there is none."""
        return self.variables.get("bos_token", "")

    @property
    def eos(self) -> str:
        """Text of the token that ends texts; empty: there is none."""
        return self.variables.get("eos_token", "")

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added.

        Raises:
          UserError: the library refuses the text, or the target's embedding has no row for an id.
        """
        try:
            ids = self.core.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # the library raises nothing more specific; a panic of it is no Exception
            raise UserError(f"tokenizer: a text cannot be encoded ({e}): {text[:60]!r}") from e
        if self.rows is not None and max(ids, default=0) >= self.rows:
            token = self.core.id_to_token(max(ids))
            raise UserError(
                f"tokenizer: a text has the token {token!r} (id {max(ids)}), expected ids below {self.rows}, "
                "the rows of the target's embedding; take it out of the text"
            )
        return ids

    def encode_after(self, text: str) -> list[int]:
        """Ids of a text that goes on behind another one.

        Tokenizers of some kinds put a blank before the first word of all; it is encoded behind a stop token.
        """
        ids = self.encode((self.core.id_to_token(self.stop_ids[0]) or "") + text)
        return ids[1:] if ids[:1] == [self.stop_ids[0]] else self.encode(text)

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        """Text of ids, with or without special tokens."""
        return self.core.decode(list(ids), skip_special_tokens=not special)

    def added(self, before: Sequence[int], ids: Sequence[int], special: bool = True) -> str:
        """What ids add to the text of those before, with or without special tokens.

        Decoded alone, their bytes may be no characters, and a first blank is lost.
        """
        known = self.decode(before, special).rstrip("\ufffd")
        return self.decode([*before, *ids], special)[len(known) :] if ids else ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, ending where the assistant's next turn begins, if so wanted.

        Raises:
          UserError: whatever goes wrong in the template.
        """
        return self._chat.render(messages, self.variables, add_generation_prompt)

    def first_turn(self, user: str, system: str = "") -> list[int]:
        """Ids up to the start of the response to the first user message; errors as of `encode`, `render`."""
        return self.encode(self.render(first_messages(user, system)))

    def written(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """Of a conversation that ends with a response: the text before it, and the response's ids.

        The response is what the template marks by `{% generation %}`, or what it adds to the conversation
        without the response. The token that ends the turn belongs to it.

        Raises:
          UserError: the template does not tell where the response begins, or goes wrong.
        """
        text, end = self.render(messages, add_generation_prompt=False), None
        marked = self._chat.spans(messages, self.variables)
        before = self.render(messages[:-1])
        if marked:
            start, end = marked[-1]
        elif text.startswith(before):
            start = len(before)
        else:
            raise UserError(
                f"{self._template_named}: with the response, the text before it is another than without; "
                "expected the same, or {% generation %} around the response; set respond.keep_answers=False"
            )
        ids, rest = self.encode_after(text[start:end]), self.encode_after(text[end:] if end else "")
        stop = next((at for at, i in enumerate(ids) if i in self.stop_ids), None)
        if stop is not None:
            ids = ids[: stop + 1]
        elif rest and rest[0] in self.stop_ids:
            ids += rest[:1]
        return text[:start], ids


def first_messages(user: str, system: str = "") -> list[Message]:
    """A conversation of one question."""
    said = [{"role": "system", "content": system}] if system else []
    return [*said, {"role": "user", "content": user}]


def with_stops(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with that stop id first which its template writes behind a response.

    Raises:
      UserError: the template cannot render a single question, or leaves out what it asks.
    """
    question, response = first_messages(_QUESTION), {"role": "assistant", "content": _RESPONSE}
    if _QUESTION not in tokenizer.render(question):
        raise UserError(
            f"{tokenizer.model}: the chat template leaves out what the user says, expected it in the text; "
            "use a template for messages whose content is a text"
        )
    for messages in ([*question, response, *question], [*question, response]):
        try:
            _, found, after = tokenizer.render(messages, len(messages) > 2).partition(_RESPONSE)
        except UserError:  # it may refuse conversations like this one, and then says so of those of the user
            continue
        first = next((i for i in tokenizer.encode(after) if i in tokenizer.stop_ids), None)
        if found and first is not None:
            stops = sorted(tokenizer.stop_ids, key=lambda i: i != first)
            return dataclasses.replace(tokenizer, stop_ids=tuple(stops))
    return tokenizer
