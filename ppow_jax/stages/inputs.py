"""What stages read from files of the user, known by its content and not by its path.

What a stage has read is kept beside the settings that it was run with: the same content under another path is
the same input, and another content under the same path is not.
"""

import hashlib
import json
import pathlib

from ppow_jax.data import prompts
from ppow_jax.parallel import files
from ppow_jax.settings import FRESH, Settings

_OF_DRAFTERS = (".json", ".safetensors", ".bin")


def read(settings: Settings, unit: str, workdir: pathlib.Path) -> dict[str, str | None]:
    """The keys that name what a unit reads, each with a name of the content.

    None: the content cannot be known, as of a missing file or a model on a hub, or it may change, as in the
    workdir itself. There the key's own value has to do.
    """
    stage, _, run = unit.partition("/")
    found = {}
    if stage != "export":
        found["respond.prompts"] = _prompts(settings.respond.prompts, "respond.prompts")
        found["respond.responses"] = _file(settings.respond.responses)
        if settings.respond.endpoint:  # it may move: what it serves is held against the target's texts
            found["respond.endpoint"] = _digest("a server")
    if stage == "evaluate":
        found["evaluate.prompts"] = _prompts(settings.evaluate.prompts, "evaluate.prompts")
    if stage != "respond":
        found["drafter.path"] = _drafter(settings.drafter.path, workdir)
    first = settings.train[settings.lineage(run)[0]].start if run else FRESH
    if first != FRESH:
        found[f"train.{settings.lineage(run)[0]}.start"] = _drafter(first, workdir)
    return found


def _prompts(spec: str, key: str) -> str | None:
    """Of sources of prompts with their names and limits, in their order."""
    known = []
    for name, where, wanted in prompts.parse(spec, key):
        elsewhere = where.startswith(("builtin:", "tfds:", "hub:"))
        known.append([name, where if elsewhere else _file(where), wanted])
    return None if None in (source for _, source, _ in known) else _digest(known)


def _drafter(path: str, workdir: pathlib.Path) -> str | None:
    """Of the files of a drafter in a directory."""
    directory = files.path_of(path)
    if path and directory.is_file():
        return _file(path)
    if not path or not directory.is_dir() or directory.resolve().is_relative_to(workdir.resolve()):
        return None
    names = sorted(p.name for p in directory.iterdir() if p.suffix in _OF_DRAFTERS)
    return _digest([[name, _file(str(directory / name))] for name in names])


def _file(path: str) -> str | None:
    try:
        return files.sha256(files.path_of(path)) if path else None
    except OSError:
        return None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
