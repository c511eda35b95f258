"""The mesh and the one table of how arrays are laid out on it.

Models ask for the mesh in use (`jax.set_mesh`, which `experiment.run` calls): what they compute keeps its
rows where the batch has them. Without one they run on one device.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel.console import log

AXES = ("data", "fsdp", "tensor")
# fsdp first: with data first, XLA's partitioner (jax 0.10.2) gets values and gradients wrong, in silence,
# where all three axes are longer than 1.
BATCH = ("fsdp", "data")

# Parameter path -> layout, for target, drafter and (their paths end alike) optimiser moments.
# The first match wins; a leaf that nothing matches is an error.
TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(embedding/embedding)$", PartitionSpec("tensor", "fsdp")),
    (r"(query|key|value|gate|up|fuse|head)/weight$", PartitionSpec("tensor", "fsdp")),
    (r"(query|key|value)/bias$", PartitionSpec("tensor")),
    (r"(out|down)/weight$", PartitionSpec("fsdp", "tensor")),
    (r"norm(s_\d+)?/scale$|out/bias$", PartitionSpec()),
    (r"(^|/)(count|step|scores|scored_at)$", PartitionSpec()),
)


def make_mesh(shape: tuple[int, int, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices, or those given.

    Args:
      shape: of the axes; one of them may be -1: whatever is left.
      devices: None: all that JAX finds.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    sizes = list(shape)
    count = len(devices) if devices else jax.device_count()
    if sizes.count(-1) == 1:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = count // known if known > 0 else 0
    if any(n < 1 for n in sizes) or int(np.prod(sizes)) != count:
        raise ConfigError(
            f"config.mesh: found (data, fsdp, tensor) = {shape}, expected a product of {count} "
            "(the devices found), at most one axis -1"
        )
    return Mesh(_placed(sizes, devices or jax.devices()), AXES, axis_types=(AxisType.Auto,) * 3)


def _placed(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices `[data, fsdp, tensor]`. Where they are of several slices of TPUs, or nodes of GPUs, only `data`
    goes from one to the next, if it divides; `jax.make_mesh` refuses such a mesh."""
    slices, (data, *within) = len({getattr(d, "slice_index", 0) for d in devices}), shape
    how = {"allow_split_physical_axes": True}  # as fsdp=4 with tensor=2 on 4x4 chips do
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, **how)
    if data % slices == 0:
        inside, across = (data // slices, *within), (slices, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(inside, across, devices, **how)
    log.warning(
        "config.mesh.data: %d is not a multiple of the %d slices or nodes found: fsdp or tensor goes from "
        "one to another, which is slow",
        data,
        slices,
    )
    return np.array(sorted(devices, key=lambda d: (d.slice_index, d.id))).reshape(shape)


def path_name(path: tuple) -> str:
    """A tree path as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The layout of one leaf; an axis that does not divide its dimension is left out.

    Raises:
      UserError: no row of the table matches.
    """
    layout = next((layout for pattern, layout in TABLE if re.search(pattern, path)), None)
    if layout is None:
        raise UserError(f"partition.TABLE has no row for {path!r} {shape}; add one")
    axes = []
    for size, axis in zip(shape, layout, strict=False):
        fits = axis is None or size % mesh.shape[axis] == 0
        if not fits:
            log.warning("%s: %d is not divisible over %r: replicated", path, size, axis)
        axes.append(axis if fits else None)
    return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of arrays (or shapes) by the table."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh)), tree
    )


def laid_out(tree: Any, mesh: Mesh) -> Any:
    """Shapes and dtypes with their places by the table, for what restores straight to them."""
    place = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)  # noqa: E731
    return jax.tree.map(place, tree, shardings(tree, mesh))


def shard(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree of (host or device) arrays on the mesh by the table."""
    return jax.tree.map(put, tree, shardings(tree, mesh))


def put(x: Any, layout: NamedSharding) -> jax.Array:
    """An array where it belongs. All processes have the whole of it, and each puts its own parts."""
    if isinstance(x, jax.Array):
        return jax.device_put(x, layout) if layout.is_fully_addressable else _laid(layout)(x)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])


@functools.cache
def _laid(layout: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=layout)


def hold(tree: Any, mesh: Mesh | None) -> Any:
    """Inside jit: keeps a tree laid out by the table, whatever the compiler likes. No mesh, no change."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _divides(mesh: Mesh | AbstractMesh, rows: int) -> bool:
    """Whether rows divide evenly over data and fsdp."""
    return rows % batch_ways(mesh) == 0


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows split over data and fsdp if they divide evenly, else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH) if _divides(mesh, rows) else PartitionSpec())


def platform() -> str:
    """What is compiled for: the devices of the mesh in use, or JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def suited(choices: Mapping[str, int]) -> int:
    """The number for the platform that is compiled for, or the one under "default"."""
    return choices.get(platform(), choices["default"])


def share(rows: int, heads: int = 1) -> int:
    """How many of `rows` times `heads` (or of anything that lies along `tensor`) a device of the mesh in use
    holds."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return rows * heads
    tensor = mesh.shape["tensor"]
    mine = rows // batch_ways(mesh) if _divides(mesh, rows) else rows
    return mine * (heads // tensor if heads % tensor == 0 else heads)


def keep_rows(tree: Any) -> Any:
    """Inside jit: keeps rows `[B, ...]` where the batch has them, on the mesh in use.

    Left alone XLA lays hidden states out like the weights that they meet, and every device computes all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree

    def keep(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH)) if _divides(mesh, len(x)) else x

    return jax.tree.map(keep, tree)


def keep_heads(x_BxWxKxHxE: jax.Array) -> jax.Array:
    """Inside jit: keeps heads whole, split over `tensor` if they divide; else every device has them all."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x_BxWxKxHxE
    B, _, _, heads, _ = x_BxWxKxHxE.shape
    divides = heads % mesh.shape["tensor"] == 0
    if not divides:
        _warn(f"{heads} heads are not divisible over 'tensor' ({mesh.shape['tensor']}): replicated")
    rows = BATCH if _divides(mesh, B) else None
    layout = PartitionSpec(rows, None, None, "tensor" if divides else None)
    return jax.lax.with_sharding_constraint(x_BxWxKxHxE, layout)


@functools.cache
def _warn(message: str) -> None:
    """Once."""
    log.warning("%s", message)


def at_hand(matrix_OxI: jax.Array) -> jax.Array:
    """Inside jit: a matrix that a loop reads in every round, gathered before it but for the axis `tensor`.

    Its gradient is not gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(matrix_OxI) % mesh.shape["tensor"]:
        return matrix_OxI
    return _gathered(matrix_OxI)


@jax.custom_vjp
def _gathered(matrix_OxI: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(matrix_OxI, PartitionSpec("tensor", None))


_gathered.defvjp(lambda matrix: (_gathered(matrix), None), lambda _, given: (given,))


def in_turn(params: Any, turn: jax.Array) -> Any:
    """Inside the loop of which this is a turn (a scalar): parameters to be gathered in it, for it alone.

    A compiler for TPUs otherwise gathers all layers of a large target before the loop, and keeps them.
    """
    return jax.lax.optimization_barrier((params, turn))[0]


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Puts host arrays `[B, ...]` on the mesh, split by rows."""
    return jax.tree.map(lambda x: put(x, batch_sharding(mesh, x.shape[0])), tree)


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """int `[...]`, ascending: the rows of a batch that devices of this process hold."""
    places = batch_sharding(mesh, rows).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in places.values()]))


def assemble(tree: Any, mesh: Mesh, rows: int) -> Any:
    """A batch of `rows` rows on the mesh, of which each process gives those of `rows_here`."""
    here = rows_here(mesh, rows)
    if not _divides(mesh, rows):
        _warn(f"a batch of {rows} rows is not divisible over {batch_ways(mesh)} devices: each has all of it")

    def one(x: np.ndarray) -> jax.Array:
        part = lambda index: x[np.searchsorted(here, np.arange(rows)[index[0]])][:, *index[1:]]  # noqa: E731
        return jax.make_array_from_callback((rows, *x.shape[1:]), batch_sharding(mesh, rows), part)

    return jax.tree.map(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
