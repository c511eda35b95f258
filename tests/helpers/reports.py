"""A report made by hand, as report.json has it."""

import copy
from typing import Any

BENCHMARK = {
    "tau": 2.25, "tau_ci95": [2.0, 2.5], "accepted_per_position": [0.75, 0.5], "rounds": 40,
    "tokens": 90, "tokens_per_s": 30.0, "tokens_per_s_autoregressive": 20.0, "speedup": 1.5,
    "identical_outputs": 7, "prompts": 8, "decode_tau": 1.75,
}  # fmt: skip
GAIN = {"tau": 0.125, "ci95": [0.025, 0.25], "speedup": -0.5, "speedup_ci95": [-0.75, 0.25]}
NONE = {"tau": -0.0625, "ci95": [-0.25, 0.125], "speedup": 0.0, "speedup_ci95": [0.0, 0.0]}


def drafter(objective: str, lineage: list[str], seed: int = 0) -> dict[str, Any]:
    """A drafter of two benchmarks."""
    start = "fresh" if len(lineage) == 1 else lineage[-2]
    return {
        "params_sha256": "0123456789abcdef", "steps": 30, "seconds": 75.0, "objective": objective,
        "start": start, "seed": seed, "batch_size": 4, "lineage": lineage,
        "benchmarks": {"chat": BENCHMARK, "maths": BENCHMARK | {"tau": 3.25, "speedup": 2.5}},
        "mean": {"tau": 2.75, "tau_ci95": [2.5, 3.0], "speedup": 2.0},
    }  # fmt: skip


def report(control: str | None = None, **changes: Any) -> dict[str, Any]:
    """Of the drafters `supervise` and `ppow`; with a control, what the other one differs by."""
    drafters = {
        "supervise": drafter("supervised", ["supervise"]),
        "ppow": drafter("ppow", ["supervise", "ppow"]),
    }
    if control:
        other = drafters["ppow" if control == "supervise" else "supervise"]
        other["benchmarks"] = {b: r | {"difference": GAIN} for b, r in other["benchmarks"].items()}
        other["benchmarks"]["maths"]["difference"] = NONE
        other["mean"]["difference"] = GAIN
    made = {
        "schema": 2,
        "target": {"path": "markov:0", "fingerprint": "0" * 64, "dtype": "float32"},
        "device": {"platform": "cpu", "kind": "abacus", "count": 1, "cores": 2, "jax": "0.1"},
        "window": 3, "tree": None, "decode_shape": "chain:2", "prediction": None,
        "decode_sampling": {"temperature": 0.7, "top_k": 0, "top_p": 0.9}, "gamma_measured": 0.1234,
        "control": control, "drafters": drafters, "runs": {}, "stages": {},
    }  # fmt: skip
    return copy.deepcopy(made | changes)


def windows(prompts: int = 5, **changes: Any) -> dict[str, Any]:
    """Windows of so many prompts: one is cut, one round ends the text with an accepted token."""
    rounds = [
        {"drafted": 3, "count": 1, "accepted": "one", "refused": " two", "dropped": " three", "own": " 2"},
        {"drafted": 2, "count": 2, "accepted": " four five", "refused": "", "dropped": "", "own": ""},
    ]
    sample = {"benchmark": "chat", "question": "why\n\nnot?", "first": "So", "rounds": rounds, "cut": True}
    samples = [sample | {"prompt": f"c{i}"} | changes for i in range(prompts)]
    return {"drafter": "ppow", "samples": samples}
