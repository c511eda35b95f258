"""A generated target whose best drafter is known: all stages within minutes on 2 cores.

  python -m ppow_jax.main --config=configs/tiny.py --workdir=/tmp/ppow-tiny

The target is an order-1 Markov chain written as a decoder; text and verification are at temperature 1.
The best drafter is the chain itself, and its expected reward follows from the transition matrix
(tests/test_tiny.py). PPOW is to reach at least 98% of it from a drafter below 60%.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.target.path = "markov:0"
    c.respond.prompts = "chat=builtin:chat/train[:192]"
    c.respond.max_new_tokens = 48
    c.respond.temperature = 1.0
    c.respond.batch_size = 48
    c.data.length = 128
    c.data.holdout = 16
    c.drafter.vocab_size = 24
    c.drafter.mlp_hidden = 128
    c.drafter.induction = False  # in an order-1 chain there is nothing to copy
    c.supervise.steps = 40
    c.supervise.anchors = 16
    c.supervise.window = 3
    c.supervise.optimizer.learning_rate = 1e-3
    c.supervise.optimizer.warmup_steps = 5
    c.cst.anchors = 16
    c.cst.optimizer.warmup_steps = 5
    c.ppow.steps = 400
    c.ppow.batch_size = 8
    c.ppow.window = 4
    c.ppow.temperature = 1.0
    c.ppow.adaw.warmup_steps = 10
    c.ppow.adaw.rescore_every = 20
    # The policy gradient's noise keeps the law off the target's; a strong anchor brings it there.
    c.ppow.kl_weight = 30.0
    c.ppow.optimizer.learning_rate = 3e-2
    c.ppow.optimizer.warmup_steps = 5
    c.evaluate.prompts = "chat=builtin:chat/eval[:8],maths=builtin:maths/eval[:8]"
    c.evaluate.max_new_tokens = 48
    c.evaluate.batch_size = 16
    c.evaluate.window = 4
    c.evaluate.decode_prompts = 4
    c.log.checkpoint_every_steps = 25
    return c
