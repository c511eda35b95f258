"""What a user asks: the prompt of one conversation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """The user's side of one conversation.

    Attributes:
      id: unique within a run.
      category: by which reports may group; may be empty.
      turns: the user's messages, one or more.
      system: the system message; empty: none.
      answers: what an assistant said in the data, one answer a turn, or none at all.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    system: str = ""
    answers: tuple[str, ...] = ()
