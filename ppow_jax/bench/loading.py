"""What reading a target costs."""

import pathlib
import threading
import time

import jax

from ppow_jax.bench.machine import show
from ppow_jax.errors import UserError
from ppow_jax.parallel import partition
from ppow_jax.settings import Settings
from ppow_jax.targets.load import load as load_target

_STATUS = pathlib.Path("/proc/self/status")
_EVERY = 0.002  # seconds


def load(chosen: Settings) -> None:
    """Reads a target and prints time and memory.

    Memory is what the process has of its own (`RssAnon`); pages of the files, which the system drops when it
    likes, are not counted.
    """
    if not _STATUS.exists():
        raise UserError("load: found no /proc/self/status, expected Linux, which tells a process its memory")
    mesh = partition.make_mesh(chosen.mesh.shape)
    jax.block_until_ready(jax.device_put(0))  # what the runtime itself takes
    before, began = _own_bytes(), time.perf_counter()
    with _Peak() as peak:
        _, params, _ = load_target(chosen.target, mesh)
        params = jax.block_until_ready(partition.shard(params, mesh))
    seconds = time.perf_counter() - began
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    beyond = peak.bytes - before - sum(sizes)
    cells = (sum(sizes) / 1e6, max(sizes) / 1e6, beyond / 1e6)
    row = [*(f"{c:,.0f}" for c in cells), f"{beyond / max(sizes):.2f}", f"{seconds:.1f}"]
    columns = ["arrays (MB)", "largest (MB)", "peak beyond arrays (MB)", "of the largest", "seconds"]
    show(chosen.target.path, columns, [row])


def _own_bytes() -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class _Peak:
    """The most memory that the process has while it lasts, in `bytes`."""

    def __enter__(self) -> "_Peak":
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self.bytes = max(self.bytes, _own_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, _own_bytes())
