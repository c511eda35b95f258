"""What the configs of the paper's targets share; a target of your own may start from `of`, too.

The paper's settings: K = 10, G = 8, gamma = 0.12, temperature 0, trees in decoding. It does not publish eta,
epsilon, beta, the clip range or the learning rate; those in `base` come from sweeps on a small target
(docs/experiments.md) and have not been tried on targets of this size: nobody has run these configs yet.
"""

from configs import base


def of(name, **mesh):
    """The paper's run for a target; `name` is of the Hugging Face hub, or a local directory."""
    c = base.get_config()
    c.target.path = name
    c.target.dtype = "bfloat16"
    c.mesh.update(mesh)
    c.respond.max_new_tokens = 1024
    c.respond.batch_size = 256
    c.data.length = 2048
    c.data.holdout = 256
    c.data.feature_dtype = "bfloat16"
    c.drafter.vocab_size = 32000
    c.drafter.dtype = "bfloat16"
    c.supervise.batch_size = 32
    c.supervise.steps = 40000
    c.supervise.anchors = 512
    c.supervise.window = 7
    c.supervise.optimizer.learning_rate = 1e-4
    c.supervise.optimizer.warmup_steps = 500
    c.cst.anchors = 512
    c.ppow.batch_size = 32
    c.ppow.steps = 2000
    c.ppow.anchors = 32
    c.ppow.group = 8
    c.ppow.window = 10
    c.ppow.gamma = "0.12"
    c.decode.shape = "tree:60x8x10"
    c.evaluate.max_new_tokens = 1024
    c.evaluate.window = 10
    return c
