"""The listing of keys."""

import itertools

from ppow_jax import config, config_help
from ppow_jax.settings import OBJECTIVES, Settings


def leaves(values: dict, path: str) -> set[str]:
    """All keys below a path."""
    found = set()
    for name, value in values.items():
        where = f"{path}.{name}"
        found |= leaves(value, where) if isinstance(value, dict) else {where}
    return found


def test_every_key_is_listed_with_its_default_and_what_it_means():
    wanted = leaves(config.to_dict(Settings()), "config") - {"config.train"}
    for objective in OBJECTIVES:
        run = config.training_run(objective).to_dict()
        wanted |= leaves(run, "config.train.NAME")
    lines = list(config_help.lines())
    found = [line.partition(" = ")[0] for line in lines if line.startswith("config.")]
    assert set(found) == wanted
    for line, below in itertools.pairwise(lines):
        if line.startswith("config."):
            assert below.startswith("    "), line
    assert "config.train.NAME.learning_rate = 0.002" not in lines
    assert "config.train.NAME.optimizer.learning_rate = 0.002" in lines
