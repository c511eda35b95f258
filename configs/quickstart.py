"""SmolLM2-135M-Instruct on the builtin prompts: the whole idea on a real model.

  python -m ppow_jax.main --config=configs/quickstart.py --workdir=/tmp/ppow-quickstart

The README shows the table that it ends with.
"""

from ppow_jax.config import training_run as run
from ppow_jax.configs import base

KINDS = ("maths", "code", "chat")


def get_config():
    c = base.get_config()
    c.respond.prompts = ",".join(f"{kind}=builtin:{kind}/train[:128]" for kind in KINDS)
    c.respond.max_new_tokens = 96
    c.respond.batch_size = 96  # in 4 GB of memory; more batches of fewer would compile more
    c.data.length = 192
    c.data.holdout = 24
    c.drafter.kv_heads = 9
    c.train.supervise.steps = 500
    c.train.supervise.anchors = 24
    # From there the same minutes of two kinds: the control, and the reward of windows in closed form. Each
    # has the learning rate that suits it best: docs/log.md.
    c.train.cst.steps = 200
    c.train.cst.anchors = 24
    c.train.cst.window = 4
    c.train.cst.optimizer.learning_rate = 3e-4
    del c.train.ppow  # its samples cost more time than these few texts repay
    c.train.expected = run(
        "expected",
        start="supervise",
        order="continue",
        steps=140,
        anchors=24,
        window=6,
        rank=1,
        optimizer=base.optimizer(6e-4, 20),
    )
    c.evaluate.prompts = ",".join(f"{kind}=builtin:{kind}/eval[:48]" for kind in KINDS)
    c.evaluate.batch_size = 48
    c.evaluate.max_new_tokens = 64
    c.evaluate.decode_prompts = 4
    c.log.curve_points = 3
    return c
