"""Training texts: responses (and their features) as fixed-length batches through Grain."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np

from ppow_jax.data import records
from ppow_jax.errors import UserError
from ppow_jax.parallel.console import log
from ppow_jax.settings import DataSettings

_ENDLESS = 2**40  # batches


class Texts:
    """Random access to texts of `length` tokens; the source of the Grain pipeline.

    An item has `index` (of the record), `tokens` int32 `[T]`, `assistant` bool `[T]` and, with
    features, `taps` and `hidden` (see `target_outputs.Features`), zero beyond the text.
    """

    def __init__(
        self,
        responses: records.Records,
        features: records.Records | None,
        indices: Sequence[int],
        length: int,
    ) -> None:
        self._responses, self._features = responses, features
        self._indices, self._length = list(indices), length

    def __len__(self) -> int:
        return len(self._indices)

    def only(self, places: Sequence[int]) -> "Texts":
        """Those at these places."""
        chosen = [self._indices[i] for i in places]
        return Texts(self._responses, self._features, chosen, self._length)

    def __getitem__(self, at: SupportsIndex) -> dict[str, Any]:
        index = self._indices[at]
        record = self._responses[index]
        item = {
            "index": np.int32(index),
            "tokens": self._fit(record["tokens"]),
            "assistant": self._fit(record["assistant"]).astype(bool),
        }
        if self._features is not None:
            item |= {k: self._fit(v) for k, v in self._features[index].items()}
        return item

    def _fit(self, values: np.ndarray) -> np.ndarray:
        out = np.zeros((self._length, *values.shape[1:]), values.dtype)
        out[: len(values)] = values[: self._length]
        return out


def split(responses: records.Records, length: int, holdout: int) -> tuple[list[int], list[int]]:
    """Indices of (training, held-out) records; those without two written tokens are left out.

    The held-out texts are spread evenly over the records. Other texts of their prompts are neither: they
    repeat what is said (`Conversation`). The log says how many are left out, and how many are longer than
    `length`.

    Raises:
      UserError: fewer usable texts than `holdout` + 1.
    """
    usable, longer = {}, 0  # index -> the prompt's id
    for i in range(len(responses)):
        record = responses[i]
        longer += len(record["tokens"]) > length
        if record["assistant"][:length].sum() >= 2:
            usable[i] = record["id"]
    unusable = len(responses) - len(usable)
    if longer or unusable:
        log.info("data: of %d responses %d are longer than data.length %d and cut; %d without two written "
                 "tokens in it are left out", len(responses), longer, length, unusable)  # fmt: skip
    if len(usable) <= holdout:
        raise UserError(
            f"config.data.holdout: found {len(usable)} usable responses, expected more than "
            f"{holdout}: lower data.holdout, raise data.length or answer more prompts"
        )
    stride = len(usable) // max(holdout, 1)
    held = list(usable)[::stride][:holdout] if holdout else []
    apart = {usable[i] for i in held}
    return [i for i, prompt in usable.items() if prompt not in apart], held


def draft_vocabulary(
    responses: records.Records, indices: Sequence[int], size: int, vocab_size: int
) -> tuple[np.ndarray, float]:
    """The draft vocabulary, int32 `[N]` ascending, and the share of written tokens it covers.

    It holds the tokens that the target wrote most often; if it wrote fewer kinds than N, the lowest
    unused ids fill it.

    Raises:
      UserError: N is larger than the target's vocabulary.
    """
    if size > vocab_size:
        raise UserError(
            f"config.drafter.vocab_size: found {size}, expected at most the target's {vocab_size}"
        )
    counts = np.zeros(vocab_size, np.int64)
    for i in indices:
        record = responses[i]
        counts += np.bincount(record["tokens"][record["assistant"] > 0], minlength=vocab_size)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:size])
    return chosen.astype(np.int32), float(counts[chosen].sum() / counts.sum())


def iterate(texts: Texts, batch_size: int, seed: int, rows: np.ndarray | None = None) -> Any:
    """An endless Grain iterator of batches, reshuffled every epoch.

    Its state is saved with the checkpoint, and is the same for every process.

    Args:
      texts: all of them.
      batch_size: of the whole batch.
      seed: of the order.
      rows: those of every batch that this process reads; None: all.

    Raises:
      UserError: fewer texts than a batch.
    """
    if len(texts) < batch_size:
        raise UserError(f"batch_size: found {batch_size}, expected at most {len(texts)}, the training texts")
    order = grain.MapDataset.source(texts).seed(seed).shuffle().repeat()
    wanted = np.arange(batch_size) if rows is None else rows

    def batch(number: int) -> dict[str, np.ndarray]:
        items = [order[number * batch_size + int(row)] for row in wanted]
        return stack(items)

    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.range(_ENDLESS).map(batch).to_iter_dataset(read))


def first_span(assistant_T: np.ndarray) -> tuple[int, int]:
    """[start, end) of the first response in a text."""
    start = int(np.argmax(assistant_T))
    rest = assistant_T[start:]
    return start, start + (len(rest) if rest.all() else int(np.argmin(rest)))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The responses as training and held-out texts.

    Attributes:
      train, held: the texts.
      indices: of the training records.
      records: how many there are in all.
    """

    train: Texts
    held: Texts
    indices: list[int]
    records: int


def some(corpus: Corpus, count: int) -> Corpus:
    """A corpus with so many of its training texts, drawn at random; fewer are among more. 0: all.

    Raises:
      UserError: it has not so many.
    """
    if not count:
        return corpus
    if count > len(corpus.indices):
        raise UserError(f"texts: found {count}, expected at most {len(corpus.indices)}, the training texts")
    drawn = sorted(np.random.default_rng(0).permutation(len(corpus.indices))[:count].tolist())
    indices = [corpus.indices[i] for i in drawn]
    return dataclasses.replace(corpus, train=corpus.train.only(drawn), indices=indices)


def corpus(responses: records.Records, features: records.Records | None, settings: DataSettings) -> Corpus:
    """Splits responses into training and held-out texts.

    Raises:
      UserError: see `split`.
    """
    train, held = split(responses, settings.length, settings.holdout)
    first, second = (Texts(responses, features, indices, settings.length) for indices in (train, held))
    return Corpus(first, second, train, len(responses))


def spread(available: int, wanted: int) -> range:
    """Indices of as many items as wanted, evenly spread; of all if there are no more."""
    count = min(wanted, available)
    return range(0, count * (available // count), available // count)


def stack(items: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Items of `Texts` as arrays `[B, ...]`."""
    return {key: np.stack([item[key] for item in items]) for key in items[0]}
