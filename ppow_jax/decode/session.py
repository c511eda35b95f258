"""Prompts as lists of token ids, decoded one after another without compiling anew.

Shape letters: B rows, P padded prompt length.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ppow_jax.decode.drafting import Drafting
from ppow_jax.decode.loop import DecodeConfig, Decoded, decode
from ppow_jax.decode.watching import Watch
from ppow_jax.errors import UserError
from ppow_jax.models.target import Target

_SHORTEST = 64


def bucket(length: int) -> int:
    """The length that a prompt is padded to: 64, 96, 128, 192, 256 and so on, at most half as much again."""
    power = _SHORTEST
    while power < length:
        power *= 2
    return power // 4 * 3 if power > _SHORTEST and length <= power // 4 * 3 else power


@dataclasses.dataclass(frozen=True)
class Session:
    """A target, perhaps with a drafter, that decodes prompts.

    The whole loop is compiled once for every bucket of prompt lengths and every number of prompts.

    Attributes:
      target, params, config, drafting, weights: as in `loop.decode`.
    """

    target: Target
    params: dict
    config: DecodeConfig
    drafting: Drafting | None = None
    weights: Any = None

    def __call__(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        keys_B: jax.Array | None = None,
        watch: Watch | None = None,
        scores: bool = False,
    ) -> Decoded[jax.Array]:
        """Decodes prompts side by side.

        Args:
          prompts: token ids.
          keys_B: random keys, one a prompt; needed above temperature 0 only.
          watch, scores: as in `loop.decode`.

        Raises:
          UserError: no prompt, an empty one, one that leaves no room in the target's context, or an id that
            the target does not have.
        """
        prompt_BxP, length_B = self.pad(prompts)
        if keys_B is None:
            keys_B = jax.random.split(jax.random.key(0), len(prompts))
        inputs = (self.target, self.params, prompt_BxP, length_B, keys_B, self.config)
        return decode(*inputs, self.drafting, self.weights, watch, scores)

    def pad(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """int32 `[B, P]`, P the bucket of the longest, and lengths `[B]`; errors as in `__call__`."""
        c = self.target.config
        if not prompts:
            raise UserError("found no prompt to decode, expected at least one")
        for number, ids in enumerate(prompts):
            if not 1 <= len(ids) < c.context:
                raise UserError(
                    f"prompt {number}: found {len(ids)} tokens, expected 1 to {c.context - 1} "
                    f"(the target's context is {c.context})"
                )
            wrong = next((i for i in ids if not 0 <= i < c.vocab_size), None)
            if wrong is not None:
                raise UserError(
                    f"prompt {number}: found token id {wrong}, expected 0 to {c.vocab_size - 1}; "
                    "was another model's tokenizer used?"
                )
        length_B = np.array([len(ids) for ids in prompts], np.int32)
        prompt_BxP = np.zeros((len(prompts), min(bucket(int(length_B.max())), c.context)), np.int32)
        for row, ids in zip(prompt_BxP, prompts, strict=True):
            row[: len(ids)] = ids
        return prompt_BxP, length_B
