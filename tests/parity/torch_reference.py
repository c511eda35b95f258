"""The torch side: what transformers says about a GGUF file.

About the tokenizer: transformers (5.24, `integrations/gguf/gguf_tokenizer_mapping.py`) looks up the
GGUF pre-tokenizer name in `GGUF_PRE_TOKENIZER_SPLITS`, which has no entry "smollm", and silently
keeps GPT-2's splitting. SmolLM first isolates every digit. No merge of SmolLM joins two digits, so
plain numbers come out right by luck, but whitespace before a digit does not: "a.\\n\\n1" must give
"ĊĊ", "1" and gives "Ċ", "Ċ", "1". The reference therefore keeps all of the converted tokenizer but
its pre-tokenizer, which it replaces with SmolLM's own definition; " ½" is the other case, which must
give "Ġ", "Â½" and gives "ĠÂ", "½". It also records how many prompts the conversion gets wrong, how
many of these hold neither case, and how many llama.cpp's expressions for "smollm" give other ids.
"""

import argparse
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import parity_prompts
from parity_prompts import Prompt

TAPS = (2, 15, 27)  # 0-based layers whose inputs the drafter sees, for 30 layers

# llama.cpp, `LLAMA_VOCAB_PRE_TYPE_SMOLLM`: applied one after the other.
LLAMA_CPP_SPLITS = (
    r"\p{N}",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
)


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Reference:
    """transformers' model and tokenizers of a GGUF file, in float32."""

    def __init__(self, gguf_file: pathlib.Path, attention: str = "eager") -> None:
        import gguf
        import torch
        from tokenizers import Regex, Tokenizer, pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_grad_enabled(False)
        where = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
        self.torch = torch
        self.template = AutoTokenizer.from_pretrained(**where)
        self.model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, attn_implementation=attention
        ).eval()
        self.model.generation_config.eos_token_id = None  # always the full count of tokens
        pre = gguf.GGUFReader(gguf_file).fields["tokenizer.ggml.pre"].contents()
        converted = self.template.backend_tokenizer

        def with_steps(*steps: Any) -> Tokenizer:
            core = Tokenizer.from_str(converted.to_str())
            core.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
            return core

        self.cores = {"reference": converted, "as converted": converted}
        if pre == "smollm":
            self.cores["reference"] = with_steps(
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            )
            self.cores["llama.cpp"] = with_steps(
                *(pre_tokenizers.Split(Regex(s), "isolated") for s in LLAMA_CPP_SPLITS),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            )

    def render(self, prompt: Prompt) -> str:
        """The conversation as text, up to where the assistant's turn begins."""
        return self.template.apply_chat_template(
            prompt.messages(), tokenize=False, add_generation_prompt=True
        )

    def ids(self, prompt: Prompt, core: str = "reference") -> list[int]:
        """Ids of a conversation, the chat template around it."""
        return self.cores[core].encode(self.render(prompt), add_special_tokens=False).ids

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The greedy continuation, by transformers' own `generate` with its KV cache."""
        prompt = self.torch.tensor([list(ids)])
        out = self.model.generate(
            prompt,
            attention_mask=self.torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
        )
        return out[0, len(ids) :].tolist()

    def forward(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits `[T, V]` and taps `[T, 3, D]` of a text, in one pass without a cache."""
        out = self.model(self.torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
        taps = self.torch.stack([out.hidden_states[i][0] for i in TAPS], 1)
        return out.logits[0].numpy(), taps.numpy()

    def versions(self) -> dict[str, str]:
        """Of the libraries that made the reference."""
        import tokenizers
        import transformers

        modules = (self.torch, transformers, tokenizers)
        return {m.__name__: m.__version__ for m in modules} | {"numpy": np.__version__}


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Adds one member to an open .npz file, so that not all of them are in memory at once."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array(f, np.ascontiguousarray(array))


def explained(text: str) -> bool:
    """Whether a text holds what the converted tokenizer gets wrong; see the module's docstring."""
    triples = zip(" " + text, text, text[1:], strict=False)
    spaced = [(a.isspace(), c) for a, b, c in triples if b.isspace() and c.isnumeric()]
    return any(two_spaces or not c.isdecimal() for two_spaces, c in spaced)


def differing_ids(model: Reference, prompts: Sequence[Prompt], ids: Sequence[list[int]]) -> dict[str, int]:
    """How many prompts get other ids from the tokenizers beside the reference."""
    counts = {}
    for core in model.cores.keys() - {"reference"}:
        odd = [p for p, i in zip(prompts, ids, strict=True) if model.ids(p, core) != i]
        counts[core] = len(odd)
        if core == "as converted":
            counts["as converted, unexplained"] = sum(not explained(model.render(p)) for p in odd)
    return dict(sorted(counts.items()))


def write_reference(args: argparse.Namespace) -> int:
    """The `reference` subcommand."""
    model = Reference(args.gguf)
    prompts = parity_prompts.read(args.prompts, args.limit)
    ids = [model.ids(p) for p in prompts]
    differing = differing_ids(model, prompts, ids)
    print(f"{len(prompts)} prompts; other tokenizers differ: {differing}", flush=True)
    picked = parity_prompts.choose(prompts, list(map(len, ids)), args.continuations, args.longest)
    unfinished = args.reference.with_suffix(".part")
    with zipfile.ZipFile(unfinished, "w") as archive:
        continuations, self_consistent = [], 0
        for n, i in enumerate(picked):
            text = model.greedy(ids[i], args.tokens)
            logits, taps = model.forward(ids[i] + text)
            self_consistent += logits[len(ids[i]) - 1 : -1].argmax(-1).tolist() == text
            continuations.append({"prompt": i, "ids": text})
            write_array(archive, f"logits_{n}", logits)
            write_array(archive, f"taps_{n}", taps)
            print(f"  {n + 1}/{len(picked)}: {prompts[i].source}, {len(logits)} ids", flush=True)
        meta = {
            "gguf_sha256": sha256(args.gguf),
            "versions": model.versions(),
            "prompts": [[*p, i] for p, i in zip(prompts, ids, strict=True)],
            "ids_differing_from_reference": differing,
            "continuations": continuations,
            "continuations_equal_to_own_forward": self_consistent,
        }
        write_array(archive, "meta", np.frombuffer(json.dumps(meta).encode(), np.uint8))
    unfinished.replace(args.reference)
    return 0
