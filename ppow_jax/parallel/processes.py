"""Several processes of one run: all compute together, the first one writes.

Every process runs the same program over the same global arrays; a file is written by the first and read by
all, so the workdir lies on storage that all of them see.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def together(what: str) -> None:
    """Returns when all processes have come here: what the first one wrote can be read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def anywhere(found: bool) -> bool:
    """Whether it is so on any process; all ask, and get the same answer."""
    if jax.process_count() == 1:
        return found
    return bool(multihost_utils.process_allgather(np.int32(found)).any())


def agreed(value: Any) -> Any:
    """The first process's value (of JSON), on all: what was measured differs, and must not."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(text))] = text[:length]
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode())


def host(tree: Any) -> Any:
    """All of every array, as NumPy arrays on every process, wherever its parts lie."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)
