"""What the other configs start from: all keys with their defaults, and the three training runs of the paper.

`ppow_jax/config.py` has every key with its comment and limits, `ppow_jax/objectives/` those of
objectives. One line adds a run: `c.train.NAME = run(OBJECTIVE, start=..., steps=..., KEY=VALUE ...)`.
"""

from ppow_jax.config import defaults
from ppow_jax.config import training_run as run


def optimizer(learning_rate, warmup_steps=50):
    """The optimiser's keys that change."""
    return dict(learning_rate=learning_rate, warmup_steps=warmup_steps)


def get_config():
    c = defaults()
    # Batch and learning rate of `supervise` by the sweep in docs/log.md.
    c.train.supervise = run("supervised", steps=4800, optimizer=optimizer(2e-3))
    # The control: continued supervised training, of as many steps as ppow on the same texts.
    c.train.cst = run(
        "supervised", start="supervise", order="continue", steps=200, optimizer=optimizer(3e-5, 20)
    )
    c.train.ppow = run("ppow", start="supervise", order="continue", optimizer=optimizer(3e-5, 20))
    for key in ("steps", "minutes", "batch_size"):
        c.train.ppow[key] = c.train.cst.get_ref(key)  # whichever is set, both have it
    c.evaluate.control = "cst"
    return c


def paper(name, **mesh):
    """The paper's run for a target; `name` is of the Hugging Face hub, or a local directory.

    Its settings: K = 10, G = 8, gamma = 0.12, temperature 0, trees in decoding. It does not publish eta,
    epsilon, beta, the clip range or the learning rate; those above come from sweeps on a small target
    (docs/log.md). Nobody has run this on targets of the paper's size yet.
    """
    c = get_config()
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
    c.train.supervise.batch_size = 32
    c.train.supervise.steps = 40000
    c.train.supervise.anchors = 512
    c.train.supervise.window = 7
    c.train.supervise.optimizer.learning_rate = 1e-4
    c.train.supervise.optimizer.warmup_steps = 500
    c.train.cst.anchors = 512
    c.train.cst.window = 7
    c.train.ppow.batch_size = 32
    c.train.ppow.steps = 2000
    c.train.ppow.anchors = 32
    c.decode.shape = "tree:60x8x10"
    c.evaluate.max_new_tokens = 1024
    return c
