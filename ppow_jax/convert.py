"""Makes an orbax checkpoint of a target: read faster, and by every process of a pod its own part.

  python -m ppow_jax.convert --target=PATH --out=DIR [--dtype=bfloat16]

PATH is all that config.target.path takes; then --config.target.path=DIR.
"""

import sys

from ppow_jax.parallel import memory

if __name__ == "__main__":
    memory.restart_with_tunables()  # before the imports below, which take a second or two

import jax
from absl import flags

from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel import console, files, partition, progress
from ppow_jax.parallel.console import log
from ppow_jax.targets import orbax
from ppow_jax.targets.load import read

_TARGET = flags.DEFINE_string("target", "", "As config.target.path.")
_OUT = flags.DEFINE_string("out", "", "Directory to write; made if need be.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights.")


def main(argv: list[str]) -> None:
    """Reads and writes."""
    console.setup()
    if len(argv) > 1 or not _TARGET.value or not _OUT.value:
        raise ConfigError("expected --target=PATH and --out=DIR; see --help")
    out = files.directory(_OUT.value, "--out")
    files.require_writable(out, "--out")
    if foreign := [entry.name for entry in out.iterdir() if not entry.name.startswith(orbax.WRITTEN)]:
        raise UserError(f"--out: {_OUT.value!r} holds {foreign[0]!r}, expected a new or empty directory")
    mesh = partition.make_mesh((1, -1, 1))
    with progress.followed(), progress.during(f"converting {_TARGET.value}"):
        config, params, tokens = read(_TARGET.value, _DTYPE.value, mesh)
        files.require_room(out, sum(x.nbytes for x in jax.tree.leaves(params)), "the target")
        orbax.save(out, config, partition.shard(params, mesh), tokens)
    log.info("convert: %s is in %s", _TARGET.value, out)


if __name__ == "__main__":
    console.command(main, sys.modules[__name__])
