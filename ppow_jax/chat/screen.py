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
    """Prints a round behind what is there; where nothing can have a colour, without what was refused."""
    console.print(line(text, refused=console.is_terminal), end="", soft_wrap=True)


def finish(console: Console, exchange: Exchange) -> None:
    """Prints the figures below an answer."""
    console.print(Text("\n\n") + figures(exchange), soft_wrap=True)


def question(exchange: Exchange) -> Text:
    """A question as it was typed."""
    return Text(f"> {_harmless(exchange.question)}")


def line(text: Mapping[str, Any], refused: bool = True) -> Text:
    """A round (`report.samples.round_as_text`) in its colours, with or without what was refused."""
    gone = (text["refused"] + text["dropped"]).replace("\n", "⏎") if refused else ""
    parts = ((text["accepted"], ACCEPTED), (gone, REFUSED), (text["own"], OWN))
    return Text.assemble(*((_harmless(part), style) for part, style in parts), end="")


def figures(exchange: Exchange) -> Text:
    """An answer's figures."""
    return Text(" · ".join(exchange.figures()) + "\n", style="dim")


def _harmless(text: str) -> str:
    """The text with a sign in place of every character that would steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
