"""Answers in the terminal, round by round."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from ppow_jax.chat.exchange import Exchange

ACCEPTED, REFUSED, OWN = "green", "dim red strike", "underline"


def questions(console: Console, prompt: str) -> Iterator[str]:
    """What the user asks: the prompt alone or, if there is none, line by line until an empty one."""
    if prompt:
        yield prompt
        return
    while True:
        try:
            said = console.input("> " if console.is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not said:
            return
        yield said


def show(console: Console, text: Mapping[str, Any]) -> None:
    """Prints a round (`report.samples.round_as_text`) behind what is there; where nothing can have a colour,
    without what was refused."""
    refused = text["refused"] + text["dropped"] if console.is_terminal else ""
    parts = ((text["accepted"], ACCEPTED), (refused.replace("\n", "⏎"), REFUSED), (text["own"], OWN))
    line = Text.assemble(*((_harmless(part), style) for part, style in parts), end="")
    console.print(line, end="", soft_wrap=True)


def finish(console: Console, exchange: Exchange) -> None:
    """Prints the figures below an answer."""
    console.print(Text(f"\n\n{' · '.join(exchange.figures())}\n", style="dim"), soft_wrap=True)


def _harmless(text: str) -> str:
    """The text with a sign in place of every character that would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
