"""What to do with the next minutes of training: supervision, or the expected reward; three seeds.

  python -m ppow_jax.main --config=configs/equal_minutes.py --workdir=DIR \
    --config.respond.responses=RESPONSES.jsonl --config.respond.prompts= \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:128],humaneval=HUMANEVAL.jsonl,mt_bench=MT_BENCH.jsonl

Without the flags it trains and measures on the builtin prompts. docs/results_objectives.md has its
table. The report compares all runs with `cst`, prompt by prompt, and the seeds of a kind with each other.
"""

from ppow_jax.config import training_run as run
from ppow_jax.configs import base, smollm2_135m

SEEDS = {"": 0, "_2": 1, "_3": 2}


def add_runs(c, supervised_steps, expected_steps, **expected):
    """Adds the runs of both kinds, and the control; `expected` has keys of that objective.

    The steps take the same minutes on two cores, and each kind has the learning rate that suits it best:
    docs/log.md.
    """
    common = dict(start="supervise", order="continue", anchors=24)
    for name, seed in SEEDS.items():
        slow, fast = base.optimizer(3e-4, 20), base.optimizer(6e-4, 20)
        c.train["cst" + name] = run(
            "supervised", seed=seed, steps=supervised_steps, window=4, optimizer=slow, **common
        )
        c.train["expected" + name] = run(
            "expected", seed=seed, steps=expected_steps, window=6, optimizer=fast, **expected, **common
        )
    c.evaluate.control = "cst"


def get_config():
    c = smollm2_135m.get_config()
    del c.train.cst, c.train.ppow
    c.train.supervise.steps = 1500
    add_runs(c, 800, 560, rank=1)
    c.evaluate.decode_prompts = 2
    c.log.curve_points = 4
    return c
