"""The mesh and the one table of how arrays are laid out on it."""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ppow_jax.console import log
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.settings import MeshSettings

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
    (r"norm(s_\d+)?/scale$", PartitionSpec()),
    (r"(^|/)(count|step|scores|scored_at)$", PartitionSpec()),
)


def make_mesh(settings: MeshSettings) -> Mesh:
    """A mesh with the axes data, fsdp and tensor over all devices.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    shape = [settings.data, settings.fsdp, settings.tensor]
    devices = jax.device_count()
    if shape.count(-1) == 1:
        known = -int(np.prod(shape))
        shape[shape.index(-1)] = devices // known if known > 0 else 0
    if any(n < 1 for n in shape) or int(np.prod(shape)) != devices:
        found = (settings.data, settings.fsdp, settings.tensor)
        raise ConfigError(
            f"config.mesh: found (data, fsdp, tensor) = {found}, expected a product of {devices} "
            "(the devices found), at most one axis -1"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3)


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
    return jax.device_put(tree, shardings(tree, mesh))


def hold(tree: Any, mesh: Mesh | None) -> Any:
    """Inside jit: keeps a tree laid out by the table, whatever the compiler likes. No mesh, no change."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Rows split over data and fsdp if they divide evenly, else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH) if rows % batch_ways(mesh) == 0 else PartitionSpec())


def shard_batch(tree: Any, mesh: Mesh) -> Any:
    """Puts host arrays `[B, ...]` on the mesh, split by rows."""
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.shape[0])), tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
