"""PPOW in JAX: drafters for speculative decoding, trained on the length of the accepted prefix.

The names below are those of `ppow_jax.api`. They are imported when they are first asked for, so that a
command can set the environment before JAX is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppow_jax.api import (
        Answer,
        Report,
        Round,
        generate,
        load_config,
        load_drafter,
        load_target,
        read_report,
        show_log,
        train,
        training_run,
    )

__all__ = [
    "Answer", "Report", "Round", "generate", "load_config", "load_drafter", "load_target", "read_report",
    "show_log", "train", "training_run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("ppow_jax.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
