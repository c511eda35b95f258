"""The parts and the settings of PPOW, one changed at a time, on SmolLM2-135M-Instruct.

  python -m ppow_jax.main --config=configs/ablation.py --workdir=DIR \
    --config.respond.responses=RESPONSES.jsonl --config.respond.prompts= \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:96],humaneval=HUMANEVAL.jsonl,mt_bench=MT_BENCH.jsonl

Without the flags it trains and measures on the builtin prompts. `plain` is the policy gradient without the
proximity reward and with uniform anchors. Every other run of `ppow` differs from it by what its name says;
the last ones, from `few` on, have fewer anchors too. `paper` has both of the paper's parts. `control` is
supervision for as many steps, `expected` the closed form of the reward. docs/results_objectives.md has their
table.
"""

from ppow_jax.config import training_run as run
from ppow_jax.configs import base, data_size

FEW = dict(anchors=4)  # the proximity reward drafts every window by itself: ten times a step's time
PROXIMITY = FEW | dict(proximity_weight=0.1)
ADAW = dict(anchor_rule=dict(rule="adaw"))
CHANGES = {
    "plain": {},
    "group_2": dict(group=2),
    "group_4": dict(group=4),
    "group_16": dict(group=16),
    "beta_low": dict(kl_weight=0.1),
    "beta_high": dict(kl_weight=5.0),
    "window_4": dict(window=4),
    "window_6": dict(window=6),
    "gamma_zero": dict(gamma="0"),
    "gamma_high": dict(gamma="0.3"),
    "adaw": ADAW,
    "few": FEW,
    "proximity": PROXIMITY,
    "paper": PROXIMITY | ADAW,
    "eta_high": PROXIMITY | dict(proximity_weight=0.5),
    "epsilon_low": PROXIMITY | dict(proximity_epsilon=5.0),
}


def get_config():
    c = data_size.get_config()
    for name in set(c.train) - {"supervise"}:
        del c.train[name]
    common = dict(start="supervise", order="continue", texts=c.train.supervise.texts, steps=120, anchors=24)
    slow, fast = base.optimizer(3e-4, 10), base.optimizer(6e-4, 10)
    c.train.control = run("supervised", window=4, optimizer=slow, **common)
    c.train.expected = run("expected", window=6, rank=1, optimizer=fast, **common)
    plain = dict(optimizer=slow, kl_weight=1.0, proximity_weight=0.0, anchor_rule=dict(rule="uniform"))
    for name, changes in CHANGES.items():
        c.train[name] = run("ppow", **(common | plain | changes))
    c.evaluate.control = "control"
    c.log.curve_points = 2
    return c
