"""TPU slices by name, and what their chips can do."""

import importlib.util
import os
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from ppow_jax.errors import UserError
from ppow_jax.parallel import partition


class Chip(NamedTuple):
    """One chip, as its vendor describes it (cloud.google.com/tpu/docs, "TPU versions").

    Attributes:
      memory: bytes of HBM.
      peak: bfloat16 operations a second.
      clock: cycles a second: the peak over what its matrix units do in a cycle.
      links: bytes a second that it sends to its neighbours, all links together.
    """

    memory: float
    peak: float
    clock: float
    links: float


_GB, _GIB = 1e9, 2.0**30
CHIPS = {
    "v4": Chip(32 * _GIB, 275e12, 1.05e9, 300 * _GB),
    "v5e": Chip(16 * _GIB, 197e12, 1.5e9, 200 * _GB),
    "v5p": Chip(95 * _GIB, 459e12, 1.75e9, 600 * _GB),
    "v6e": Chip(32 * _GIB, 918e12, 1.75e9, 448 * _GB),
}


def slice_mesh(topology: str, shape: tuple[int, int, int]) -> tuple[Chip, Mesh]:
    """The chip and the mesh of a slice such as `v5p:2x2x4`.

    Raises:
      UserError: no such slice, or libtpu, the compiler for TPUs, is not installed.
    """
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(
            f"--topology: found {topology!r}, expected KIND:SHAPE with KIND one of {', '.join(CHIPS)}, as in "
            "v5p:2x2x4 or v5e:4x4"
        )
    return CHIPS[kind], partition.make_mesh(shape, _devices(topology))


def _devices(topology: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the compiler for TPUs is not installed: `pip install 'ppow_jax[tpu]'` brings it; it needs no TPU"
        )
    # libtpu asks the machine about its TPUs, and waits long for an answer where there are none
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a device
    try:
        return list(np.ravel(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices))
    except Exception as e:  # whatever a plugin that does not know the slice raises
        raise UserError(f"--topology: {topology!r}: {str(e).splitlines()[0][:200]}") from e
