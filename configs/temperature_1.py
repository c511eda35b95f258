"""The next minutes of training for decoding at temperature 1: supervision or expected reward; three seeds.

  python -m ppow_jax.main --config=configs/temperature_1.py --workdir=DIR \
    --config.respond.prompts=chat=CHAT.jsonl[:400],code=CODE.jsonl[:400],gsm8k=GSM8K_TRAIN.jsonl[:400] \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:64],humaneval=HUMANEVAL.jsonl,mt_bench=MT_BENCH.jsonl

Without the flags it trains and measures on the builtin prompts. The target samples the texts that drafters
learn from and those that they are measured on. docs/results_objectives.md has the table that it ended with.
"""

from ppow_jax.configs import smollm2_135m
from ppow_jax.configs.equal_minutes import add_runs


def get_config():
    c = smollm2_135m.get_config()
    del c.train.cst, c.train.ppow
    c.respond.temperature = 1.0
    c.decode.sampling.temperature = 1.0
    c.train.supervise.steps = 1500
    add_runs(c, 715, 590, temperature=1.0)
    c.evaluate.decode_prompts = 4
    c.log.curve_points = 4
    return c
