"""LLaMA-3.3-70B-Instruct: the paper's run.

  python -m ppow_jax.main --config=configs/llama33_70b.py --workdir=DIR \
    --config.respond.prompts=train=PROMPTS.jsonl \
    --config.evaluate.prompts=mt_bench=MT_BENCH.jsonl,humaneval=HUMANEVAL.jsonl,gsm8k=GSM8K.jsonl

`--config.target.path=DIRECTORY` takes the model from a local directory instead of the Hugging Face hub.

Published (temperature 0, mean over MT-Bench, HumanEval and GSM8K, acceptance length / speedup): EAGLE-3
5.94 / 4.15x, PPOW 6.29 / 4.36x.
"""

from ppow_jax.configs import base


def get_config():
    return base.paper("meta-llama/Llama-3.3-70B-Instruct", fsdp=4, tensor=4, data=-1)
