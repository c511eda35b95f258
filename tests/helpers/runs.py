"""Whole runs of seconds on the Markov target: their settings, prompt files and traces on disk.

The prompts are a few letters long; text is greedy, so that real decoding with any drafter must repeat it.
"""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ppow_jax import experiment
from ppow_jax import run as runner
from ppow_jax.config import from_config
from ppow_jax.settings import Settings

RUNS = ("supervise", "cst")
LETTERS = "abcdefghijklmnopqrstuvwx"


class Finished(NamedTuple):
    """A run that has ended, and its settings."""

    workdir: pathlib.Path
    settings: Settings


def config(directory: pathlib.Path, **changes: Any) -> ConfigDict:
    """A small ConfigDict on prompt files in `directory`; `data__length=3` sets `data.length`."""
    from ppow_jax.configs import base

    train, chat, maths = (directory / f"{name}.jsonl" for name in ("train", "chat", "maths"))
    if not train.exists():
        write_jsonl(train, [{"id": f"t{i}", "turns": [x + " ok"]} for i, x in enumerate(LETTERS)])
        write_jsonl(chat, [{"id": f"c{i}", "turns": [x * 3]} for i, x in enumerate("abcd")])
        write_jsonl(maths, [{"id": f"m{i}", "turns": [x + x]} for i, x in enumerate("wxy")])
    c = base.get_config()
    small = dict(
        runs=RUNS,
        target__path="markov:0",
        respond__prompts=f"train={train}",
        respond__max_new_tokens=16,
        respond__batch_size=8,
        data__length=32,
        data__holdout=4,
        drafter__vocab_size=20,
        drafter__mlp_hidden=16,
        train__supervise__steps=30,
        train__supervise__batch_size=4,
        train__supervise__anchors=4,
        train__supervise__window=2,
        train__supervise__optimizer__learning_rate=1e-2,
        train__supervise__optimizer__warmup_steps=5,
        train__cst__anchors=4,
        train__cst__window=2,
        train__ppow__steps=10,
        train__ppow__batch_size=4,
        train__ppow__anchors=2,
        train__ppow__group=2,
        train__ppow__window=3,
        export__drafter="cst",
        evaluate__prompts=f"maths={maths},chat={chat}",
        evaluate__max_new_tokens=16,
        evaluate__batch_size=4,
        evaluate__window=3,
        decode__shape="chain:2",
        evaluate__decode_prompts=2,
        log__curve_points=3,
        log__checkpoint_every_steps=10,
    )
    for key, value in (small | changes).items():
        *path, last = key.split("__")
        section = c
        for name in path:
            section = section[name]
        section[last] = value
    return c


def make_settings(directory: pathlib.Path, **changes: Any) -> Settings:
    """`config` as settings."""
    return from_config(config(directory, **changes))


def run(workdir: pathlib.Path, **changes: Any) -> Settings:
    """Runs the stages in `workdir`, on prompt files beside it."""
    chosen = make_settings(workdir.parent, **changes)
    runner.run(chosen, workdir)
    return chosen


def build(workdir: pathlib.Path, **changes: Any) -> experiment.Experiment:
    """What `run` hands to the stages."""
    workdir.mkdir(exist_ok=True)
    return experiment.build(make_settings(workdir.parent, **changes), workdir)


def write_jsonl(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def digest(directory: pathlib.Path) -> dict[str, str]:
    """sha256 of every file below `directory`, by relative path."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
