"""Vicuna-13B v1.5: the paper's run.

  python -m ppow_jax.main --config=configs/vicuna_13b.py --workdir=DIR \
    --config.respond.prompts=train=PROMPTS.jsonl \
    --config.evaluate.prompts=mt_bench=MT_BENCH.jsonl,humaneval=HUMANEVAL.jsonl,gsm8k=GSM8K.jsonl

`--config.target.path=DIRECTORY` takes the model from a local directory instead of the Hugging Face hub.

The paper has no figures for it; EAGLE-3 does. Where its files on the hub are no safetensors or have no
chat template, convert the weights (transformers: `save_pretrained`), write the template to
`chat_template.jinja` beside them, and give that directory as `--config.target.path`.
"""

from ppow_jax.configs import base


def get_config():
    return base.paper("lmsys/vicuna-13b-v1.5", fsdp=4, data=-1)
