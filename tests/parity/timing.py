"""The `time` subcommand: autoregressive decoding at batch 1, ours against transformers' `generate`.

Both decode the same prompts greedily to the same number of tokens in float32, prompt reading
included, loading, compilation and a warm-up excluded. Each pair runs back to back, who is first
alternates, and both processes are bound to the same processors.

A busy machine decides such a race: where another process takes one of two processors, the threads of
torch wait for each other at every matrix product and it falls behind by any factor. So there is no
verdict if the load average exceeds 1 at the start, and the table has the processor time per second
(about the number of threads on a quiet machine) and per token.
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
from typing import NamedTuple

import numpy as np
import parity_prompts

BUSY = 1.0  # load average above which a race decides nothing


class Run(NamedTuple):
    """One decoded prompt: seconds by the clock, seconds of processor time, ids."""

    seconds: float
    processor: float
    ids: list[int]


Decoder = Callable[[Sequence[int]], Run]


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

    def __call__(self, ids: Sequence[int]) -> Run:
        print(json.dumps({"ids": ids, "tokens": self.tokens}), file=self.process.stdin, flush=True)
        return Run(**self._answer())

    def close(self) -> None:
        """Ends the worker."""
        self.process.stdin.close()
        self.process.wait()


def our_decoder(target: object, params: dict, longest: int, tokens: int) -> Decoder:
    """The jitted loop without a drafter; every prompt is padded to `longest`."""
    import jax

    from ppow_jax.decode.loop import DecodeConfig, decode

    config = DecodeConfig(tokens, (-1,))
    keys = jax.random.split(jax.random.key(0), 1)

    def run(ids: Sequence[int]) -> Run:
        began, worked = time.perf_counter(), time.process_time()
        prompt = np.zeros((1, longest), np.int32)
        prompt[0, : len(ids)] = ids
        out = decode(target, params, prompt, np.array([len(ids)], np.int32), keys, config)
        text = np.asarray(out.tokens)[0].tolist()
        return Run(time.perf_counter() - began, time.process_time() - worked, text)

    return run


def time_decoding(args: argparse.Namespace) -> int:
    """The `time` subcommand; status 1 if ours is slower, 2 if the machine is too busy to tell."""
    load = os.getloadavg()[0]
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
    runs: dict[str, list[Run]] = {name: [] for name in decoders}
    for n in range(args.rounds * len(picked)):
        for name in list(decoders)[:: 1 if n % 2 else -1]:
            time.sleep(args.pause)  # threads of the other library stop spinning
            runs[name].append(decoders[name](picked[n % len(picked)]))
    worker.close()
    print(", ".join(f"{k} {v}" for k, v in (worker.versions | {"jax": jax.__version__}).items()))
    return report(args, runs, load)


def report(args: argparse.Namespace, runs: dict[str, list[Run]], load: float) -> int:
    """Prints the table; status 1 if the ratio of tokens/s is below 1, 2 if nobody can tell."""
    ours, theirs = runs["ppow_jax"], runs["transformers"]
    print(f"{len(ours)} pairs of {args.tokens} tokens, batch 1, {args.threads} threads; load {load:.1f}")
    print(f"{'tokens/s':14}{'mean':>8}{'median':>8}{'best':>8}{'CPU s/s':>9}{'CPU ms/token':>14}")
    for name, of in runs.items():
        spent, worked = sum(r.seconds for r in of), sum(r.processor for r in of)
        middle, least = statistics.median(r.seconds for r in of), min(r.seconds for r in of)
        rates = (args.tokens * len(of) / spent, args.tokens / middle, args.tokens / least)
        cost = 1000 * worked / args.tokens / len(of)
        print(f"{name:14}" + "".join(f"{r:8.2f}" for r in rates) + f"{worked / spent:9.2f}{cost:14.1f}")
    pairs = sorted(t.seconds / o.seconds for o, t in zip(ours, theirs, strict=True))
    ratio = sum(t.seconds for t in theirs) / sum(o.seconds for o in ours)
    equal = sum(o.ids == t.ids for o, t in zip(ours, theirs, strict=True))
    print(
        f"ratio {ratio:.3f}; of pairs: median {statistics.median(pairs):.3f}, "
        f"{pairs[0]:.3f} to {pairs[-1]:.3f}; same text in {equal} of {len(ours)}"
    )
    if load > BUSY:
        print("NO VERDICT: the machine was busy")
        return 2
    print("at least as fast" if ratio >= 1 else "VIOLATED: slower than transformers")
    return 0 if ratio >= 1 else 1
