"""Lists all keys of a config, with their defaults and meaning.

  python -m ppow_jax.config_help

Those of a training run stand in `config.train.NAME`, which has the keys of every run and those of the
objective that it names.
"""

import signal
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from ppow_jax import keys
from ppow_jax.config import objective_class
from ppow_jax.parallel import console
from ppow_jax.settings import OBJECTIVES, Settings, TrainSettings

_RUN = "config.train.NAME"
_WIDTH = 110


def lines() -> Iterator[str]:
    """The listing."""
    yield from _section("A whole run", Settings(), "config")
    yield from _section("Every training run", TrainSettings(), _RUN)
    for name in OBJECTIVES:
        yield from _section(f"Training runs of the objective {name!r}", objective_class(name)(), _RUN)


def _section(title: str, section: Any, path: str) -> Iterator[str]:
    yield from (f"{title}:", "")
    for key, value, comment in keys.described(section, path):
        yield f"{key} = {value!r}"
        yield from textwrap.wrap(comment, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    yield ""


def main(argv: list[str]) -> None:
    """Prints it."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that is left early is no error
    print("\n".join(lines()))


if __name__ == "__main__":
    console.command(main, sys.modules[__name__])
