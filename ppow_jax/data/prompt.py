"""What a user asks: the prompt of one conversation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """The user's side of one conversation.

    Attributes:
      id: unique within a run.
      category: by which reports may group; may be empty.
      turns: the user's messages, one or more.
    """

    id: str
    category: str
    turns: tuple[str, ...]
