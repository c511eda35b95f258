"""Qwen3-32B: the paper's run.

  python -m ppow_jax.main --config=configs/qwen3_32b.py --workdir=DIR \
    --config.respond.prompts=train=PROMPTS.jsonl \
    --config.evaluate.prompts=mt_bench=MT_BENCH.jsonl,humaneval=HUMANEVAL.jsonl,gsm8k=GSM8K.jsonl

`--config.target.path=DIRECTORY` takes the model from a local directory instead of the Hugging Face hub.

Published (temperature 0, mean over MT-Bench, HumanEval and GSM8K, acceptance length / speedup): EAGLE-3
5.99 / 3.81x, PPOW 6.44 / 3.92x.
"""

from ppow_jax.configs import base


def get_config():
    return base.paper("Qwen/Qwen3-32B", fsdp=4, tensor=2, data=-1)
