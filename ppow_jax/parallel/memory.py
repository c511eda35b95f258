"""What compilers and allocators are asked for in the environment, before they begin.

A TPU reads texts in an eighth less time, by its compiler's account, if a product may use 32 MB of the vector
memory. The compiler gathers weights far ahead of their use, without gain, as long as a program's own arrays
leave room on the chip; others lie there too, so that it may plan with half of the memory. Large matrices it
would gather piece by piece, multiplying meanwhile in many small products: that is slower (docs/scaling.md).

XLA's CPU backend asks for its buffers anew at every step, and touching fresh pages takes a fifth of a
training step and most of the growth of a cache (docs/performance.md). glibc can back them by huge pages and
keep what is freed, in one heap for all threads, but reads the wish only when a process begins. Programs that
are queued on a CPU hold their temporary arrays while they wait, so that each is queued when the one before it
has ended.
"""

import contextlib
import ctypes
import os
import pathlib
import sys
from collections.abc import Iterator

_TPU_VARIABLE = "LIBTPU_INIT_ARGS"
_TPU_WISH = (
    "--xla_tpu_scoped_vmem_limit_kib=32768 --xla_tpu_scheduler_percent_shared_memory_limit=50 "
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
)
_VARIABLE = "GLIBC_TUNABLES"
_WISH = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**40, "arena_max": 1}


def ask_libtpu() -> None:
    """Sets the wishes about TPUs, unless the environment has others."""
    os.environ.setdefault(_TPU_VARIABLE, _TPU_WISH)


def ask_jax() -> None:
    """Sets the wish about the queue of a CPU, unless the environment has another."""
    os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")


def give_back() -> None:
    """Gives memory that is free back to the system, where glibc would keep it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def drop_programs() -> None:
    """Forgets all compiled programs, and gives back their memory: half a gigabyte after a stage on a CPU."""
    import jax  # not above: this module is imported before it

    jax.clear_caches()
    give_back()


def free_bytes() -> int | None:
    """Memory that this process could still take: of its first device, or of the machine and what a container
    may have of it; None: nobody tells."""
    import jax  # not above: this module is imported before it

    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    found = []
    with contextlib.suppress(OSError, ValueError):  # not Linux
        about = dict(line.split(":") for line in _MACHINE.read_text().splitlines())
        found.append(1024 * int(about["MemAvailable"].split()[0]))
    return min([*found, *_left_to_groups()], default=None)


def _left_to_groups() -> Iterator[int]:
    """Memory that the control groups of this process may still take: a container's, or a service's.

    Source: the kernel's documentation of cgroup v2 (`memory.max`) and v1 (`memory.limit_in_bytes`).
    """
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # v2
                root, limit, usage, cached = _GROUPS, "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                root, limit, usage = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cached = "total_inactive_file"
            else:
                continue
            # A container may see its own group as the root, under a path that only its host has.
            group = root / path.lstrip("/")
            for at in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError, KeyError):  # none there, or without a limit
                    stat = dict(x.split() for x in (at / "memory.stat").read_text().splitlines())
                    used = int((at / usage).read_text()) - int(stat[cached])  # read files can be dropped
                    yield int((at / limit).read_text()) - used
                if at == root:
                    break


_MACHINE, _GROUPS = pathlib.Path("/proc/meminfo"), pathlib.Path("/sys/fs/cgroup")
_OWN_GROUPS = pathlib.Path("/proc/self/cgroup")
_STATUS, _FORGET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Has `peak_bytes` count from now on, where the system can."""
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        _FORGET.write_text("5")


def peak_bytes() -> int:
    """The most memory that this process has held since `forget_peak`; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def restart_with_tunables() -> None:
    """Starts the running program again, as the same process, with all these wishes.

    Does nothing where glibc is not, or if the environment has tunables already (an empty value leaves glibc
    as it is).
    """
    ask_libtpu()
    ask_jax()
    if sys.platform != "linux" or _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = ":".join(f"glibc.malloc.{name}={value}" for name, value in _WISH.items())
    os.execv(sys.executable, sys.orig_argv)
