"""Decoding in large batches: the texts of `decode`, with rows that leave and a cache that grows."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from jax.sharding import Mesh

from ppow_jax.decode import batch, shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.ngrams import Lookup
from ppow_jax.decode.sampling import Sampling
from ppow_jax.models import target_outputs
from ppow_jax.parallel import partition

L, STOP = 40, 6
PROMPTS = [[5, 6], [9], [4, 4, 30], [17], [7, 7, 2, 8, 1, 30], [11, 12], [25], [14, 9, 30]] * 2


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), partition.AXES)


def both(monkeypatch, mesh, pair, config, dtype="", drafting=None, weights=None):
    """(`decode`, `decode_batch`, its features, rows, slots and first round of every stretch).

    Four prompts are read at once, and a stretch has few slots.
    """
    monkeypatch.setattr(batch, "_READ", {"default": 4 * 8})
    monkeypatch.setattr(batch, "_SLOTS", 8)
    seen = []
    stretch = batch._stretch

    def watched(state, **rest):
        seen.append((len(state.done), state.cache[0].values.shape[2], int(state.round)))
        return stretch(state=state, **rest)

    monkeypatch.setattr(batch, "_stretch", watched)
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    whole = small.generate(pair, PROMPTS, config, drafting, weights, keys)
    tokens = np.full((len(PROMPTS), 8), 5, np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in PROMPTS], np.int32)
    inputs = (pair.target, pair.params, tokens, lengths, keys, config, mesh, dtype, drafting, weights)
    found, features = batch.decode_batch(*inputs)
    return whole, found, features, seen


def same(one, other) -> None:
    for field in one._fields:
        assert np.asarray(getattr(one, field)).tolist() == np.asarray(getattr(other, field)).tolist(), field


@pytest.mark.slow
def test_sampled_texts_that_end_at_different_times_are_those_of_the_plain_loop(monkeypatch, mesh, chain):
    config = DecodeConfig(L, (1, STOP), Sampling(1.0))
    whole, found, features, seen = both(monkeypatch, mesh, chain, config)
    same(whole, found)
    assert features is None
    assert found.finished.any() and not found.finished.all()
    assert len(set(found.emitted.tolist())) > 5
    assert seen == stretches(found.emitted.tolist())
    assert seen[0][0] > 2 * seen[-1][0]


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("chain", marks=pytest.mark.slow),
        "dynamic",
        pytest.param("lookup", marks=pytest.mark.slow),
    ],
)
def test_drafted_texts_that_end_at_different_times_are_those_of_the_plain_loop(
    monkeypatch, mesh, tiny, pupil, name, temperature
):
    shapes_ = {"chain": shapes.chain(3), "dynamic": shapes.Dynamic(9, 3, 3)}
    drafting = Eagle(tiny.drafter, shapes_[name]) if name in shapes_ else Lookup(3, branches=2)
    config = DecodeConfig(L, (STOP, 12, 30, 2), Sampling(temperature))
    weights = pupil if name in shapes_ else None
    whole, found, _, seen = both(monkeypatch, mesh, tiny, config, "", drafting, weights)
    same(whole, found)
    assert len(set(found.emitted.tolist())) > 5
    assert found.emitted_by_round.max() > 2
    rows, slots, _ = zip(*seen, strict=True)
    assert rows[0] >= 2 * rows[-1]
    assert list(slots) == sorted(slots) and slots[-1] > slots[0]


def test_a_batch_keeps_no_features_beside_a_drafter(monkeypatch, mesh, tiny):
    with pytest.raises(ValueError, match="no drafter shifts"):
        both(monkeypatch, mesh, tiny, DecodeConfig(4, (1,)), "float32", Lookup(3))


def stretches(counts: list[int]) -> list[tuple[int, int, int]]:
    """(rows, slots, round): pairs of rows (an eighth of 16), 8 more slots each time, a round fills one.

    The first of them is the slot after the longest prompt's, the sixth.
    """
    found, rounds, slots = [], 0, 8
    going = lambda: sum(c > 1 + rounds for c in counts)  # noqa: E731
    while left := going():
        slots += 8
        found.append((left + left % 2, slots, rounds))
        while going() and 6 + rounds < slots:
            rounds += 1
    return found


def test_the_features_kept_while_writing_are_those_of_reading_the_text(monkeypatch, mesh, tiny):
    config = DecodeConfig(L, (STOP, 12), Sampling(1.0))
    _, found, features, seen = both(monkeypatch, mesh, tiny, config, "float32")
    assert len(seen) > 3 and len(set(found.emitted.tolist())) > 3
    read = jax.jit(target_outputs.read, static_argnums=0)
    for row, prompt in enumerate(PROMPTS):
        text = prompt + found.tokens[row, : found.emitted[row]].tolist()
        last = len(text) - 1  # the token that the target has not read
        padded = np.zeros((1, 8 + L), np.int32)
        padded[0, : len(text)] = text
        want, _ = read(tiny.target, tiny.params, padded)
        for name in ("taps", "hidden"):
            kept, known = getattr(features, name)[row], np.asarray(getattr(want, name))[0]
            np.testing.assert_allclose(kept[:last], known[:last], rtol=1e-4, atol=1e-4)
            assert not kept[last:].any()


def test_texts_that_all_end_with_their_first_token_need_no_stretch(monkeypatch, mesh, chain):
    config = DecodeConfig(1, (1,))
    whole, found, features, seen = both(monkeypatch, mesh, chain, config, "float16")
    same(whole, found)
    assert not seen
    assert features.taps.dtype == np.float16 and features.taps.shape[:2] == (16, 9)
    assert features.taps[4, :6].any(-1).all() and not features.taps[4, 6:].any()


@pytest.mark.parametrize(
    ("texts", "of", "ways", "rows"),
    [(1, 128, 1, 16), (16, 128, 1, 16), (17, 128, 1, 32), (128, 128, 1, 128), (3, 4, 1, 3), (1, 16, 4, 4),
     (9, 16, 4, 12), (5, 6, 4, 6)],
)  # fmt: skip
def test_rows_are_few_sizes_that_the_mesh_can_split(texts, of, ways, rows):
    fake = dataclasses.make_dataclass("Fake", ["shape"])({"data": ways, "fsdp": 1})
    assert batch.rows_for(texts, of, fake) == rows


@pytest.mark.parametrize(
    ("rows", "length", "ways", "parts"),
    [(128, 96, 1, 8), (128, 16, 1, 1), (80, 96, 1, 4), (7, 512, 1, 7), (3, 4096, 1, 3),
     (32, 512, 4, 2), (6, 64, 4, 1)],
)  # fmt: skip
def test_prefill_reads_equal_parts_of_at_most_2048_tokens_a_device(rows, length, ways, parts):
    fake = dataclasses.make_dataclass("Fake", ["shape"])({"data": ways, "fsdp": 1})
    assert batch._parts(rows, length, fake) == parts
