"""The `time` subcommand: autoregressive decoding at batch 1, ours against transformers' `generate`.

Both decode the same prompts greedily to the same number of tokens in float32, prompt reading
included, loading, compilation and a warm-up excluded. Each pair runs back to back, who is first
alternates, and both processes are bound to the same processors.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import parity_prompts

Decoder = Callable[[Sequence[int]], tuple[float, list[int]]]  # ids -> seconds, continuation


def bind(threads: int) -> None:
    """Gives this process and its children `threads` processors, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class TorchWorker:
    """transformers in the other environment, spoken to in lines of JSON."""

    def __init__(self, args: argparse.Namespace) -> None:
        script = pathlib.Path(__file__).with_name("transformers_parity.py")
        command = [args.torch_python, str(script), "torch-worker", "--gguf", str(args.gguf)]
        self.process = subprocess.Popen(
            [*command, "--threads", str(args.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
        )
        self.tokens = args.tokens
        self.versions = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the worker ended with status {self.process.wait()}")
        return json.loads(line)

    def __call__(self, ids: Sequence[int]) -> tuple[float, list[int]]:
        print(json.dumps({"ids": ids, "tokens": self.tokens}), file=self.process.stdin, flush=True)
        answer = self._answer()
        return answer["seconds"], answer["ids"]

    def close(self) -> None:
        """Ends the worker."""
        self.process.stdin.close()
        self.process.wait()


def our_decoder(target: object, params: dict, longest: int, tokens: int) -> Decoder:
    """The jitted loop without a drafter; every prompt is padded to `longest`."""
    import jax

    from ppow_jax.decode.loop import DecodeConfig, decode

    config = DecodeConfig(tokens, 0, 0.0, (-1,))
    keys = jax.random.split(jax.random.key(0), 1)

    def run(ids: Sequence[int]) -> tuple[float, list[int]]:
        began = time.perf_counter()
        prompt = np.zeros((1, longest), np.int32)
        prompt[0, : len(ids)] = ids
        out = decode(target, params, prompt, np.array([len(ids)], np.int32), keys, config)
        text = np.asarray(out.tokens)[0].tolist()
        return time.perf_counter() - began, text

    return run


def time_decoding(args: argparse.Namespace) -> int:
    """The `time` subcommand; status 1 if ours is slower."""
    bind(args.threads)
    import jax

    from ppow_jax.interop import gguf
    from ppow_jax.models import tokenizer
    from ppow_jax.models.target import Target

    config, params, metadata = gguf.load(str(args.gguf), "float32")
    text = tokenizer.from_gguf(metadata)
    prompts = [p for p in parity_prompts.read(args.prompts, None) if p.source != "edge cases"]
    prompts = [p for p in prompts if len(p.texts) == 1]
    ids = [text.first_turn(p.texts[0]) for p in prompts]
    picked = [ids[i] for i in parity_prompts.choose(prompts, list(map(len, ids)), args.count, args.longest)]
    worker = TorchWorker(args)
    ours = our_decoder(Target(config), jax.device_put(params), max(map(len, picked)), args.tokens)
    decoders: dict[str, Decoder] = {"ppow_jax": ours, "transformers": worker}
    for decoder in decoders.values():
        decoder(picked[0])
    print(f"load average {os.getloadavg()[0]:.1f} of {os.cpu_count()} processors at the start", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    equal, runs = 0, args.rounds * len(picked)
    for run in range(runs):
        texts = {}
        for name in list(decoders)[:: 1 if run % 2 else -1]:
            time.sleep(args.pause)  # threads of the other library stop spinning
            spent, texts[name] = decoders[name](picked[run % len(picked)])
            seconds[name].append(spent)
        equal += texts["ppow_jax"] == texts["transformers"]
    worker.close()
    return report(args, seconds, equal, worker.versions | {"jax": jax.__version__})


def report(args: argparse.Namespace, seconds: dict[str, list[float]], equal: int, versions: dict) -> int:
    """Prints the table; status 1 if the ratio of tokens/s is below 1."""
    runs = len(seconds["ppow_jax"])
    print(", ".join(f"{k} {v}" for k, v in versions.items()))
    print(f"{runs} pairs of {args.tokens} tokens, batch 1, {args.threads} threads, float32")
    print(f"{'':14}{'tokens/s':>10}{'median':>10}{'best':>10}")
    for name, spent in seconds.items():
        rates = (args.tokens * runs / sum(spent), args.tokens / statistics.median(spent))
        print(f"{name:14}" + "".join(f"{r:10.2f}" for r in (*rates, args.tokens / min(spent))))
    ours, theirs = seconds["ppow_jax"], seconds["transformers"]
    pairs = sorted(t / o for o, t in zip(ours, theirs, strict=True))
    ratio = sum(theirs) / sum(ours)
    print(
        f"ratio {ratio:.3f}; of pairs: median {statistics.median(pairs):.3f}, "
        f"{pairs[0]:.3f} to {pairs[-1]:.3f}; same text in {equal} of {runs}"
    )
    print("at least as fast" if ratio >= 1 else "VIOLATED: slower than transformers")
    return 0 if ratio >= 1 else 1
