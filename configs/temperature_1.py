"""The next minutes of training for decoding at temperature 1: supervision or expected reward; three seeds.

  python -m ppow_jax.main --config=configs/temperature_1.py --workdir=DIR \
    --config.respond.prompts=chat=CHAT.jsonl[:400],code=CODE.jsonl[:400],gsm8k=GSM8K_TRAIN.jsonl[:400] \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:64],humaneval=HUMANEVAL.jsonl,mt_bench=MT_BENCH.jsonl

Without the flags it trains and measures on the builtin prompts. The target samples the texts that drafters
learn from and those that they are measured on. docs/results.md has the table that it ended with.
"""

from ppow_jax.config import training_run as run
from ppow_jax.configs import base, smollm2_135m
from ppow_jax.configs.equal_minutes import SEEDS


def get_config():
    c = smollm2_135m.get_config()
    del c.train.cst, c.train.ppow
    c.respond.temperature = 1.0
    c.decode.sampling.temperature = 1.0
    c.train.supervise.steps = 1500
    common = dict(start="supervise", order="continue", anchors=24)
    # Steps that take the same minutes on two cores, and the learning rate that suits each best: docs/log.md.
    for name, seed in SEEDS.items():
        c.train["cst" + name] = run(
            "supervised", seed=seed, steps=715, window=4, optimizer=base.optimizer(3e-4, 20), **common
        )
        c.train["expected" + name] = run(
            "expected",
            seed=seed,
            steps=590,
            window=6,
            temperature=1.0,
            optimizer=base.optimizer(6e-4, 20),
            **common,
        )
    c.evaluate.control = "cst"
    c.evaluate.decode_prompts = 4
    c.log.curve_points = 4
    return c
