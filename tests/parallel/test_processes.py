"""The real command on one device, on meshes of eight and in two processes: the same run.

The target is the Markov chain, whose texts are greedy here.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import quick
import runs
import torn

from ppow_jax.data.records import Records
from ppow_jax.parallel import preemption, processes
from ppow_jax.training import metrics

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12
FLAGS = {
    "stages": "('respond','train')",
    "respond.prompts": "chat=builtin:chat/train[:32]",
    "respond.batch_size": 16,
    "respond.temperature": 0.0,
    "respond.max_new_tokens": 16,
    "data.length": 64,
    "data.holdout": 0,
    "train.supervise.steps": STEPS,
    "train.supervise.batch_size": 8,
    "train.ppow.steps": STEPS,
    "train.ppow.temperature": 0.0,
    "train.ppow.anchor_rule.warmup_steps": 2,
    "train.ppow.anchor_rule.rescore_every": 3,
    "train.ppow.optimizer.learning_rate": 1e-3,
    "log.checkpoint_every_steps": 5,
}
TO_THE_END = {
    "stages": "('respond','train','evaluate','export')",
    "evaluate__prompts": "maths=builtin:maths/eval[:4]",
    "evaluate__max_new_tokens": 16,
    "evaluate__batch_size": 8,
    "evaluate__decode_prompts": 1,
}
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]


def start(
    workdir: pathlib.Path,
    cache: pathlib.Path,
    mesh: tuple[int, int, int] = (1, 1, 1),
    devices: int = 1,
    environment: dict[str, str] | None = None,
    **changes: object,
) -> subprocess.Popen:
    """The command, with so many simulated devices in this process."""
    flags = FLAGS | dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    flags |= {key.replace("__", "."): value for key, value in changes.items()}
    command = [sys.executable, "-m", "ppow_jax.main", "--config=configs/tiny.py", f"--workdir={workdir}"]
    about = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"{quick.FLAGS} --xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        command + [f"--config.{key}={value}" for key, value in flags.items()],
        cwd=ROOT,
        env=os.environ | about | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(*started: subprocess.Popen, status: int = 0) -> str:
    """Waits; all that was said."""
    said = [process.communicate(timeout=900)[1] for process in started]
    assert [p.returncode for p in started] == [status] * len(started), "\n".join(s[-3000:] for s in said)
    return "\n".join(said)


def neighbours() -> list[dict[str, str]]:
    """The environments of two processes, as SLURM would start them on one host."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    shared = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    }
    return [shared | {"SLURM_PROCID": n, "SLURM_LOCALID": n} for n in ("0", "1")]


def two(workdir: pathlib.Path, cache: pathlib.Path, mesh: tuple[int, int, int], **changes) -> list:
    """Two processes with four devices each."""
    return [start(workdir, cache, mesh, 4, about, distributed=True, **changes) for about in neighbours()]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(places) -> pathlib.Path:
    """A run on one device."""
    end(start(places / "alone", places / "cache", **TO_THE_END))
    return places / "alone"


def same(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Responses, features, and the losses of every step."""
    assert runs.digest(workdir / "responses") == runs.digest(other / "responses")
    mine, theirs = (Records(where / "features") for where in (workdir, other))
    for one, two_ in zip(mine, theirs, strict=True):
        for key in one:
            np.testing.assert_allclose(
                one[key].astype(np.float32), two_[key].astype(np.float32), atol=2e-3, err_msg=key
            )
    for stage in ("supervise", "cst", "ppow"):
        rows, others = ([r for r in metrics.read(w) if r["stage"] == stage] for w in (workdir, other))
        assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
        for row, want in zip(rows, others, strict=True):
            assert row["loss"] == pytest.approx(want["loss"], rel=1e-5, abs=1e-5), (stage, row["step"])


def same_report(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Acceptance, and what was decoded."""
    results = [json.loads((w / "report.json").read_text())["drafters"] for w in (workdir, other)]
    assert results[0].keys() == {"supervise", "cst", "ppow"}
    for stage, drafter in results[0].items():
        result, want = drafter["benchmarks"]["maths"], results[1][stage]["benchmarks"]["maths"]
        for key in ("tau", "rounds", "tokens", "identical_outputs"):
            assert result[key] == want[key], (stage, key)
        assert result["identical_outputs"] == 1


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_in_every_shape(alone, places, mesh):
    workdir = places / "x".join(map(str, mesh))
    end(start(workdir, places / "cache", mesh, 8))
    same(alone, workdir)


def test_two_processes(alone, places):
    """All axes; the second process says and writes nothing."""
    workdir = places / "two"
    first, second = two(workdir, places / "cache", (2, 2, 2), **TO_THE_END)
    said = [process.communicate(timeout=900) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    same(alone, workdir)
    same_report(alone, workdir)
    assert "stage train/supervise" in said[0][1] and "stage train/supervise" not in said[1][1]


def test_a_checkpoint_of_one_mesh_goes_on_on_another(alone, places):
    """Begun on eight devices, gone on with by two processes, ended on one device."""
    workdir, cache = places / "moved", places / "cache"
    begun = start(workdir, cache, (2, 4, 1), 8)
    stop_after(begun, workdir, "supervise", 6)
    end(begun, status=preemption.STATUS)
    both = two(workdir, cache, (2, 2, 2))
    stop_after(both[1], workdir, "ppow", 4)
    end(*both, status=preemption.STATUS)
    end(start(workdir, cache))
    same(alone, workdir)


def stop_after(process: subprocess.Popen, workdir: pathlib.Path, stage: str, step: int) -> None:
    """SIGTERM once a stage has come so far."""
    while process.poll() is None:
        if any(r["stage"] == stage and r["step"] >= step for r in metrics.read(workdir)):
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.02)


def test_a_step_of_which_one_process_cannot_read_its_part_is_left_by_both(tmp_path):
    """The first would find nothing wrong with it."""
    command = [sys.executable, torn.__file__, str(tmp_path / "checkpoints")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environments = (os.environ | {"JAX_PLATFORMS": "cpu"} | about for about in neighbours())
    both = [subprocess.Popen(command, env=environment, **pipes) for environment in environments]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [out.splitlines()[-1] for out, _ in said] == ["1 1", "1 1"]
    assert "step 2 cannot be read (another process says why)" in said[0][1]
    assert "step 2 cannot be read (OUT_OF_RANGE" in said[1][1]
    assert (tmp_path / "checkpoints" / "damaged-2").is_dir()


def test_one_process_agrees_with_itself():
    assert processes.agreed({"gamma": 0.12}) == {"gamma": 0.12}
