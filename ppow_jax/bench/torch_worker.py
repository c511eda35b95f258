"""Decodes with transformers on torch: a process of its own, spoken to in lines of JSON.

    python torch_worker.py --model MODEL --threads 2       # a GGUF file or a Hugging Face directory

reads `{"ids": [...], "tokens": n, "stops": [...], "lookup": k}` and answers `{"seconds": s, "ids": [...]}`:
the ids that greedy decoding adds, with k drafted tokens of prompt lookup unless that is 0. It imports
nothing of ours, so that the two libraries may live in different environments.
"""

import argparse
import json
import pathlib
import sys
import time


def main() -> None:
    """Answers until its input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print stays out of the way
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    where = {"pretrained_model_name_or_path": args.model}
    if args.model.is_file():
        where = {"pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = torch.tensor([asked["ids"]])
        model.generation_config.eos_token_id = asked["stops"]
        lookup = {"prompt_lookup_num_tokens": asked["lookup"]} if asked["lookup"] else {}
        began = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked["tokens"],
            do_sample=False,
            pad_token_id=asked["stops"][0],
            **lookup,
        )
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "ids": out[0, ids.shape[1] :].tolist()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
