"""A generated target whose best drafter is known: all stages within minutes on 2 cores.

  python -m ppow_jax.main --config=configs/tiny.py --workdir=/tmp/ppow-tiny

The target is an order-1 Markov chain written as a decoder; text and verification are at temperature 1.
The best drafter is the chain itself, and its expected reward follows from the transition matrix
(tests/test_tiny.py). PPOW is to reach at least 98% of it from a drafter below 60%.
"""

from ppow_jax.configs import base


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
    c.train.supervise.steps = 40
    c.train.supervise.anchors = 16
    c.train.supervise.window = 3
    c.train.supervise.optimizer.learning_rate = 1e-3
    c.train.supervise.optimizer.warmup_steps = 5
    c.train.cst.anchors = 16
    c.train.cst.window = 3
    c.train.cst.optimizer.warmup_steps = 5
    c.train.ppow.steps = 400
    c.train.ppow.batch_size = 8
    c.train.ppow.window = 4
    c.train.ppow.temperature = 1.0
    c.train.ppow.anchor_rule.warmup_steps = 10
    c.train.ppow.anchor_rule.rescore_every = 20
    # The policy gradient's noise keeps the drafter off the target; a strong anchor brings it there.
    c.train.ppow.kl_weight = 30.0
    c.train.ppow.optimizer.learning_rate = 3e-2
    c.train.ppow.optimizer.warmup_steps = 5
    c.evaluate.prompts = "chat=builtin:chat/eval[:8],maths=builtin:maths/eval[:8]"
    c.evaluate.max_new_tokens = 48
    c.evaluate.batch_size = 16
    c.evaluate.window = 4
    c.evaluate.decode_prompts = 4
    c.log.checkpoint_every_steps = 25
    return c
