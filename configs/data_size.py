"""How much of it is the text? Supervision and the expected reward on all texts, on half and on a quarter.

  python -m ppow_jax.main --config=configs/data_size.py --workdir=DIR \
    --config.respond.responses=RESPONSES.jsonl --config.respond.prompts= \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:96],humaneval=HUMANEVAL.jsonl,mt_bench=MT_BENCH.jsonl

RESPONSES holds at least 1,864 texts. Each size has a supervised drafter of its own, and two runs that go on
from there for the same minutes. Without the flags it trains and measures on the builtin prompts.
docs/results_objectives.md has the table of a quarter and of all.
"""

from ppow_jax.config import training_run as run
from ppow_jax.configs import base, smollm2_135m

SIZES = {"_quarter": 450, "_half": 900, "": 1800}


def get_config():
    c = smollm2_135m.get_config()
    del c.train.cst, c.train.ppow, c.train.supervise
    for size, texts in SIZES.items():
        common = dict(texts=texts, anchors=24)
        c.train["supervise" + size] = run(
            "supervised", steps=1000, window=4, optimizer=base.optimizer(2e-3), **common
        )
        common |= dict(start="supervise" + size, order="continue")
        c.train["cst" + size] = run(
            "supervised", steps=400, window=4, optimizer=base.optimizer(3e-4, 20), **common
        )
        c.train["expected" + size] = run(
            "expected", steps=280, window=6, rank=1, optimizer=base.optimizer(6e-4, 20), **common
        )
    c.evaluate.control = "cst"
    c.evaluate.decode_prompts = 1
    c.log.curve_points = 4
    return c
