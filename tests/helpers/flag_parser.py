"""Parses command lines by the flags of the package's commands, each as its own process would.

  python flag_parser.py < JSON > JSON

Read is a list of the words behind `python -m` of each; written is what is wrong with each, or an empty text.
Processes are forked, since flags of two commands may have one name, and an override of a config stays.
"""

import importlib
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable

from absl import flags

from ppow_jax import config, run  # noqa: F401  (`run` imports most of what the commands do, once for all)
from ppow_jax.errors import ConfigError
from ppow_jax.parallel import console


def parse(module: types.ModuleType, words: list[str]) -> str:
    """What is wrong with the words behind the command's name."""
    sys.argv = ["x", *words]  # where configs look for what overrides their keys
    try:
        if hasattr(module, "_CONFIG"):
            rest = console.parse_with_config(sys.argv)
            if module._CONFIG.value is not None:
                config.from_config(module._CONFIG.value)
        else:
            rest = flags.FLAGS(sys.argv)
    except (flags.Error, ConfigError) as e:
        return str(e)
    commands = ("load", "serve", *module.COMMANDS) if module.__name__.startswith("ppow_jax.bench") else ()
    wanted = f"one of {', '.join(commands)}" if commands else "flags only"
    right = len(rest) == 2 and rest[1] in commands if commands else len(rest) == 1
    return "" if right else f"found {rest[1:]}, expected {wanted}"


def forked(work: Callable[[], list[str]]) -> list[str]:
    """What a child of this process finds."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            try:
                json.dump(work(), file)
                file.flush()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        return json.load(file)


def of_one_command(name: str, lines: list[list[str]]) -> list[str]:
    """What is wrong with each command line of one command."""
    package = importlib.util.find_spec(name)
    if package is None:
        return [f"no module {name}"] * len(lines)
    module = importlib.import_module(f"{name}.__main__" if package.submodule_search_locations else name)
    return [forked(lambda words=words: [parse(module, words)])[0] for words in lines]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    order = sorted(range(len(asked)), key=lambda i: asked[i][0])
    found = {}
    for name, group in itertools.groupby(order, key=lambda i: asked[i][0]):
        where = list(group)
        lines = [asked[i][1:] for i in where]
        answers = forked(lambda name=name, lines=lines: of_one_command(name, lines))
        found |= dict(zip(where, answers, strict=True))
    json.dump([found[i] for i in range(len(asked))], sys.stdout)
