"""The restart with wishes about memory, and how much there is left."""

import os
import platform
import subprocess
import sys

import pytest

from ppow_jax.parallel import memory

TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1"
)


class Restarted(Exception):
    pass


@pytest.fixture
def execv(monkeypatch):
    def execv(path, argv):
        raise Restarted(path, argv, os.environ["GLIBC_TUNABLES"])

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("GLIBC_TUNABLES", "JAX_CPU_ENABLE_ASYNC_DISPATCH"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_the_same_command_is_started_again_once(monkeypatch, execv):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ppow_jax.main", "--workdir=w"])
    with pytest.raises(Restarted) as restarted:
        memory.restart_with_tunables()
    assert restarted.value.args == (sys.executable, sys.orig_argv, TUNABLES)
    assert os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] == "false"
    memory.restart_with_tunables()  # the variable is set now


@pytest.mark.parametrize(("platform", "tunables"), [("linux", ""), ("linux", "a=1"), ("darwin", None)])
def test_nothing_is_started_again_elsewhere_or_against_the_users_wish(monkeypatch, execv, platform, tunables):
    monkeypatch.setattr(sys, "platform", platform)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    memory.restart_with_tunables()
    assert os.environ.get("GLIBC_TUNABLES") == tunables


def test_what_is_freed_is_kept():
    """The pages of a buffer as large as one that was freed need not be mapped again."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the tunables are glibc's")
    script = """
import resource, numpy as np
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    before = faults()
    np.ones(2**25)
    return faults() - before
print(touch(), touch())
"""
    environment = os.environ | {"GLIBC_TUNABLES": TUNABLES}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    first, second = map(int, run.stdout.split())
    assert first >= 128  # pages of 2 MB at most
    assert second < 16


def test_what_is_free_is_given_back():
    """Below a block that is in use, glibc keeps what is freed."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("it is glibc that keeps it")
    script = """
import ctypes
from ppow_jax.parallel import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
held = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
blocks = [libc.malloc(4096) for _ in range(20_000)]
for block in blocks:
    ctypes.memset(ctypes.c_void_p(block), 1, 4096)
for block in blocks[:-1]:
    libc.free(block)
before = held()
memory.give_back()
print(before - held())
"""
    given = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(given.stdout) > 60_000_000


GB = 10**9


@pytest.mark.parametrize(
    ("own", "groups", "free"),
    [
        ("", {}, 20),  # no groups: the machine's
        ("0::/a/b", {"a/b": (4, 1, 0)}, 3),
        ("0::/a/b", {"a/b": (4, 3, 2)}, 3),  # of what it holds, files that were read can be dropped
        ("0::/a/b", {"a/b": (4, 1, 0), "a": (5, 3, 0)}, 2),  # the group around it may be fuller
        ("0::/a/b", {"a/b": ("max", 1, 0), "a": (9, 1, 0)}, 8),
        ("0::/host/x", {"": (6, 1, 0)}, 5),  # a container sees its own group as the root
        ("4:memory:/a", {"memory/a": (4, 1, 0)}, 3),
        ("4:cpu,memory:/docker/x", {"memory": (4, 1, 0)}, 3),
        ("4:memory:/a", {"memory/a": (2**63 / GB, 1, 0)}, 20),
        ("4:cpu:/a", {"memory/a": (4, 1, 0), "a": (4, 1, 0)}, 20),
        ("0::/a", {"a": (40, 1, 0)}, 20),
        ("nonsense", {"": (6, 1, 0)}, 20),
    ],
)
def test_memory_that_is_left_to_a_group(tmp_path, monkeypatch, own, groups, free):
    machine, listed = tmp_path / "meminfo", tmp_path / "cgroup"
    machine.write_text(f"MemTotal: 1 kB\nMemAvailable: {20 * GB // 1000} kB\n")
    listed.write_text(own)
    for name, (limit, used, cached) in groups.items():
        group = tmp_path / "groups" / name
        group.mkdir(parents=True, exist_ok=True)
        old = name.startswith("memory")
        values = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        limit = limit if isinstance(limit, str) else int(limit * GB)
        for file, value in zip(values, (limit, used * GB), strict=True):
            (group / f"memory.{file}").write_text(f"{value}\n")
        key = "total_inactive_file" if old else "inactive_file"
        (group / "memory.stat").write_text(f"anon 1\n{key} {cached * GB}\n")
    monkeypatch.setattr(memory, "_MACHINE", machine)
    monkeypatch.setattr(memory, "_OWN_GROUPS", listed)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    assert memory.free_bytes() / GB == pytest.approx(free * (1.024 if free == 20 else 1), rel=1e-3)
