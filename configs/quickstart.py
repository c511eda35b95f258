"""SmolLM2-135M-Instruct on the builtin prompts: the whole idea on a real model.

  python -m ppow_jax.main --config=configs/quickstart.py --workdir=/tmp/ppow-quickstart

The README shows the table that it ends with.
"""

from configs import base

KINDS = ("maths", "code", "chat")


def get_config():
    c = base.get_config()
    c.respond.prompts = ",".join(f"{kind}=builtin:{kind}/train[:128]" for kind in KINDS)
    c.respond.max_new_tokens = 96
    c.respond.batch_size = 64  # 3 GB of memory; more would be hardly faster on a few cores
    c.data.length = 192
    c.data.holdout = 24
    c.drafter.kv_heads = 9
    c.train.supervise.steps = 500
    c.train.supervise.anchors = 24
    c.train.cst.anchors = 24
    c.train.ppow.steps = 30
    c.train.ppow.anchors = 48
    c.train.ppow.window = 6  # a drafter this young is seldom right six times in a row
    c.train.ppow.proximity_weight = 0.0  # the dearest phase of a step; without it groups are drafted as one
    c.train.ppow.optimizer.learning_rate = 1e-4
    c.train.ppow.anchor_rule.warmup_steps = 10
    c.evaluate.prompts = ",".join(f"{kind}=builtin:{kind}/eval[:16]" for kind in KINDS)
    c.evaluate.max_new_tokens = 64
    c.evaluate.decode_prompts = 6
    c.log.curve_points = 3
    return c
