"""Rounds as rows of a file: what was drafted, what was accepted, and how likely both models found it."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from ppow_jax.api import Answer
from ppow_jax.errors import ConfigError
from ppow_jax.parallel import files

_WRITERS = (".parquet", ".jsonl")


def check(path: pathlib.Path) -> None:
    """Looks whether a trace can be written.

    Raises:
      ConfigError: another ending, no such directory, or no pyarrow.
    """
    if path.suffix not in _WRITERS:
        raise ConfigError(f"--trace: found {str(path)!r}, expected a name that ends in .parquet or .jsonl")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--trace: found no directory {str(path.parent)!r}; make it, or name another file")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as e:
            raise ConfigError(
                "--trace: Parquet is written by pyarrow, which is missing; `pip install pyarrow`, or name a "
                ".jsonl file"
            ) from e


def rows(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """A row for each round of each answer.

    `answer` and `round` are numbers from 0; round 0 is the reading of the prompt. `drafted` holds the ids of
    the whole tree; `parents`, of each, the number of the one above it, -1: the last token known before;
    `drafter_log_probs` and `target_log_probs` are after that one, None where there is none. `accepted` counts
    drafted tokens that were kept; `emitted` holds the round's ids of the text.
    """
    return [
        {
            "answer": number,
            "round": at,
            "drafted": [node.token for node in of.nodes],
            "parents": [node.parent for node in of.nodes],
            "drafter_log_probs": [node.drafter for node in of.nodes],
            "target_log_probs": [node.target for node in of.nodes],
            "accepted": of.accepted,
            "emitted": of.tokens,
        }
        for number, answer in enumerate(answers)
        for at, of in enumerate(answer.rounds)
    ]


def write(path: pathlib.Path, answers: Iterable[Answer]) -> None:
    """Replaces a file with the rows of the answers."""
    found = rows(answers)
    with files.replacing(path) as scratch:
        if path.suffix == ".jsonl":
            scratch.write_text("".join(json.dumps(row) + "\n" for row in found))
        else:
            _write_parquet(scratch, found)


def _write_parquet(path: pathlib.Path, found: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    ids, log_probs = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
    types = {"answer": pyarrow.int32(), "round": pyarrow.int32(), "drafted": ids, "parents": ids}
    types |= {"drafter_log_probs": log_probs, "target_log_probs": log_probs}
    types |= {"accepted": pyarrow.int32(), "emitted": ids}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found, pyarrow.schema(types.items())), path)
