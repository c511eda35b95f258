"""Memory for the buffers of XLA's CPU backend.

It asks for its buffers anew at every step, and touching fresh pages takes a fifth of a training step and
most of the growth of a cache (docs/performance.md). glibc can back them by huge pages and keep what is
freed, in one heap for all threads, but reads the wish only when a process begins.
"""

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
_WISH = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**40, "arena_max": 1}


def restart_with_tunables() -> None:
    """Starts the running program again, as the same process, with those wishes.

    Does nothing where glibc is not, or if the environment has tunables already (an empty value leaves glibc
    as it is).
    """
    if sys.platform != "linux" or _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = ":".join(f"glibc.malloc.{name}={value}" for name, value in _WISH.items())
    os.execv(sys.executable, sys.orig_argv)
