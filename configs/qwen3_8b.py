"""Qwen3-8B: the paper's run.

  python -m ppow_jax.main --config=configs/qwen3_8b.py --workdir=DIR \
    --config.respond.prompts=train=PROMPTS.jsonl \
    --config.evaluate.prompts=mt_bench=MT_BENCH.jsonl,humaneval=HUMANEVAL.jsonl,gsm8k=GSM8K.jsonl

`--config.target.path=DIRECTORY` takes the model from a local directory instead of the Hugging Face hub.

Published (temperature 0, mean over MT-Bench, HumanEval and GSM8K, acceptance length / speedup): EAGLE-3
6.16 / 3.17x, PPOW 6.52 / 3.39x; PPOW by benchmark 5.58, 7.01, 6.97.
"""

from ppow_jax.configs import base


def get_config():
    return base.paper("Qwen/Qwen3-8B", fsdp=4, data=-1)
