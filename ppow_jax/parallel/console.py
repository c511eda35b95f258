"""The command line: the log as plain lines on stderr, help, and a user's mistakes as one line."""

import errno
import importlib.resources
import logging
import os
import pathlib
import re
import sys
import types
from collections.abc import Callable
from typing import TextIO

import jax
from absl import app, flags
from absl import logging as absl_logging

from ppow_jax.errors import ConfigError, UserError, out_of_memory
from ppow_jax.parallel import preemption, processes

log = logging.getLogger("ppow_jax")
_INTERRUPTED = 130
# Of a system's errors, those that are about the disk or a user's files.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.EIO, errno.ESTALE, errno.ENOTEMPTY),
)


def setup(stream: TextIO | None = None) -> None:
    """Shows the package's own messages on a stream (None: stderr), and only warnings of the libraries below
    it."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    absl_logging.set_verbosity(absl_logging.WARNING)


def only_the_first_speaks() -> None:
    """Of several processes: the others show errors alone."""
    if not processes.first():
        log.setLevel(logging.ERROR)


def parse_with_config(argv: list[str]) -> list[str]:
    """absl's flag parsing, with the many ways in which a config can be wrong as one line."""
    argv, path = _with_config_file(argv)
    if path is not None:
        let_configs_import(path)
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        # The library puts a whole traceback into the message where the file itself fails.
        lines = str(e).strip().splitlines()
        raise ConfigError(lines[0] if len(lines) == 1 else f"--config={path}: {lines[-1]}") from e
    except (AttributeError, KeyError) as e:
        # e.g. '\'stepz\'\nDid you mean "steps" instead of "stepz"?'
        key, close = (re.search(pattern, str(e)) for pattern in (r"'(\w+)\\?'", r'Did you mean "(\w+)"'))
        if key is None or "get_config" in str(e):
            raise ConfigError(f"--config={path}: {e}; expected a file with get_config()") from e
        names = (a.split("=")[0].lstrip("-") for a in argv)
        where = next((n for n in names if key[1] in n.split(".")), f"--config={path}")
        hint = f" (did you mean {close[1]!r}?)" if close else ""
        raise ConfigError(
            f"{where}: unknown key {key[1]!r}{hint}; `python -m ppow_jax.config_help` lists the keys"
        ) from e
    except (TypeError, ValueError) as e:
        raise ConfigError(f"a --config.KEY=VALUE flag has a wrong type: {e}") from e
    except Exception as e:  # a config file is code: it can fail in any way
        raise ConfigError(f"--config={path}: cannot be loaded ({type(e).__name__}: {e})") from e


def _with_config_file(argv: list[str]) -> tuple[list[str], str | None]:
    """The flags with a ready-made config's name as the path of its file, and the path, if any is given.

    Raises:
      ConfigError: there is no such file.
    """
    for at, flag in enumerate(argv):
        name, given, value = flag.partition("=")
        if name not in ("--config", "-config"):
            continue
        path = config_file(value if given else "".join(argv[at + 1 : at + 2]), "--config")
        return [*argv[:at], f"--config={path}", *argv[at + (1 if given else 2) :]], path
    return argv, None


def config_file(name: str, where: str) -> str:
    """The path of a config: a file, or a ready-made config by its name.

    Raises:
      ConfigError: there is none; the message begins with `where`.
    """
    path = name if os.path.isfile(name) else _ready_made().get(name)
    if path is None:
        raise ConfigError(f"{where}: no file {name!r}, expected a path or one of {', '.join(_ready_made())}")
    return path


def let_configs_import(path: str) -> None:
    """Lets the configs of a folder `configs` import each other, wherever the command is started."""
    folder = pathlib.Path(path).absolute().parent
    if folder.name == "configs":
        package = types.ModuleType(folder.name)  # where the command is started may be a folder of that name
        package.__path__ = [str(folder)]
        sys.modules[folder.name] = package


def _ready_made() -> dict[str, str]:
    """Files of the configs that are installed with the package, by name."""
    folder = importlib.resources.files("ppow_jax.configs")
    files = sorted(pathlib.Path(str(entry)) for entry in folder.iterdir())
    return {file.stem: str(file) for file in files if file.suffix == ".py" and file.stem != "__init__"}


def command(
    main: Callable[[list[str]], int | None],
    module: types.ModuleType,
    parse: Callable[[list[str]], list[str]] | None = None,
) -> None:
    """Runs a command of flags; `--help` shows its module's text, a user's mistake is one line on stderr.

    Exit status: what `main` returns, 0 if that is nothing; 2, the command or the config is wrong; 1, another
    mistake that can be mended; 75, asked to end (SIGTERM), to be started again; 130, interrupted.
    """
    if any(a in ("--help", "-h", "--helpfull", "--helpshort") for a in sys.argv):
        print((module.__doc__ or "").strip() + "\n\n" + flags.FLAGS.module_help(module))
        return
    try:
        _run(main, parse)
    except SystemExit as e:
        if e.code in (preemption.STATUS, _INTERRUPTED) and not jax.distributed.is_initialized():
            # The program that runs on a device meanwhile would crash when the interpreter frees what it uses.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(e.code))
        raise


def _run(main: Callable[[list[str]], int | None], parse: Callable[[list[str]], list[str]] | None) -> None:
    """`command` of flags other than `--help`."""
    try:
        app.run(main, flags_parser=parse) if parse else app.run(main)
    except UserError as e:
        _stop(2 if isinstance(e, ConfigError) else 1, str(e))
    except preemption.Stopped as e:
        _stop(preemption.STATUS, f"asked to end: {e}; the same command goes on from there")
    except KeyboardInterrupt:
        _stop(_INTERRUPTED, "interrupted; what is finished is kept, and the same command goes on from there")
    except OSError as e:
        if e.errno not in _NO_ROOM + _NO_ACCESS:
            raise
        mend = "make room" if e.errno in _NO_ROOM else "mend that"
        _stop(1, f"{e}; what is finished is kept: {mend} and run the same command again")
    except jax.errors.JaxRuntimeError as e:
        if not out_of_memory(e):
            raise
        mend = "lower the stage's batch_size or data.length, or leave out very long prompts"
        _stop(1, f"{str(e).splitlines()[0]}; {mend}; what is finished is kept")


def _stop(status: int, message: str) -> None:
    print(f"ppow_jax: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
