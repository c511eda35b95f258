"""Compiles every step of a run for a TPU slice, on a machine without one, from shapes alone.

  python -m ppow_jax.compile --config=llama31_8b --topology=v5p:2x2x4 [--config.KEY=VALUE ...]

Prints for every step what a chip holds, what chips send each other, and how long the compiler expects it to
take. It wants `pip install 'ppow_jax[tpu]'`, and no weights. What the figures mean: docs/scaling.md.
"""

import json
import sys

import jax
from absl import flags
from ml_collections import config_flags

from ppow_jax.compile import chips, report, steps, targets
from ppow_jax.config import from_config
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel import console, files, memory
from ppow_jax.parallel.console import log

_CONFIG = config_flags.DEFINE_config_file("config", None, "A ready-made config by its name, or a file.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "The slice, as v5p:2x2x4, v5e:4x4, v6e:2x4, v4:2x2x2.")
_ROWS = flags.DEFINE_integer("rows_per_chip", 0, "Rows of every batch over chips; 0: the config's batches.")
_STEPS = flags.DEFINE_string(
    "steps", "", "Some of respond, decode and the config's training runs, by commas; empty: all."
)
_OUT = flags.DEFINE_string("out", "", "A file for the figures as JSON lines, added to it.")


def main(argv: list[str]) -> None:
    """Compiles and reports."""
    console.setup()
    if len(argv) > 1 or _CONFIG.value is None or not _TOPOLOGY.value:
        raise ConfigError("expected --config=NAME or a file, and --topology=KIND:SHAPE; see --help")
    settings = from_config(_CONFIG.value)
    groups = steps.groups(settings)
    names = [name for name, _ in groups]
    wanted = [name for name in _STEPS.value.split(",") if name] or names
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(f"--steps: found {unknown[0]!r}, expected some of {', '.join(names)}")
    chip, mesh = chips.slice_mesh(_TOPOLOGY.value, settings.mesh.shape)
    if _ROWS.value:
        settings = steps.with_rows(settings, _ROWS.value * mesh.size)
    plan = steps.plan(settings, targets.shape_of(settings.target), mesh)
    log.info("compile: %s on %s: mesh %s", settings.target.path, _TOPOLOGY.value, dict(mesh.shape))
    about = {"config": settings.target.path, "topology": _TOPOLOGY.value, "chips": mesh.size}
    rows, too_large = [], []
    with jax.set_mesh(mesh):
        for group in [group for name, group in groups if name in wanted]:
            try:
                for row in report.compile_steps(group, plan, chip):
                    rows.append(row)
                    _keep(about | row)
            except report.DoesNotFitError as e:
                too_large.append(str(e))
    report.show(f"{settings.target.path} on {_TOPOLOGY.value}, {mesh.size} chips", rows, chip)
    if too_large := too_large + report.crowded(rows, chip):
        raise UserError(
            f"{', '.join(too_large)}: more than a chip's memory, as said above; a larger slice, more ways "
            "of config.mesh.fsdp or tensor, a smaller batch_size or more of config.train.RUN.accumulate help"
        )


def _keep(row: report.Row) -> None:
    if _OUT.value:
        with files.path_of(_OUT.value).open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    memory.ask_libtpu()
    console.command(main, sys.modules[__name__], console.parse_with_config)
