"""Chat templates: conversations as the text that a model was trained on, as transformers renders them."""

import json
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2

from ppow_jax.errors import ConfigError, UserError
from ppow_jax.targets import sandbox

Message = dict[str, str]  # `role` (system, user or assistant) and `content`
_OURS = ("messages", "tools", "documents", "add_generation_prompt")
_LONGEST = 300  # characters of what a template says of an error


class ChatTemplate:
    """A template that is compiled once.

    Args:
      source: its text.
      name: what errors call it.

    Raises:
      UserError: it is no template.
    """

    def __init__(self, source: str, name: str = "chat template") -> None:
        self._sandbox, self._name = sandbox.Sandbox(), name
        with self._errors():
            self._template = self._sandbox.compiled(source)

    def render(
        self, messages: Sequence[Message], variables: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        """The conversation as text.

        Args:
          messages: what was said.
          variables: by name: special tokens, and what else the template asks for.
          add_generation_prompt: whether the text ends where the assistant's next turn begins.

        Raises:
          UserError: whatever goes wrong in the template.
        """
        return self._render(messages, variables, add_generation_prompt, marking=False)

    def spans(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[tuple[int, int]]:
        """[start, end) of what the assistant said in the rendered text, by `{% generation %}`.

        Empty: the template has no such tag, or makes something else of what stands in it.

        Raises:
          UserError: whatever goes wrong in the template.
        """
        if not self._sandbox.has_generation:
            return []
        marked = self._render(messages, variables, False, marking=True)
        text, starts, found = "", [], []
        for part in re.split(f"([{sandbox.OPEN}{sandbox.CLOSE}])", marked):
            if part == sandbox.OPEN:
                starts.append(len(text))
            elif part == sandbox.CLOSE and starts:
                found.append((starts.pop(), len(text)))
            else:
                text += part
        return found if text == self.render(messages, variables, False) else []

    def _render(
        self, messages: Sequence[Message], variables: Mapping[str, Any], prompt: bool, marking: bool
    ) -> str:
        given = dict(variables) | dict(
            messages=list(messages),
            tools=None,
            documents=None,
            add_generation_prompt=prompt,
        )
        with self._errors():
            self._sandbox.begin(marking, given)
            return "".join(self._template.generate(given))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Makes one line of all that goes wrong in a template, which may raise anything."""
        try:
            yield
        except Exception as e:
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(e.__traceback__)
                if frame.filename == "<template>"
            ]
            said = " ".join(str(getattr(e, "message", e)).split())[:_LONGEST]
            if isinstance(e, jinja2.TemplateSyntaxError):
                lines = [e.lineno]
            elif not isinstance(e, jinja2.TemplateError):
                said = f"{type(e).__name__}: {said}".removesuffix(": ")
            place = f"line {lines[-1]}: " if lines else ""
            raise UserError(f"{self._name}: {place}{said}") from e


def variables(text: str, key: str) -> dict[str, Any]:
    """Variables of a template from a JSON object; an empty text: none.

    Raises:
      ConfigError: it is none, or has a name that is no variable's or is taken; the message begins with `key`.
    """
    expected = f'{key}: found {text!r}, expected a JSON object such as {{"enable_thinking": false}}'
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{expected} ({e})") from None
    if not isinstance(found, dict):
        raise ConfigError(expected)
    for name in found:
        if not name.isidentifier() or name in _OURS:
            raise ConfigError(f"{expected}; {name!r} is no name for a variable of the template's own")
    return found
