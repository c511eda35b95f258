"""What the machine does at best, and the operations that the models need."""

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from ppow_jax.decode import cost
from ppow_jax.experiment import Experiment
from ppow_jax.models.target import TargetConfig
from ppow_jax.parallel import partition
from ppow_jax.training import drafters
from ppow_jax.training.drafters import Trained


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
    """Weights of a target's matrices, and the operations that follow from them."""

    def __init__(self, c: TargetConfig) -> None:
        attention = c.heads * c.head_size * 2 * c.width + 2 * c.kv_heads * c.head_size * c.width
        self.layers = c.layers * (attention + 3 * c.width * c.mlp_hidden)
        self.head = c.width * c.vocab_size
        self.attention = 4.0 * c.layers * c.heads * c.head_size  # a token and a position that it sees

    def writing(self, length_B: np.ndarray, count_B: np.ndarray) -> float:
        """Operations of texts after prompts: every token but the last is read, and attends, once."""
        read_B = length_B + count_B - 1.0
        pairs = (read_B * (read_B + 1) / 2).sum()
        return 2.0 * (read_B.sum() * self.layers + count_B.sum() * self.head) + pairs * self.attention

    def target(self, tokens: int) -> tuple[float, float]:
        """(operations, bytes) of a target pass over `tokens` tokens with logits; attention aside."""
        weights = self.layers + self.head
        return 2.0 * tokens * weights, 4.0 * weights


def step_weights(params: dict) -> int:
    """Weights of the matrices that a drafter's step reads: all but the one for the target's features."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = {partition.path_name(path): leaf.size for path, leaf in leaves}
    return sum(n for name, n in sizes.items() if name.endswith("/weight") and not name.startswith("fuse/"))


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def fresh_drafter(experiment: Experiment) -> Trained:
    """A drafter as the settings describe it, not trained: costs do not depend on what it has learnt."""
    vocab = np.arange(experiment.settings.drafter.vocab_size, dtype=np.int32)
    return drafters.fresh(experiment, vocab, None)
