"""Every objective on SmolLM2-135M-Instruct, 200 steps each from one start on the same texts.

  python -m ppow_jax.main --config=configs/objectives.py --workdir=DIR \
    --config.respond.responses=RESPONSES.jsonl --config.respond.prompts= \
    --config.evaluate.prompts=gsm8k=GSM8K.jsonl[:40],humaneval=HUMANEVAL.jsonl[:20],mt_bench=MT_BENCH.jsonl[:20]

Without the flags it trains and measures on the builtin prompts. docs/results_objectives.md has its
table. `control` is continued supervision, and all others are compared with it prompt by prompt.
"""

from ppow_jax.config import training_run as run
from ppow_jax.configs import smollm2_135m

SUPERVISED = {
    "control": {},
    "reverse_kl": dict(losses="reverse_kl"),
    "jensen_shannon": dict(losses="jensen_shannon"),
    "total_variation": dict(losses="total_variation"),
    "hard": dict(losses="hard_cross_entropy"),
    "acceptance": dict(losses="neg_log_acceptance", renormalise=False),
    "lk_batch": dict(losses="lk_batch"),
    "lk_position": dict(losses="lk_position"),
    "half_temperature": dict(target_temperature=0.5),
    "reach": dict(step_weights="decay*reach"),
    "reach_sampled": dict(step_weights="decay*reach_sampled"),
    "dpace": dict(step_weights="dpace"),
    "adaw": dict(anchor_rule=dict(rule="adaw")),
    "rounds": dict(anchor_rule=dict(rule="rounds")),
}
OTHERS = ("hass", "griffin", "expected", "ppow", "opd", "gto")


def get_config():
    c = smollm2_135m.get_config()
    del c.train.cst, c.train.ppow
    c.train.supervise.steps = 800
    optimizer = dict(learning_rate=3e-4, warmup_steps=20)
    common = dict(start="supervise", order="continue", steps=200, optimizer=optimizer)
    for name, keys in SUPERVISED.items():
        c.train[name] = run("supervised", anchors=24, window=4, **keys, **common)
    for name in OTHERS:
        c.train[name] = run(name, **common)
        c.train[name].anchors = 24
    c.train.ppow.proximity_weight = 0.0
    c.train.ppow.kl_weight = 0.3
    c.train.ppow.window = 6
    c.train.gto.temperature = 0.0  # that of the measurement; above 0 the target reads every tree
    c.evaluate.control = "control"
    c.evaluate.tree = "tree:60x8x10"
    c.evaluate.decode_prompts = 2
    c.log.curve_points = 2
    return c
