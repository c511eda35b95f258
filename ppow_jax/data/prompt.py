"""What a user asks: the prompt of one conversation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """The user's side of one conversation.

    Attributes:
      id: unique within a run.
      category: by which reports may group; may be empty.
      turns: the user's messages, one or more.
      system: the system message; empty: none, so that a template has its own.
      answers: of a dialogue that is there already, what the assistant said, one a turn; else empty.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    system: str = ""
    answers: tuple[str, ...] = ()
