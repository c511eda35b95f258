"""The parts and the settings of PPOW, one changed at a time, on SmolLM2-135M-Instruct.

  python -m ppow_jax.main --config=configs/ablation.py --workdir=DIR \
    --config.respond.responses=RESPONSES.jsonl --config.respond.prompts= \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:64],humaneval=HUMANEVAL.jsonl[:40],mt_bench=MT_BENCH.jsonl[:20]

Without the flags it trains and measures on the builtin prompts. `plain` is the policy gradient without the
proximity reward and with uniform anchors; every other run differs from it by what its name says, and `paper`
has both. `control` is supervision for as many steps. Nobody has run it on SmolLM2 yet.
"""

from ppow_jax.config import training_run as run
from ppow_jax.configs import base, smollm2_135m

PROXIMITY = dict(proximity_weight=0.1)
ADAW = dict(anchor_rule=dict(rule="adaw"))
CHANGES = {
    "plain": {},
    "proximity": PROXIMITY,
    "adaw": ADAW,
    "paper": PROXIMITY | ADAW,
    "group_2": dict(group=2),
    "group_4": dict(group=4),
    "group_16": dict(group=16),
    "beta_low": dict(kl_weight=0.1),
    "beta_high": dict(kl_weight=5.0),
    "gamma_zero": dict(gamma="0"),
    "gamma_high": dict(gamma="0.3"),
    "window_4": dict(window=4),
    "window_6": dict(window=6),
    "eta_high": dict(proximity_weight=0.5),
    "epsilon_low": PROXIMITY | dict(proximity_epsilon=5.0),
}


def get_config():
    c = smollm2_135m.get_config()
    del c.train.cst, c.train.ppow
    c.train.supervise.steps = 800
    common = dict(start="supervise", order="continue", steps=80, optimizer=base.optimizer(3e-4, 10))
    c.train.control = run("supervised", anchors=24, window=4, **common)
    plain = dict(anchors=24, kl_weight=1.0, proximity_weight=0.0, anchor_rule=dict(rule="uniform"))
    for name, changes in CHANGES.items():
        c.train[name] = run("ppow", **(common | plain | changes))
    c.evaluate.control = "control"
    c.evaluate.decode_prompts = 2
    c.log.curve_points = 2
    return c
