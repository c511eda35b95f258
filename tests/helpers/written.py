"""What the Markov chain writes, and what a workdir keeps of it.

Greedy text is known: after each letter its likeliest successor.
"""

import runs

from ppow_jax.data import records
from ppow_jax.targets import markov

USER, ASSISTANT, END = (markov.SPECIALS.index(x) for x in ("<user>", "<assistant>", "<end>"))
BEST = markov.transition(0).argmax(1)


def ids(text: str) -> list[int]:
    return [len(markov.SPECIALS) + markov.LETTERS.index(x) for x in text]


def greedy(last: int, count: int) -> list[int]:
    out = [last]
    for _ in range(count):
        out.append(int(BEST[out[-1]]))
    return out[1:]


def stored(workdir) -> dict[str, dict]:
    return {r["id"]: r for r in records.Records(workdir / "responses")}


def trace(file) -> tuple[int, int]:
    """Differs if the file was written again, even with the same bytes."""
    return file.stat().st_ino, file.stat().st_mtime_ns


def sampled(workdir, **changes):
    """Runs respond alone, at temperature 1, so that a batch's text depends on its key."""
    changes = dict(stages=("respond",), respond__temperature=1.0, train__ppow__temperature=1.0) | changes
    return runs.run(workdir, **changes)
