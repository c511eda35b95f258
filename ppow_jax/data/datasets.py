"""Rows of published data sets: TensorFlow Datasets', and the Hugging Face hub's."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ppow_jax.data import dialogue
from ppow_jax.data.rows import Row
from ppow_jax.errors import ConfigError, UserError


def tfds(name_split: str, key: str) -> Iterator[Row]:
    """The rows of `NAME/SPLIT`; NAME is their category.

    Args:
      name_split: the data set, prepared as ArrayRecord files, and its split.
      key: the config key that it came from, for messages.

    Raises:
      UserError: it cannot be read.
    """
    import tensorflow_datasets

    name, _, split = name_split.rpartition("/")

    def items() -> Iterator[Mapping[str, Any]]:
        source = tensorflow_datasets.data_source(name, split=split)
        for i in range(len(source)):
            yield source[i]

    expected = "tfds:NAME/SPLIT of a dataset prepared with file_format='array_record'"
    for row in _rows(f"tfds:{name_split}", name_split, items(), key, expected):
        yield row._replace(values=row.values | {"category": name})


def hub(about: str, key: str) -> Iterator[Row]:
    """The rows of `ORG/NAME[:CONFIG][/SPLIT]`, by default of the split `train`.

    Args:
      about: the data set, which of its configurations, and its split.
      key: the config key that it came from, for messages.

    Raises:
      UserError: it cannot be fetched or read, or the library `datasets` is missing.
    """
    expected = "hub:ORG/NAME[:CONFIG][/SPLIT]"
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([^/]+))?(?:/(.+))?", about)
    if not match:
        raise ConfigError(f"config.{key}: found 'hub:{about}', expected {expected}")
    name, config, split = match[1], match[2], match[3] or "train"
    try:
        import datasets
    except ImportError as e:
        raise UserError(
            f"{key}: hub:{about} is read by the library datasets, which is missing; `pip install datasets`"
        ) from e

    def items() -> Iterator[Mapping[str, Any]]:
        yield from datasets.load_dataset(name, config, split=split)

    chosen = f"{name}:{config}/{split}" if config else f"{name}/{split}"
    yield from _rows(f"hub:{about}", chosen, items(), key, expected)


def _rows(
    where: str, name: str, items: Iterator[Mapping[str, Any]], key: str, expected: str
) -> Iterator[Row]:
    """Rows whose ids are their numbers: those in published data are often repeated."""
    number = 0
    try:
        for number, item in enumerate(items, 1):
            values = {k: _plain(v) if k in dialogue.USED else v for k, v in item.items()}
            yield Row(f"{where}: row {number}", number, values | {"id": f"{name}/{number - 1}"})
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: row {number}: not UTF-8 text ({e.reason}); use another split") from e
    except Exception as e:  # the libraries raise many kinds for a wrong name, split, format, network or token
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise UserError(f"{key}: {where} cannot be read ({reason}); expected {expected}") from e


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(of) for name, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(of) for of in value]
    return value
