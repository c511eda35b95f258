"""SmolLM2-135M-Instruct on real prompts: the long run of docs/results.md.

  python -m ppow_jax.main --config=configs/smollm2_135m.py --workdir=DIR \
    --config.respond.responses=RESPONSES.jsonl \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:160],humaneval=HUMANEVAL.jsonl,mt_bench=MT_BENCH.jsonl

Without these two flags it trains and measures on the builtin prompts alone. Resumable at any point;
docs/results.md says how long it takes, where the time goes and what came out.
"""

from ppow_jax.configs import base


def get_config():
    c = base.get_config()
    c.data.length = 288
    c.data.holdout = 64
    c.drafter.kv_heads = 9  # the target has 3 of 64: docs/log.md
    c.train.supervise.steps = 17000
    c.train.supervise.anchors = 24
    c.train.supervise.window = 4  # dearer windows teach less in the same time: docs/log.md
    c.train.cst.anchors = 24
    c.train.cst.window = 4
    c.train.ppow.anchors = 48
    c.train.ppow.proximity_weight = 0.0  # earned by 3% of windows for 62% of a step's time: docs/log.md
    c.train.ppow.steps = 120
    c.train.ppow.gamma = "measured"
    return c
