"""LLaMA-3.1-8B-Instruct: the paper's run.

  python -m ppow_jax.main --config=configs/llama31_8b.py --workdir=DIR \
    --config.respond.prompts=train=PROMPTS.jsonl \
    --config.evaluate.prompts=mt_bench=MT_BENCH.jsonl,humaneval=HUMANEVAL.jsonl,gsm8k=GSM8K.jsonl

`--config.target.path=DIRECTORY` takes the model from a local directory instead of the Hugging Face hub.

Published (temperature 0, mean over MT-Bench, HumanEval and GSM8K, acceptance length / speedup): EAGLE-3
6.09 / 3.41x, PPOW 6.40 / 3.46x; PPOW by benchmark 5.47, 7.23, 6.50.
"""

from ppow_jax.configs import base


def get_config():
    return base.paper("meta-llama/Llama-3.1-8B-Instruct", fsdp=4, data=-1)
