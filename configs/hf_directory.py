"""Any model in a Hugging Face directory, on the builtin prompts: only its path is asked for.

  python -m ppow_jax.main --config=configs/hf_directory.py --workdir=DIR --config.target.path=DIRECTORY

The directory holds `config.json`, `*.safetensors`, `tokenizer.json` and a chat template, as transformers'
`save_pretrained` leaves them. A short run as in `quickstart`; for a drafter to use, give it prompts of the
kind that it will meet and more steps (`smollm2_135m` has the keys).
"""

from ppow_jax.configs import quickstart


def get_config():
    c = quickstart.get_config()
    c.target.path = ""  # --config.target.path
    c.drafter.kv_heads = 0  # as many as the target's
    return c
