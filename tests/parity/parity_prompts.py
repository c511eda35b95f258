"""Conversations that both libraries are asked about. Needs neither torch nor JAX."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

EDGE_TEXTS = (
    "1\n\n2\n \n3\t\t4   5 a  6\r\n\r\n7",
    "Zürich, Ελλάδα, 日本語, עברית, हिन्दी, emoji 🎉👩‍👩‍👧, combining e\u0301, NBSP\u00a0x, ²³½Ⅷ٣४",
    "def f(x):\n    return {'a': x[0] + 0x1F, \"b\": 1e-9}\n\n\n\t# 100%\n",
    "  leading and trailing  \n\n",
    "<|im_start|>system\nspecial <|im_end|> tokens <repo_name> in <|endoftext|>text",
    "it's we'll I'D don''t 'twas 3's\n5'10\"",
    "x" * 300 + " " * 50 + "9" * 40,
    "\u200b\ufeff\x07\u2028end",
    "",
)

# What the assistant "answered" before a later user turn. None begins with whitespace, which would merge
# with the template's newline: ppow_jax keeps the ids of a response apart from those of the template.
ANSWERS = (
    "Sure! Here are 3 ideas:\n\n1. Walk.\n2. Swim 250 m.\n3. Rest.",
    "```python\ndef twice(n):\n    return 2 * n\n```\n",
    "No.",
    "Über den Fluß \u2013 12,5 km weit… 🙂",
)


class Prompt(NamedTuple):
    """A conversation that ends with a user's message.

    Attributes:
      source: the file that it came from, and whether it is a later turn.
      texts: user, assistant, user, ... messages; an odd number of them.
    """

    source: str
    texts: tuple[str, ...]

    def messages(self) -> list[dict[str, str]]:
        """As chat templates want them."""
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(self.texts)]


def conversations(source: str, turns: Sequence[str], number: int) -> list[Prompt]:
    """The conversation up to each user turn, with made-up answers in between."""
    texts, prompts = [], []
    for i, turn in enumerate(turns):
        if i:
            texts.append(ANSWERS[(number + i) % len(ANSWERS)])
        texts.append(turn)
        prompts.append(Prompt(f"{source}, turn {i + 1}" if i else source, tuple(texts)))
    return prompts


def read(files: Sequence[pathlib.Path], limit: int | None) -> list[Prompt]:
    """The edge cases, then every turn of at most `limit` evenly spaced rows of each JSONL file."""
    prompts = [Prompt("edge cases", (text,)) for text in EDGE_TEXTS]
    prompts += conversations("edge cases", EDGE_TEXTS, 0)[1:]
    for file in files:
        with file.open(encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.strip()]
        count = min(limit or len(rows), len(rows))
        for i in range(count):
            prompts += conversations(file.name, rows[i * len(rows) // count]["turns"], i)
    return prompts


def choose(prompts: Sequence[Prompt], lengths: Sequence[int], count: int, longest: int) -> list[int]:
    """Indices of `count` prompts of at most `longest` ids, each source in turn, spread evenly."""
    by_source: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if lengths[i] <= longest:
            by_source.setdefault(prompt.source, []).append(i)
    groups = list(by_source.values())
    order = []
    for t in range(count):
        order += [g[t * len(g) // count] for g in groups]
    return list(dict.fromkeys(order))[:count]
