"""A question with its answer, and what its figures are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ppow_jax.api import Answer


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question with its answer.

    Attributes:
      question: what the user said.
      answer: what the target wrote, with a drafter.
      texts: the answer's rounds as text, see `report.samples.as_text`.
      plain: the answer without a drafter; None: not decoded.
      drafts: the shape of the drafts and whose they are.
      greedy: whether both answers are of temperature 0.
    """

    question: str
    answer: Answer
    texts: Sequence[dict[str, Any]]
    plain: Answer | None
    drafts: str
    greedy: bool

    def figures(self) -> list[str]:
        """Speed, tau, accepted tokens by round and the draft's shape, each as text."""
        passes = self.answer.rounds[1:]
        if not passes:
            return ["a single token, which the pass over the prompt wrote"]
        speed = f"{self.answer.tokens_per_s:.1f} tokens/s"
        if self.plain:
            ratio = self.answer.tokens_per_s / self.plain.tokens_per_s
            speed += f", plain decoding {self.plain.tokens_per_s:.1f} ({ratio:.2f}x"
            if self.greedy:
                speed += ", the same text" if self.plain.ids == self.answer.ids else ", another text"
            speed += ")"
        tau = f"tau {self.answer.tau:.2f} ({len(self.answer.ids) - 1} tokens in {len(passes)} passes)"
        accepted = " ".join(str(r.accepted) for r in passes) or "none"
        return [speed, tau, f"accepted by round: {accepted}", self.drafts]
