"""Writes tests/golden/smollm2.json: what transformers + torch say about short prompts of our own.

    pip install torch==2.13.0 transformers accelerate gguf
    python make_golden.py --gguf MODEL.gguf --report report.json --out ../golden/smollm2.json

`report.json` is what `transformers_parity.py compare --report` wrote; it is copied into the golden
file, so that the small check carries the figures of the large one.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np
from parity_prompts import EDGE_TEXTS, Prompt, conversations
from torch_reference import TAPS, Reference

TEXTS = (
    "What is the capital of Japan?",
    "A farmer has 17 sheep and buys 25 more.\n\n3 of them run away. How many are left?",
    "Write a Python function `is_even(n)` that returns True if n % 2 == 0.",
    "Traduis en français : « Où est la bibliothèque ? » 🙂",
    "List:\n  1. red\n  2. green\n\t3. blue\n\n4 is missing. Add it.",
    "Tell me a very short story about a clock that runs backwards.",
)
FOLLOW_UPS = (  # conversations of several turns, whose ids are compared and nothing else
    ("Name a river.", "Is it longer than 1,000 km?", "And in miles?\n\n- 1 line only"),
    ("Write `sum_to(n)` in Python.", "Now without a loop:\n\n    def sum_to(n):\n        ..."),
    EDGE_TEXTS,
)
TOKENS = 32
DIMENSIONS = (0, 100, 191, 314, 383, 575)  # of each tap


def position_values(position: int, logits_V: np.ndarray, taps_3xD: np.ndarray) -> dict[str, Any]:
    """Golden values of one position."""
    row = logits_V.astype(np.float64)
    top = np.argsort(-row)[:5]
    return {
        "position": position,
        "top_ids": top.tolist(),
        "top_logits": row[top].round(5).tolist(),
        "logsumexp": round(float(np.log(np.exp(row - row.max()).sum()) + row.max()), 5),
        "taps": [[float(f"{v:.7g}") for v in tap[list(DIMENSIONS)]] for tap in taps_3xD],
        "tap_norms": [float(f"{np.linalg.norm(tap):.7g}") for tap in taps_3xD],
    }


def case(model: Reference, text: str) -> dict[str, Any]:
    """Golden values of one prompt and its greedy continuation."""
    prompt = model.ids(Prompt("golden", (text,)))
    continuation = model.greedy(prompt, TOKENS)
    logits, taps = model.forward(prompt + continuation)
    last = len(prompt) - 1
    positions = (0, 3, last // 2, last, last + TOKENS // 2, last + TOKENS)
    return {
        "text": text,
        "ids": prompt,
        "continuation": continuation,
        "positions": [position_values(p, logits[p], taps[p]) for p in positions],
    }


def conversation(model: Reference, turns: tuple[str, ...], number: int) -> dict[str, Any]:
    """Ids of a conversation of several turns."""
    prompt = conversations("golden", turns, number)[-1]
    return {"texts": prompt.texts, "ids": model.ids(prompt)}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=pathlib.Path, required=True, help="the GGUF file")
    parser.add_argument("--report", type=pathlib.Path, required=True, help="from `compare`")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    model = Reference(args.gguf)
    content = {
        "about": "made by tests/parity/make_golden.py: float32, transformers on torch",
        "versions": model.versions(),
        "comparison": json.loads(args.report.read_text(encoding="utf-8")),
        "tap_layers": TAPS,
        "tap_dimensions": DIMENSIONS,
        "conversations": [
            *(conversation(model, (text,), 0) for text in EDGE_TEXTS),
            *(conversation(model, turns, i) for i, turns in enumerate(FOLLOW_UPS)),
        ],
        "cases": [case(model, text) for text in TEXTS],
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
