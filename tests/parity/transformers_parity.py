"""Compares ppow_jax with transformers + torch on the same GGUF file, in float32.

Two environments will do, one of them may serve as both:

    pip install torch==2.13.0 transformers accelerate gguf     # for `reference`
    pip install ppow_jax                                       # for `compare`

    python transformers_parity.py reference --gguf MODEL.gguf --prompts A.jsonl B.jsonl \\
        --reference ref.npz
    python transformers_parity.py compare --gguf MODEL.gguf --reference ref.npz --report report.json

`reference` writes token ids of every prompt and, for a few of them, greedy continuations with the
logits and hidden states of each position (about 1 GB for 20 of them). `compare` recomputes all of
it with ppow_jax, prints a table and ends with status 1 if anything is out of bounds. `python -m
ppow_jax.bench decode` sets the two against each other.
`make_golden.py` makes the small file for `tests/test_target_golden.py` in the same way.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch_reference
from torch_reference import TAPS, sha256

PROMPTS = 1000  # fewer prove too little
CONTINUATIONS, TOKENS = 20, 128
LOGIT_TOLERANCE = 2e-3  # largest absolute difference
TAP_TOLERANCE = 5e-5  # largest |difference| / |reference| over the positions of a tap, 2-norms


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
        config = DecodeConfig(len(continuations[0]), stops)
        out = decode(target, params, tokens, lengths, keys, config)
        got = [np.asarray(t)[:c].tolist() for t, c in zip(out.tokens, out.emitted, strict=True)]
        want = [c[: next((i + 1 for i, t in enumerate(c) if t in stops), None)] for c in continuations]
        result[f"continuations_equal_{name}"] = sum(map(list.__eq__, got, want))
    return result


class Check(NamedTuple):
    """A line of the table."""

    name: str
    found: str
    bound: str
    met: bool


def checks(report: dict[str, Any]) -> list[Check]:
    """What a report says about each bound."""
    n, prompts, positions = report["continuations"], report["prompts"], report["positions"]
    same_ids, same_argmax = prompts - report["ids_differing"], positions - report["argmax_disagreements"]
    difference, taps = report["logits_max_abs_difference"], report["taps_max_relative_difference"]
    free, stopped = report["continuations_equal_unstopped"], report["continuations_equal_stopped"]
    enough = n >= CONTINUATIONS and report["tokens_each"] >= TOKENS
    size = f"{n} of {report['tokens_each']} tokens"
    return [
        Check("prompts", f"{prompts}", f"at least {PROMPTS}", prompts >= PROMPTS),
        Check("  same token ids", f"{same_ids}", "all", same_ids == prompts),
        Check("continuations", size, f"at least {CONTINUATIONS} of {TOKENS}", enough),
        Check("  same ids from our loop", f"{free}", "all", free == n),
        Check("  same ids, with stops", f"{stopped}", "all", stopped == n),
        Check("positions", f"{positions}", "", True),
        Check("  same argmax", f"{same_argmax}", "all", same_argmax == positions),
        Check(
            "  largest logit difference",
            f"{difference:.2e}",
            f"{LOGIT_TOLERANCE:g}",
            difference <= LOGIT_TOLERANCE,
        ),
        *(
            Check(f"  tap {k}, largest |d|/|x|", f"{v:.2e}", f"{TAP_TOLERANCE:g}", v <= TAP_TOLERANCE)
            for k, v in taps.items()
        ),
    ]


def show(report: dict[str, Any]) -> bool:
    """Prints the table; whether every bound is met."""
    lines = checks(report)
    print(", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    print(f"{'':28}{'found':>18}  bound")
    for line in lines:
        print(f"{line.name:28}{line.found:>18}  {line.bound}" + ("" if line.met else "  VIOLATED"))
    print(f"other tokenizers against the reference, prompts that differ: {report['reference_ids_differing']}")
    met = all(line.met for line in lines)
    print("all within bounds" if met else "VIOLATED")
    return met


def our_ids(text: Any, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Our ids of a conversation: turn by turn, as stages build it, and rendered as a whole."""
    from ppow_jax.data.conversations import Conversation
    from ppow_jax.data.prompt import Prompt

    roles = ("user", "assistant")
    talk = Conversation(Prompt("", "", tuple(texts[::2])))
    for turn, answer in enumerate([*texts[1::2], None]):
        talk.ask(talk.question(text, turn))
        if answer is not None:
            talk.answer([*text.encode(answer), text.stop_ids[0]])
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]
    return talk.tokens, text.encode(text.render(messages))


def compare(args: argparse.Namespace) -> int:
    """The `compare` subcommand."""
    import jax

    from ppow_jax.models.target import Target
    from ppow_jax.targets import gguf
    from ppow_jax.targets.tokenizer import with_stops
    from ppow_jax.targets.tokenizer_gguf import from_gguf

    if args.report:
        args.report.unlink(missing_ok=True)  # so that no older one is taken for this run's
    archive = np.load(args.reference)
    meta = json.loads(archive["meta"].tobytes())
    if meta["gguf_sha256"] != sha256(args.gguf):
        print(f"{args.gguf} is not the file that the reference was made from", file=sys.stderr)
        return 1
    config, params, metadata = gguf.load(str(args.gguf), "float32")
    if config.taps != TAPS:
        print(f"taps {config.taps}, but the reference has {TAPS}", file=sys.stderr)
        return 1
    target, text, params = Target(config), with_stops(from_gguf(metadata)), jax.device_put(params)
    prompts = [meta["prompts"][c["prompt"]][2] for c in meta["continuations"]]
    continuations = [c["ids"] for c in meta["continuations"]]
    whole = [p + c for p, c in zip(prompts, continuations, strict=True)]
    sources = [source for source, _, _ in meta["prompts"]]
    report = {
        "gguf_sha256": meta["gguf_sha256"],
        "versions": meta["versions"] | {"jax": jax.__version__},
        "prompts": len(sources),
        "prompts_by_file": {s: sources.count(s) for s in dict.fromkeys(sources)},
        "ids_differing": sum(our_ids(text, t) != (ids, ids) for _, t, ids in meta["prompts"]),
        "reference_ids_differing": meta["ids_differing_from_reference"],
        "continuations": len(continuations),
        "tokens_each": len(continuations[0]),
        "reference_equal_to_own_forward": meta["continuations_equal_to_own_forward"],
        **compare_texts(target, params, archive, whole),
        **compare_decoding(target, params, text.stop_ids, prompts, continuations),
    }
    if args.report:
        args.report.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if show(report) else 1


def parser() -> argparse.ArgumentParser:
    """Command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="{reference,compare}")

    def command(name: str, run: Any, **words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, **words)
        sub.set_defaults(run=run)
        sub.add_argument("--gguf", type=pathlib.Path, required=True, help="the GGUF file")
        return sub

    ref = command("reference", torch_reference.write_reference, help="torch environment: write the reference")
    ref.add_argument("--prompts", type=pathlib.Path, nargs="+", required=True, help="JSONL files")
    ref.add_argument("--reference", type=pathlib.Path, required=True, help=".npz file to write")
    ref.add_argument("--limit", type=int, help="rows a file, evenly spaced (default: all)")
    ref.add_argument("--continuations", type=int, default=CONTINUATIONS, help="default: %(default)s")
    ref.add_argument("--tokens", type=int, default=TOKENS, help="of each (default: %(default)s)")
    ref.add_argument("--longest", type=int, default=192, help="prompt ids (default: %(default)s)")
    cmp = command("compare", compare, help="JAX environment: check ppow_jax against a reference")
    cmp.add_argument("--reference", type=pathlib.Path, required=True, help="from `reference`")
    cmp.add_argument("--report", type=pathlib.Path, help="JSON file to write the report to")
    return top


if __name__ == "__main__":
    arguments = parser().parse_args()
    sys.exit(arguments.run(arguments))
