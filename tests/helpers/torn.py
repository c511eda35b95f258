"""Run by test_processes, twice at once: two processes save two steps together, of the newer one what the
second process wrote is cut, and both read."""

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppow_jax.parallel import console, processes
from ppow_jax.parallel.checkpoint import Checkpoints


def main(directory: pathlib.Path) -> None:
    """Prints the step that was read."""
    jax.distributed.initialize()
    console.setup()
    layout = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    store = Checkpoints(directory, 2)
    for step in (1, 2):
        store.save(step, {"x": of(step, layout)}, None, {"step": step})
        store.require(step)
    store.close()
    if processes.first():
        cut = [p for p in (directory / "2" / "state" / "ocdbt.process_1").rglob("*") if p.is_file()]
        assert cut
        for file in cut:
            file.write_bytes(file.read_bytes()[:100])
    processes.together("cut")
    store = Checkpoints(directory, 2)
    x = of(0, layout)
    step, state, about = store.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)})
    store.close()
    want = np.asarray(of(step, layout).addressable_shards[0].data)
    np.testing.assert_array_equal(np.asarray(state["x"].addressable_shards[0].data), want)
    print(step, about["step"])


def of(step: int, layout: NamedSharding) -> jax.Array:
    """Noise, which nothing compresses, half of it on each process."""
    values = np.random.default_rng(step).normal(size=2**16).astype(np.float32)
    return jax.make_array_from_callback(values.shape, layout, lambda index: values[index])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
