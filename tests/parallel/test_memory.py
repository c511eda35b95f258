"""The restart with wishes about memory."""

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
