"""A question with its answer, and what its figures are."""

import dataclasses

from ppow_jax.api import Answer


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question with its answer.

    Attributes:
      question: what the user said.
      answer: what the target wrote, with a drafter.
      plain: the answer without a drafter; None: not decoded.
      drafts: the shape of the drafts and whose they are.
      greedy: whether both answers are of temperature 0.
    """

    question: str
    answer: Answer
    plain: Answer | None
    drafts: str
    greedy: bool

    def figures(self) -> list[str]:
        """Speed, tau, accepted tokens by round and the draft's shape, each as text."""
        speed, *rest = self.answer.figures()
        if not rest:
            return [speed]
        if self.plain:
            ratio = self.answer.tokens_per_s / self.plain.tokens_per_s
            speed += f", plain decoding {self.plain.tokens_per_s:.1f} ({ratio:.2f}x"
            if self.greedy:
                speed += ", the same text" if self.plain.ids == self.answer.ids else ", another text"
            speed += ")"
        return [speed, *rest, self.drafts]
