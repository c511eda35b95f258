"""Compares ppow_jax with transformers + torch on the same GGUF file, in float32.

Two environments will do, one of them may serve as both:

    pip install torch==2.13.0 transformers gguf     # for `reference`
    pip install ppow_jax                            # for `compare`

    python transformers_parity.py reference --gguf MODEL.gguf --prompts A.jsonl B.jsonl \\
        --reference ref.npz
    python transformers_parity.py compare --gguf MODEL.gguf --reference ref.npz --report report.json

`reference` writes token ids of every prompt and, for a few of them, greedy continuations with the
logits and hidden states of each position (about 1 GB for 20 of them). `compare` recomputes all of
it with ppow_jax, prints a report and ends with status 1 if anything is out of bounds.
`make_golden.py` makes the small file for `tests/test_target_golden.py` in the same way.

About the tokenizer: transformers (5.23, `integrations/gguf/gguf_tokenizer_mapping.py`) looks up the
GGUF pre-tokenizer name in `GGUF_PRE_TOKENIZER_SPLITS`, which has no entry "smollm", and silently
keeps GPT-2's splitting. SmolLM first isolates every digit. No merge of SmolLM joins two digits, so
plain numbers come out right by luck, but whitespace before a digit does not: "a.\\n\\n1" must give
"ĊĊ", "1" and gives "Ċ", "Ċ", "1". The reference therefore keeps all of the converted tokenizer but
its pre-tokenizer, which it replaces with SmolLM's own definition. It also records how many prompts
the conversion gets wrong, and how many llama.cpp's expressions for "smollm" would give other ids.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

LOGIT_TOLERANCE = 2e-3  # largest absolute difference
TAP_TOLERANCE = 5e-5  # largest |difference| / |reference| over the positions of a tap, 2-norms
TAPS = (2, 15, 27)  # 0-based layers whose inputs the drafter sees, for 30 layers

# llama.cpp, `LLAMA_VOCAB_PRE_TYPE_SMOLLM`: applied one after the other.
LLAMA_CPP_SPLITS = (
    r"\p{N}",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
)

EDGE_TEXTS = (
    "1\n\n2\n \n3\t\t4   5 a  6\r\n\r\n7",
    "Zürich, Ελλάδα, 日本語, עברית, हिन्दी, emoji 🎉👩‍👩‍👧, combining e\u0301, NBSP\u00a0x, ²³½Ⅷ٣४",
    "def f(x):\n    return {'a': x[0] + 0x1F, \"b\": 1e-9}\n\n\n\t# 100%\n",
    "  leading and trailing  \n\n",
    "<|im_start|>system\nspecial <|im_end|> tokens <repo_name> in <|endoftext|>text",
    "it's we'll I'D don''t 'twas 3's\n5'10\"",
    "x" * 300 + " " * 50 + "9" * 40,
    "\u200b\ufeff\x07\u2028end",
)


class Prompt(NamedTuple):
    """A first user turn and the name of the file that it came from."""

    source: str
    text: str


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_prompts(files: Sequence[pathlib.Path], limit: int | None) -> list[Prompt]:
    """The edge cases, then at most `limit` evenly spaced first turns of each JSONL file."""
    prompts = [Prompt("edge cases", text) for text in EDGE_TEXTS]
    for file in files:
        with file.open(encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.strip()]
        count = min(limit or len(rows), len(rows))
        picked = (rows[i * len(rows) // count] for i in range(count))
        prompts += [Prompt(file.name, row["turns"][0]) for row in picked]
    return prompts


# ------------------------------------------------------------------ torch and transformers


class Reference:
    """transformers' model and tokenizers of a GGUF file."""

    def __init__(self, gguf_file: pathlib.Path) -> None:
        import gguf
        import torch
        from tokenizers import Regex, Tokenizer, pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_grad_enabled(False)
        where = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
        self.torch = torch
        self.template = AutoTokenizer.from_pretrained(**where)
        self.model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, attn_implementation="eager"
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

    def ids(self, text: str, core: str = "reference") -> list[int]:
        """Ids of the chat template around a first user turn."""
        messages = [{"role": "user", "content": text}]
        rendered = self.template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.cores[core].encode(rendered, add_special_tokens=False).ids

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The greedy continuation, by transformers' own `generate`."""
        prompt = self.torch.tensor([list(ids)])
        out = self.model.generate(
            prompt,
            attention_mask=self.torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
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


def choose(prompts: Sequence[Prompt], ids: Sequence[list[int]], count: int, longest: int) -> list:
    """Indices of `count` prompts of at most `longest` ids, each file in turn, spread evenly."""
    by_source: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if len(ids[i]) <= longest:
            by_source.setdefault(prompt.source, []).append(i)
    groups = list(by_source.values())
    turns = -(-count // len(groups))
    order = [g[t * len(g) // turns] for t in range(turns) for g in groups]
    return list(dict.fromkeys(order))[:count]


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Adds one member to an open .npz file, so that not all of them are in memory at once."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array(f, np.ascontiguousarray(array))


def reference(args: argparse.Namespace) -> int:
    """The `reference` subcommand."""
    model = Reference(args.gguf)
    prompts = read_prompts(args.prompts, args.limit)
    ids = [model.ids(p.text) for p in prompts]
    differing = {
        core: sum(model.ids(p.text, core) != i for p, i in zip(prompts, ids, strict=True))
        for core in model.cores
        if core != "reference"
    }
    print(f"{len(prompts)} prompts; ids differ: {differing}", flush=True)
    picked = choose(prompts, ids, args.continuations, args.longest)
    with zipfile.ZipFile(args.reference, "w") as archive:
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
    return 0


# ------------------------------------------------------------------ ppow_jax


def pad(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """int32 `[B, length]`, zeros on the right."""
    out = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def ours_one_by_one(
    target: Any, params: dict, texts: Sequence[list[int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Our logits `[T, V]` and taps `[T, 3, D]` of each text, one compilation for all."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def forward(params: dict, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.arange(tokens_BxT.shape[1])[None, None]
        out = target.apply({"params": params}, tokens_BxT[:, None], positions)
        logits = target.apply({"params": params}, out.hidden, method=type(target).logits)
        taps = out.taps[0, 0].reshape(tokens_BxT.shape[1], len(TAPS), -1)
        return logits[0, 0], taps

    longest = max(map(len, texts))
    for text in texts:
        logits, taps = forward(params, pad([text], longest))
        yield np.asarray(logits)[: len(text)], np.asarray(taps)[: len(text)]


def compare_texts(target: Any, params: dict, archive: Any, texts: Sequence[list[int]]) -> dict[str, Any]:
    """Logits, argmax and taps at every position of prompts and continuations."""
    difference, disagreements, positions, gap = 0.0, 0, 0, np.inf
    taps_relative = np.zeros(len(TAPS))
    for n, (logits, taps) in enumerate(ours_one_by_one(target, params, texts)):
        want, want_taps = archive[f"logits_{n}"], archive[f"taps_{n}"]
        difference = max(difference, float(np.abs(logits - want).max()))
        disagreements += int((logits.argmax(-1) != want.argmax(-1)).sum())
        positions += len(want)
        second, first = np.partition(want, -2, axis=-1)[:, -2:].T
        gap = min(gap, float((first - second).min()))
        error = np.linalg.norm(taps - want_taps, axis=-1) / np.linalg.norm(want_taps, axis=-1)
        taps_relative = np.maximum(taps_relative, error.max(0))
    return {
        "positions": positions,
        "logits_max_abs_difference": difference,
        "argmax_disagreements": disagreements,
        "smallest_top2_gap": gap,
        "taps_max_relative_difference": dict(zip(map(str, TAPS), taps_relative, strict=True)),
    }


def compare_decoding(
    target: Any, params: dict, stop_ids: tuple[int, ...], prompts: list, continuations: list
) -> dict[str, int]:
    """How many continuations our decoding loop repeats, without stopping and with."""
    import jax

    from ppow_jax.decode.loop import DecodeConfig, decode

    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = pad(prompts, int(lengths.max()))
    keys = jax.random.split(jax.random.key(0), len(prompts))
    result = {}
    for name, stops in (("unstopped", (-1,)), ("stopped", stop_ids)):
        config = DecodeConfig(len(continuations[0]), 0, 0.0, stops)
        out = decode(target, params, tokens, lengths, keys, config)
        got = [np.asarray(t)[:c].tolist() for t, c in zip(out.tokens, out.count, strict=True)]
        want = [c[: next((i + 1 for i, t in enumerate(c) if t in stops), None)] for c in continuations]
        result[f"continuations_equal_{name}"] = sum(map(list.__eq__, got, want))
    return result


def violations(report: dict[str, Any]) -> list[str]:
    """What of a report is out of bounds, in words."""
    n = report["continuations"]
    bounds = {
        "token ids": report["ids_differing"] == 0,
        "logits": report["logits_max_abs_difference"] <= LOGIT_TOLERANCE,
        "argmax": report["argmax_disagreements"] == 0,
        "taps": max(report["taps_max_relative_difference"].values()) <= TAP_TOLERANCE,
        "decoding loop": report["continuations_equal_unstopped"] == n,
        "decoding loop with stops": report["continuations_equal_stopped"] == n,
    }
    return [name for name, met in bounds.items() if not met]


def compare(args: argparse.Namespace) -> int:
    """The `compare` subcommand."""
    import jax

    from ppow_jax.interop import gguf
    from ppow_jax.models import tokenizer
    from ppow_jax.models.target import Target

    archive = np.load(args.reference)
    meta = json.loads(archive["meta"].tobytes())
    if meta["gguf_sha256"] != sha256(args.gguf):
        print(f"{args.gguf} is not the file that the reference was made from", file=sys.stderr)
        return 1
    config, params, metadata = gguf.load(str(args.gguf), "float32")
    if config.taps != TAPS:
        print(f"taps {config.taps}, but the reference has {TAPS}", file=sys.stderr)
        return 1
    target, text, params = Target(config), tokenizer.from_gguf(metadata), jax.device_put(params)
    prompts = [meta["prompts"][c["prompt"]][2] for c in meta["continuations"]]
    continuations = [c["ids"] for c in meta["continuations"]]
    whole = [p + c for p, c in zip(prompts, continuations, strict=True)]
    sources = [source for source, _, _ in meta["prompts"]]
    report = {
        "gguf_sha256": meta["gguf_sha256"],
        "versions": meta["versions"] | {"jax": jax.__version__},
        "prompts": len(sources),
        "prompts_by_file": {s: sources.count(s) for s in dict.fromkeys(sources)},
        "ids_differing": sum(text.first_turn(t) != ids for _, t, ids in meta["prompts"]),
        "reference_ids_differing": meta["ids_differing_from_reference"],
        "continuations": len(continuations),
        "tokens_each": len(continuations[0]),
        "reference_equal_to_own_forward": meta["continuations_equal_to_own_forward"],
        **compare_texts(target, params, archive, whole),
        **compare_decoding(target, params, text.stop_ids, prompts, continuations),
    }
    print(json.dumps(report, indent=1))
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n")
    failed = violations(report)
    print(f"VIOLATED: {', '.join(failed)}" if failed else "all within bounds")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--gguf", type=pathlib.Path, required=True, help="the GGUF file")
        return sub

    ref = command("reference", reference, "torch environment: write the reference")
    ref.add_argument("--prompts", type=pathlib.Path, nargs="+", required=True, help="JSONL files")
    ref.add_argument("--reference", type=pathlib.Path, required=True, help=".npz file to write")
    ref.add_argument("--limit", type=int, help="rows a file, evenly spaced (default: all)")
    ref.add_argument("--continuations", type=int, default=20, help="default: %(default)s")
    ref.add_argument("--tokens", type=int, default=128, help="of each (default: %(default)s)")
    ref.add_argument("--longest", type=int, default=192, help="prompt ids (default: %(default)s)")
    cmp = command("compare", compare, "JAX environment: check ppow_jax against a reference")
    cmp.add_argument("--reference", type=pathlib.Path, required=True, help="from `reference`")
    cmp.add_argument("--report", type=pathlib.Path, help="JSON file to write the report to")
    return top


if __name__ == "__main__":
    arguments = parser().parse_args()
    sys.exit(arguments.run(arguments))
