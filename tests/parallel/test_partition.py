"""The table of layouts, and steps on eight simulated devices against the same steps on one."""

import dataclasses
import logging
import os
import subprocess
import sys
import types

import golden_families
import jax
import numpy as np
import pytest
import sharded
import small
from jax.sharding import AbstractMesh, PartitionSpec

from ppow_jax.drafters import eagle3
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.models import target
from ppow_jax.parallel import partition
from ppow_jax.settings import OptimizerSettings
from ppow_jax.training.step import make_optimizer

MESH = AbstractMesh((2, 2, 2), partition.AXES)
TIED = dataclasses.replace(small.TINY, layers=6, tied_head=True)


def specs(tree) -> dict[str, PartitionSpec]:
    leaves = jax.tree_util.tree_leaves_with_path(partition.shardings(tree, MESH))
    return {partition.path_name(path): sharding.spec for path, sharding in leaves}


def drafter_shapes() -> dict:
    return eagle3.abstract_params(eagle3.drafter_config(small.TINY, 24, 40, "float32"))


@pytest.mark.parametrize("tree", ["target", "tied target", "drafter"])
def test_every_matrix_is_split_along_both_axes_and_every_scale_is_whole(tree):
    shapes = {
        "target": lambda: target.abstract_params(small.TINY),
        "tied target": lambda: target.abstract_params(TIED),
        "drafter": drafter_shapes,
    }[tree]()
    found = specs(shapes)
    assert len(found) == len(jax.tree.leaves(shapes))
    for path, shape in jax.tree_util.tree_leaves_with_path(shapes):
        layout = found[partition.path_name(path)]
        if shape.ndim == 1:
            assert layout == PartitionSpec(None) or layout == PartitionSpec(), path
        else:
            assert sorted(layout) == ["fsdp", "tensor"], path


def test_matrices_that_widen_are_split_by_output_and_those_that_narrow_by_input():
    """So that between the two a device keeps its share and only one sum over `tensor` is needed."""
    found = specs(target.abstract_params(small.TINY)) | specs(drafter_shapes())
    wide, narrow = PartitionSpec("tensor", "fsdp"), PartitionSpec("fsdp", "tensor")
    for prefix in ("layers_1/", ""):  # a layer of the target; the drafter's only one
        for name in ("attention/query", "attention/key", "attention/value", "mlp/gate", "mlp/up"):
            assert found[f"{prefix}{name}/weight"] == wide, prefix + name
        for name in ("attention/out", "mlp/down"):
            assert found[f"{prefix}{name}/weight"] == narrow, prefix + name
    assert found["head/weight"] == found["fuse/weight"] == wide
    assert found["embedding/embedding"] == wide  # whole rows would be gathered by every device


def test_moments_of_the_optimiser_lie_like_their_parameters():
    params = drafter_shapes()
    optimizer = make_optimizer(OptimizerSettings(1e-3, 2), 10)
    found, layouts = specs(jax.eval_shape(optimizer.init, params)), specs(params)
    moments = {name: layout for name, layout in found.items() if "/mu/" in name or "/nu/" in name}
    assert len(moments) == 2 * len(layouts)
    for name, layout in moments.items():
        assert layout == next(v for k, v in layouts.items() if name.endswith("/" + k)), name
    assert {v for k, v in found.items() if k not in moments} == {PartitionSpec()}  # counters


def test_an_axis_that_does_not_divide_is_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        odd = partition.spec("head/weight", (25, 32), MESH)
    assert odd == PartitionSpec(None, "fsdp")
    assert "head/weight" in caplog.text
    assert "25" in caplog.text


def test_a_parameter_that_the_table_does_not_know_is_an_error():
    with pytest.raises(UserError, match="new_layer/bias"):
        partition.spec("new_layer/bias", (4,), MESH)


def test_rows_are_split_over_data_and_fsdp_if_they_divide():
    assert set(partition.batch_sharding(MESH, 8).spec[0]) == {"data", "fsdp"}
    assert partition.batch_sharding(MESH, 6).spec == PartitionSpec()


def test_the_mesh_takes_what_is_left_and_refuses_what_does_not_fit():
    devices = jax.device_count()
    assert dict(partition.make_mesh((1, -1, 1)).shape) == {
        "data": 1,
        "fsdp": devices,
        "tensor": 1,
    }
    for wrong in ((devices + 1, 1, 1), (-1, -1, 1), (-1, devices + 1, 1)):
        with pytest.raises(ConfigError, match=rf"config\.mesh.*product of {devices}"):
            partition.make_mesh(wrong)


def nodes(count: int, each: int) -> list[types.SimpleNamespace]:
    """GPUs of several nodes, in no order."""
    about = {"platform": "gpu", "device_kind": "H100"}
    found = [
        types.SimpleNamespace(**about, id=i, process_index=i // each, slice_index=i // each)
        for i in range(count * each)
    ]
    return found[1::2] + found[::2]


def test_of_several_nodes_data_alone_goes_from_one_to_the_next(caplog):
    def of(shape: tuple[int, int, int]) -> np.ndarray:
        placed = partition._placed(shape, nodes(2, 4))
        assert placed.shape == shape and len({d.id for d in placed.flat}) == 8
        return np.vectorize(lambda d: d.slice_index)(placed)

    with caplog.at_level(logging.WARNING):
        assert of((2, 2, 2)).tolist() == [[[0, 0]] * 2, [[1, 1]] * 2]
        assert of((8, 1, 1)).ravel().tolist() == [0] * 4 + [1] * 4
        assert not caplog.records
        assert of((1, 4, 2)).tolist() == [[[0, 0], [0, 0], [1, 1], [1, 1]]]
    assert "config.mesh.data: 1 is not a multiple of the 2 slices or nodes found" in caplog.text


def test_without_a_mesh_nothing_is_constrained():
    x = np.ones((2, 3, 4, 5, 6), np.float32)
    for keep in (partition.keep_rows, partition.keep_heads):
        assert keep(x) is x
    assert partition.at_hand(x) is x
    assert (partition.share(6), partition.share(6, 4), partition.platform()) == (6, 24, "cpu")


def test_shares_of_a_device_and_heads_that_do_not_divide(caplog):
    """On a mesh of 2 x 2 x 2: a quarter of the rows if these divide, half of the heads if they do."""

    def shares(x_8x1x1x6x2, y_6x1x1x3x2):
        assert (partition.share(8), partition.share(8, 6), partition.share(6, 3)) == (2, 6, 18)
        kept = [partition.keep_heads(x) for x in (x_8x1x1x6x2, y_6x1x1x3x2)]
        return partition.keep_rows(kept)

    with jax.sharding.use_abstract_mesh(MESH), caplog.at_level(logging.WARNING):
        traced = jax.make_jaxpr(shares)(np.ones((8, 1, 1, 6, 2)), np.ones((6, 1, 1, 3, 2)))
    rows = partition.BATCH
    assert [tuple(equation.params["sharding"].spec) for equation in traced.eqns] == [
        (rows, None, None, "tensor"),
        (None, None, None, None),
        (rows,),  # six rows over four places: left alone
    ]
    assert "3 heads are not divisible over 'tensor' (2): replicated" in caplog.text


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, np.ndarray]:
    """What `sharded` found on simulated devices."""
    path = tmp_path_factory.mktemp("sharded") / "steps.npz"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, sharded.__file__, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(path))


CASES = [
    ("data", "supervise"),
    ("all", "supervise"),
    ("all", "greedy"),
    ("all", "sampled"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "kind"), CASES)
def test_a_step_on_eight_devices_is_the_step_on_one(steps, mesh, kind):
    """Parameters, optimiser, loss, rewards, accepted counts; `all` is data 2 x fsdp 2 x tensor 2."""
    here, one = f"{mesh}/{kind}", f"one/{kind}"
    names = [k.removeprefix(here) for k in steps if k.startswith((here + "/params", here + "/opt_state"))]
    names = [n for n in names if not n.endswith("#before")]
    assert len(names) > 3 * 10
    for name in names:
        np.testing.assert_allclose(steps[here + name], steps[one + name], atol=1e-5, rtol=0, err_msg=name)
    moved = [n for n in names if n.startswith("/params")]
    assert all(np.abs(steps[here + n] - steps[here + n + "#before"]).max() > 1e-4 for n in moved)
    metrics = [k.removeprefix(here) for k in steps if k.startswith(here + "/metrics")]
    for name in metrics:
        np.testing.assert_allclose(steps[here + name], steps[one + name], atol=1e-5, err_msg=name)
    if kind != "supervise":
        assert 0.1 < steps[here + "/metrics/accepted"] < 2.5  # something is accepted, something refused


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "kind"), CASES)
def test_a_step_keeps_the_layout_of_the_table(steps, mesh, kind):
    assert steps[f"{mesh}/{kind}/strays"].tolist() == []
    matrices = 9  # of the drafter; with their moments, three times
    assert steps[f"{mesh}/{kind}/split"] == (3 * matrices if mesh == "all" else 0)


@pytest.mark.slow
def test_a_cache_lies_in_parts_by_rows_and_by_heads(steps):
    """After prefill, and after half of the rows have left."""
    (whole, share), (left, share_left) = steps["cache"]
    assert whole[:2].tolist() == [sharded.B, small.TINY.kv_heads]
    assert left.tolist() == [sharded.B // 2, whole[1], whole[2] + 4, whole[3]]
    assert (whole / share).tolist() == (left / share_left).tolist() == [4, 2, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("family", sharded.FAMILIES)
def test_a_directory_read_onto_eight_devices_is_the_familys_model(steps, family):
    """Every matrix and every bias of queries, keys and values lies in parts."""
    logits = steps[f"loaded/{family}/logits"][golden_families.POSITIONS]
    np.testing.assert_allclose(logits, golden_families.GOLDEN[family]["logits"], atol=1e-4)
    assert steps[f"loaded/{family}/strays"].tolist() == []
    parts = [n for n in golden_families.GOLDEN[family]["shapes"] if "norm" not in n]
    assert steps[f"loaded/{family}/split"] == len(parts)
