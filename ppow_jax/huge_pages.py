"""Huge pages for the buffers of XLA's CPU backend.

It maps the buffers of every step anew, and the page faults take a fifth of a training step
(docs/performance.md). glibc can ask for huge pages, but reads the wish only when a process begins.
"""

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"


def restart_with() -> None:
    """Starts the running program again, as the same process, with huge pages asked for.

    Does nothing where glibc is not, or if the environment has tunables already (an empty value leaves the
    pages as they are).
    """
    if sys.platform != "linux" or _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
