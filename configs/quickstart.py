"""SmolLM2-135M-Instruct on the builtin prompts: the whole idea in about 15 minutes on 2 cores.

  python -m ppow_jax.main --config=configs/quickstart.py --workdir=/tmp/ppow-quickstart

The README shows the table that it ends with.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.respond.prompts = (
        "maths=builtin:maths/train[:128],code=builtin:code/train[:128],chat=builtin:chat/train[:128]"
    )
    c.respond.max_new_tokens = 96
    c.data.length = 192
    c.data.holdout = 24
    c.supervise.steps = 400
    c.supervise.anchors = 24
    c.cst.anchors = 24
    c.ppow.steps = 30
    c.ppow.anchors = 8
    c.ppow.adaw.warmup_steps = 10
    c.evaluate.prompts = (
        "maths=builtin:maths/eval[:16],code=builtin:code/eval[:16],chat=builtin:chat/eval[:16]"
    )
    c.evaluate.max_new_tokens = 64
    c.evaluate.decode_prompts = 6
    c.log.holdout_every_steps = 100
    return c
