"""Shapes of drafts: fixed trees, of which a chain is the narrowest, and trees that the drafter shapes."""

import dataclasses
import functools
import re
from collections.abc import Iterable

from ppow_jax.errors import ConfigError

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A tree of which only the tokens change: by level, nodes as paths of ranks from the root.

    Rank r is the drafter's r-th likeliest token after its parent, from 0. Where drafts are sampled, children
    are drawn in the order of their ranks. Build one with `chain`, `group` or `tree_of`.

    Attributes:
      paths: all nodes but the root, by level; the parents of all of them are there.
    """

    paths: tuple[Path, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the target verifies, the last known one included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Drafted tokens that can be accepted at most."""
        return len(self.paths[-1])

    @property
    def ranks(self) -> int:
        """Of how many likeliest tokens the drafter must be asked for at most."""
        return 1 + max(max(path) for path in self.paths)

    @functools.cached_property
    def parents(self) -> tuple[int, ...]:
        """Of every node, node 0 (the root, its own) included."""
        numbers = {path: i + 1 for i, path in enumerate(self.paths)} | {(): 0}
        return (0, *(numbers[path[:-1]] for path in self.paths))

    @functools.cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The nodes below every node, by rank; filled up with -1 to the most that one has."""
        below = [[n for n in range(1, self.tokens) if self.parents[n] == node] for node in range(self.tokens)]
        most = max(map(len, below))
        return tuple((*nodes, *[-1] * (most - len(nodes))) for nodes in below)

    @property
    def straight(self) -> bool:
        """Whether it is a chain."""
        return self.tokens == self.depth + 1

    def level(self, depth: int) -> list[int]:
        """The nodes of a level; the root is level 0."""
        return [i for i, path in enumerate(((), *self.paths)) if len(path) == depth]


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Dynamic draft trees (EAGLE-2: Li et al. 2024, arXiv 2406.16858).

    On each of `depth` levels the `top_k` nodes of largest cumulative log-probability are continued with their
    `top_k` likeliest tokens; of all nodes the best are verified.

    Attributes:
      tokens: that the target verifies at most, the last known one included.
      depth: levels.
      top_k: nodes that are continued, and continuations of each.
    """

    tokens: int
    depth: int
    top_k: int

    def __post_init__(self) -> None:
        nodes = beam_nodes(self.depth, self.top_k)
        if min(self.depth, self.top_k) < 1 or not 2 <= self.tokens <= nodes:
            raise ConfigError(
                f"found a tree of {self.tokens} tokens, expected 2 to {nodes}, all that "
                f"{self.depth} levels of top_k {self.top_k} have"
            )

    @property
    def ranks(self) -> int:
        """See `Fixed`."""
        return self.top_k

    @property
    def straight(self) -> bool:
        """Whether it is the chain of all levels; with several candidates even so few tokens may branch."""
        return self.top_k == 1 and self.tokens == self.depth + 1


def beam_nodes(depth: int, top_k: int) -> int:
    """All that a dynamic tree can pick from: the root, `top_k` nodes, then `top_k ** 2` a level."""
    return 1 + top_k + (depth - 1) * top_k**2


Shape = Fixed | Dynamic


def tree_of(paths: Iterable[Iterable[int]]) -> Fixed:
    """The tree of the given paths, each a list of ranks from the root; what lies on the way is added.

    Raises:
      ConfigError: there is none, or a rank is negative.
    """
    wanted = {tuple(path) for path in paths}
    if not wanted - {()} or any(rank < 0 for path in wanted for rank in path):
        raise ConfigError(f"found the paths {sorted(wanted)}, expected lists of ranks from 0 on")
    every = {path[:n] for path in wanted for n in range(1, len(path) + 1)}
    return Fixed(tuple(sorted(every, key=lambda path: (len(path), path))))


def group(size: int, window: int) -> Fixed:
    """`size` windows of `window` tokens that part at their first one: the paper's candidate group."""
    return tree_of((first, *[0] * (window - 1)) for first in range(size))


def chain(window: int) -> Fixed:
    """One window: the tree of width 1."""
    return group(1, window)


def parse(text: str, where: str = "shape of drafts") -> Shape:
    """A shape from its name: `chain:K`, `group:GxK`, `tree:TOKENSxDEPTHxTOPK` or `paths:0-0-1,0-1,2`.

    Raises:
      ConfigError: it is none of these, or there is no such tree; `where` says what is to blame.
    """
    try:
        return _parse(text)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None


def _parse(text: str) -> Shape:
    kind, _, sizes = text.partition(":")
    numbers = [int(n) for n in sizes.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else []
    if (kind, len(numbers)) == ("chain", 1):
        return chain(*numbers)
    if (kind, len(numbers)) == ("group", 2):
        return group(*numbers)
    if (kind, len(numbers)) == ("tree", 3):
        return Dynamic(*numbers)
    if kind == "paths" and re.fullmatch(r"\d+(-\d+)*(,\d+(-\d+)*)*", sizes):
        return tree_of(map(int, path.split("-")) for path in sizes.split(","))
    raise ConfigError(
        f"found {text!r}, expected chain:K, group:GxK, tree:TOKENSxDEPTHxTOPK or paths: and ranks from the "
        "root, as in paths:0-0-1,0-1,2"
    )


def name(shape: Shape) -> str:
    """What `parse` takes."""
    if isinstance(shape, Dynamic):
        return f"tree:{shape.tokens}x{shape.depth}x{shape.top_k}"
    size, window = len(shape.level(1)), shape.depth
    if shape == group(size, window):
        return f"chain:{window}" if size == 1 else f"group:{size}x{window}"
    return "paths:" + ",".join("-".join(map(str, path)) for path in shape.paths)
