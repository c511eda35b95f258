"""A short run on SmolLM2, for slow tests that need a trained drafter."""

import pathlib

from ppow_jax import config, run
from ppow_jax.configs import quickstart
from ppow_jax.settings import Settings


def settings() -> Settings:
    """A minute of training: its drafter is right now and then."""
    c = quickstart.get_config()
    c.respond.prompts = "maths=builtin:maths/train[:32]"
    c.respond.max_new_tokens, c.respond.batch_size, c.data.length, c.data.holdout = 48, 32, 128, 4
    c.train.supervise.steps, c.train.supervise.optimizer.warmup_steps = 60, 10
    c.drafter.vocab_size, c.train.supervise.anchors, c.train.supervise.window = 2048, 16, 4
    c.log.curve_points = 1
    c.evaluate.window, c.export.drafter = 4, "supervise"
    c.stages, c.runs = ("respond", "train", "export"), ("supervise",)
    return config.from_config(c)


def make(workdir: pathlib.Path) -> None:
    """Runs it."""
    run.run(settings(), workdir)
