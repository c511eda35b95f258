"""SmolLM2-135M-Instruct: the run that the README's table comes from.

  python -m ppow_jax.main --config=configs/smollm2_135m.py --workdir=DIR \
    --config.respond.responses=RESPONSES.jsonl \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:160],humaneval=HUMANEVAL.jsonl,mt_bench=MT_BENCH.jsonl

Without these two flags it trains and measures on the builtin prompts alone. Resumable at any point; the
README says how long it takes, where the time goes and what to expect.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.data.length = 288
    c.data.holdout = 64
    c.drafter.kv_heads = 9  # the target has 3 of 64: docs/experiments.md
    c.supervise.steps = 17000
    c.supervise.anchors = 24
    c.supervise.window = 4  # dearer windows teach less in the same time: docs/experiments.md
    c.cst.anchors = 24
    c.ppow.anchors = 48
    c.ppow.proximity_weight = 0.0  # earned by 3% of windows for 62% of a step's time: docs/experiments.md
    c.ppow.steps = 120
    c.ppow.gamma = "measured"
    return c
