"""What the machine does at best, and the operations that the models need."""

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from ppow_jax import settings
from ppow_jax.decode import cost
from ppow_jax.experiment import Experiment
from ppow_jax.models.drafter import Drafter, DrafterWeights, weights_of
from ppow_jax.rollout import drafted_as_one
from ppow_jax.stages import training
from ppow_jax.verification import runs_target


class Machine:
    """What this machine does at best: float32 operations and bytes a second."""

    def __init__(self) -> None:
        long, total = jnp.ones(2**27), jax.jit(jnp.sum)
        self.operations = self.matrix_rate()
        self.bytes = long.nbytes / cost.median_seconds(lambda: total(long), 7)

    def matrix_rate(self) -> float:
        """Operations a second of a large matrix product, at this moment."""
        square, product = jnp.ones((2048, 2048)), jax.jit(lambda a: a @ a)
        return 2 * 2048**3 / cost.median_seconds(lambda: product(square), 25)

    def floor(self, operations: float, bytes_: float) -> float:
        """Seconds that an amount of work takes at least."""
        return max(operations / self.operations, bytes_ / self.bytes)


class Work:
    """Matrix-product weights of the models, and the operations that follow from them."""

    def __init__(self, run: Experiment) -> None:
        c, d = run.target.config, training.shape_of_drafter(run)
        attention = lambda i, m: m.heads * m.head_size * (i + m.width) + 2 * m.kv_heads * m.head_size * i  # noqa: E731
        self.layers = c.layers * (attention(c.width, c) + 3 * c.width * c.mlp_hidden)
        self.head = c.width * c.vocab_size
        self.step = attention(2 * d.width, d) + 3 * d.width * d.mlp_hidden + d.width * d.vocab_size
        self.fuse = d.taps_width * d.width + 4 * d.kv_heads * d.head_size * d.width

        self.attention = 4.0 * c.layers * c.heads * c.head_size  # a token and a position that it sees

    def writing(self, length_B: np.ndarray, count_B: np.ndarray) -> float:
        """Operations of texts after prompts: every token but the last is read, and attends, once."""
        read_B = length_B + count_B - 1.0
        seen = (read_B * (read_B + 1) / 2).sum()
        return 2.0 * (read_B.sum() * self.layers + count_B.sum() * self.head) + seen * self.attention

    def target(self, tokens: int) -> tuple[float, float]:
        """(operations, bytes) of a target pass over `tokens` tokens with logits; attention aside."""
        weights = self.layers + self.head
        return 2.0 * tokens * weights, 4.0 * weights

    def ppow(self, s: settings.PPOWSettings, length: int, refused: float) -> dict[str, float]:
        """Operations of the phases of a PPOW step; `refused`: the share of windows with k = 0."""
        windows = s.batch_size * s.anchors * (1 if drafted_as_one(s) else s.group)
        text = s.batch_size * length
        drafted = 2.0 * (windows * s.window * self.step + text * self.fuse)
        judged = (s.window - 1) * self.layers + s.window * self.head
        read = 2.0 * (text * self.layers + refused * windows * judged)
        return {
            "rollout": drafted,
            "verification": read if runs_target(s) else 0.0,
            "update": 3.0 * s.updates * drafted,
        }


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def fresh_drafter(run: Experiment) -> tuple[Drafter, DrafterWeights, training.State]:
    """A fresh drafter: costs do not depend on what it has learnt."""
    optimizer = training.make_optimizer(run.settings.ppow.optimizer, run.settings.ppow.steps)
    vocab = np.arange(run.settings.drafter.vocab_size, dtype=np.int32)
    state = training.fresh_state(run, optimizer, vocab)
    weights = weights_of(state["params"], run.target_params, state["vocab"])
    return training.drafter_of(run), weights, state
