"""Training texts: the split, the draft vocabulary, batches that survive restarts and many processes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import runs

from ppow_jax.data import records, texts
from ppow_jax.errors import UserError
from ppow_jax.models import target_outputs
from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.stages import features, train

NUMBERS = itertools.count()


def record(tokens: list[int], assistant: list[int], prompt: str | None = None) -> dict:
    """Of a prompt of its own, or of the one named."""
    written = {"tokens": np.array(tokens, np.int32), "assistant": np.array(assistant, np.uint8)}
    return {"id": prompt or str(next(NUMBERS))} | written


def written(count: int) -> list[dict]:
    """`count` records of five tokens, the last two of them written; the first is the record's number."""
    return [record([i, 1, 2, 3, 4], [0, 0, 0, 1, 1]) for i in range(count)]


def source(count: int) -> texts.Texts:
    return texts.Texts(written(count), None, range(count), 6)


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def indices(iterator, batches: int) -> list[list[int]]:
    return [next(iterator)["index"].tolist() for _ in range(batches)]


def test_split_spreads_the_held_out_texts_and_leaves_out_the_unusable():
    rows = written(11)
    rows[4] = record([4, 1, 2, 3, 4], [0, 0, 0, 0, 1])  # one written token
    # usable: 0 1 2 3 5 6 7 8 9 10; every third of ten
    assert texts.split(rows, 6, 3) == ([1, 2, 5, 6, 8, 9, 10], [0, 3, 7])
    assert texts.split(rows, 6, 0) == ([0, 1, 2, 3, 5, 6, 7, 8, 9, 10], [])
    assert texts.split(rows, 6, 9) == ([10], [0, 1, 2, 3, 5, 6, 7, 8, 9])


def test_split_counts_written_tokens_within_the_length_only():
    rows = [*written(3), record([9, 1, 2, 3, 4], [0, 1, 1, 0, 0])]
    assert texts.split(rows, 4, 0) == ([3], [])  # the others have one below 4
    with pytest.raises(UserError, match=r"^config.data.holdout: found 1 usable responses, expected more"):
        texts.split(rows, 4, 1)


def test_split_says_what_it_leaves_out_or_cuts(caplog):
    rows = [*written(3), record([9], [0]), record([9, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1, 1])]
    with caplog.at_level("INFO", logger="ppow_jax"):
        assert texts.split(written(3), 6, 0) == ([0, 1, 2], []) and not caplog.records
        assert texts.split(rows, 6, 0) == ([0, 1, 2], [])
    assert [r.getMessage() for r in caplog.records] == [
        "data: of 5 responses 1 are longer than data.length 6 and cut; 2 without two written tokens in it "
        "are left out"
    ]


def test_texts_that_repeat_a_held_out_one_are_not_trained_on():
    rows = written(6)
    rows[1:3] = [record([i, 1, 2, 3, 4], [0, 0, 0, 1, 1], "two turns") for i in (1, 2)]
    assert texts.split(rows, 6, 1) == ([1, 2, 3, 4, 5], [0])
    assert texts.split(rows, 6, 3) == ([3, 5], [0, 2, 4])  # 1 is the first turn of 2


def test_draft_vocabulary_by_hand():
    rows = [
        record([7, 7, 7, 5, 5, 2], [0, 0, 0, 1, 1, 1]),  # the user's 7s do not count
        record([5, 2, 6], [1, 1, 1]),
        record([3, 3, 3, 3], [1, 1, 1, 1]),  # not a training text
    ]
    # written in 0 and 1: 5 three times, 2 twice, 6 once
    vocab, coverage = texts.draft_vocabulary(rows, [0, 1], 2, 8)
    assert vocab.tolist() == [2, 5] and vocab.dtype == np.int32
    assert coverage == pytest.approx(5 / 6)
    vocab, coverage = texts.draft_vocabulary(rows, [0, 1], 5, 8)
    assert vocab.tolist() == [0, 1, 2, 5, 6] and coverage == 1.0  # the lowest unused ids fill it
    assert texts.draft_vocabulary(rows, [0, 1, 2], 1, 8)[0].tolist() == [3]
    with pytest.raises(UserError, match=r"config.drafter.vocab_size: found 9, expected at most .* 8"):
        texts.draft_vocabulary(rows, [0], 9, 8)


def test_texts_are_padded_and_cut():
    rows = [record([8, 9], [0, 1]), record([1, 2, 3, 4, 5], [0, 1, 1, 1, 1])]
    kept = [{"taps": np.ones((2, 3), np.float16)}, {"taps": np.ones((4, 3), np.float16)}]
    found = texts.Texts(rows, kept, [1, 0], 4)
    assert len(found) == 2
    assert found[0]["index"] == 1 and found[0]["tokens"].tolist() == [1, 2, 3, 4]
    short = found[1]
    assert short["index"] == 0 and short["tokens"].tolist() == [8, 9, 0, 0]
    assert short["assistant"].tolist() == [False, True, False, False]
    assert short["assistant"].dtype == bool and short["taps"].dtype == np.float16
    assert short["taps"].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2


def test_first_span():
    assert texts.first_span(np.array([0, 0, 1, 1, 0, 1], bool)) == (2, 4)
    assert texts.first_span(np.array([0, 1, 1], bool)) == (1, 3)


def test_fewer_texts_are_among_more():
    whole = texts.Corpus(source(20), source(0), list(range(20)), 20)
    few, more = texts.some(whole, 5), texts.some(whole, 12)
    for chosen, count in ((few, 5), (more, 12)):
        assert len(set(chosen.indices)) == len(chosen.train) == count
        assert [int(item["index"]) for item in map(chosen.train.__getitem__, range(count))] == chosen.indices
        assert chosen.indices != list(range(count)) and chosen.records == 20
    assert set(few.indices) < set(more.indices)
    assert texts.some(whole, 0) is whole
    with pytest.raises(UserError, match="texts: found 21, expected at most 20, the training texts"):
        texts.some(whole, 21)


def test_batches_are_a_function_of_the_seed_and_cover_every_epoch():
    first = indices(texts.iterate(source(12), 4, 5), 6)
    assert first == indices(texts.iterate(source(12), 4, 5), 6)
    assert first != indices(texts.iterate(source(12), 4, 6), 6)
    one, two = flat(first[:3]), flat(first[3:])
    assert sorted(one) == sorted(two) == list(range(12))
    assert one != two and one != list(range(12))  # shuffled, and anew


def test_batches_go_on_where_a_checkpoint_was_saved(tmp_path):
    """Saved in the middle of the second epoch, through orbax, into an iterator that has moved elsewhere."""
    batches = texts.iterate(source(12), 4, 5)
    indices(batches, 4)
    store = Checkpoints(tmp_path, 2)
    state = {"x": jax.numpy.arange(3.0)}
    store.save(4, state, batches, {"seconds": 1.5})
    expected = indices(batches, 5)
    other = texts.iterate(source(12), 4, 5)
    indices(other, 1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    step, found, about = store.restore(shapes, other)
    assert (step, about["seconds"], found["x"].tolist()) == (4, 1.5, [0.0, 1.0, 2.0])
    assert indices(other, 5) == expected
    store.close()


def test_a_process_reads_its_rows_of_every_batch():
    whole = indices(texts.iterate(source(12), 4, 5), 6)
    for rows in ([0, 1], [1, 3], [2]):
        mine = indices(texts.iterate(source(12), 4, 5, rows), 6)
        assert mine == [[batch[row] for row in rows] for batch in whole]


def test_a_batch_that_cannot_be_filled():
    with pytest.raises(UserError, match="batch_size: found 13, expected at most 12"):
        texts.iterate(source(12), 13, 0)


def test_padded_texts_fill_a_bucket():
    padded = features.pad_texts([np.array([1, 2, 3]), np.arange(33)], 4)
    assert padded.shape == (4, 64) and padded.dtype == np.int32
    assert padded[0, :4].tolist() == [1, 2, 3, 0] and padded[1, 32] == 32
    assert not padded[2:].any()
    assert features.pad_texts([np.array([7])], 1, 5).tolist() == [[7, 0, 0, 0, 0]]


@pytest.fixture
def corpora(tmp_path):
    """Texts of unlike lengths with cached features, and an experiment that caches them in float32."""
    rng = np.random.default_rng(3)
    lengths = [5, 40, 12, 33, 9, 7]
    rows = [record(rng.integers(4, 31, n).tolist(), [0, 0] + [1] * (n - 2)) for n in lengths]
    experiment = runs.build(tmp_path / "w", data__length=36, data__holdout=2, data__feature_dtype="float32")
    records.write_shard(tmp_path / "w" / "responses", "write-00000", rows)
    return experiment, rows


def test_cached_features_are_those_of_a_fresh_read(corpora):
    """The chain's are known: tap and hidden are the token, one-hot times sqrt(width)."""
    from ppow_jax.targets import markov

    experiment, rows = corpora
    corpus = train.corpus(experiment)
    assert (corpus.records, len(corpus.train), len(corpus.held)) == (6, 4, 2)
    probs = np.maximum(markov.transition(0), np.exp(-20.0))
    probs /= probs.sum(1, keepdims=True)
    for at, index in enumerate(corpus.indices):
        tokens = rows[index]["tokens"][:36]
        count = len(tokens)
        item = corpus.train[at]
        batch = {k: v[None] for k, v in item.items()}
        outputs = target_outputs.outputs_of(experiment.target, experiment.target_params, batch)
        about = (experiment.target, experiment.target_params, outputs.hidden)
        log_prob, found = np.asarray(outputs.log_prob[0]), np.asarray(target_outputs.entropy_of(*about)[0])
        assert item["tokens"][:count].tolist() == tokens.tolist()
        taps = item["taps"].reshape(36, 3, 32)
        one_hot = np.eye(32)[tokens] * np.sqrt(32)
        np.testing.assert_allclose(taps[:count], np.repeat(one_hot[:, None], 3, 1), atol=1e-5)
        np.testing.assert_allclose(item["hidden"][:count], one_hot, atol=1e-4)
        np.testing.assert_allclose(log_prob[: count - 1], np.log(probs[tokens[:-1], tokens[1:]]), atol=1e-4)
        entropy = -(probs * np.log(probs)).sum(1)[tokens]
        np.testing.assert_allclose(found[:count], entropy, atol=1e-4)
        for name in ("taps", "hidden"):
            assert not item[name][count:].any()


def test_cache_is_made_once_and_can_be_switched_off(corpora, monkeypatch):
    experiment, _ = corpora
    train.corpus(experiment)
    before = runs.digest(experiment.workdir / "features")
    monkeypatch.setattr(features, "_compute", None)  # would be called to compute
    train.corpus(experiment)
    assert runs.digest(experiment.workdir / "features") == before
    off = dataclasses.replace(experiment.settings.data, cache_features=False)
    plain = dataclasses.replace(experiment, settings=dataclasses.replace(experiment.settings, data=off))
    assert set(train.corpus(plain).train[0]) == {"index", "tokens", "assistant"}


def test_features_that_respond_kept_are_not_computed_again_but_in_another_dtype(tmp_path, monkeypatch):
    runs.run(tmp_path / "w", stages=("respond",))
    experiment = runs.build(tmp_path / "w")
    kept = runs.digest(tmp_path / "w" / "features")
    assert len(kept) == 3
    with monkeypatch.context() as patch:
        patch.setattr(features, "_compute", None)
        item = train.corpus(experiment).train[0]
    assert item["taps"].dtype == np.float16
    other = runs.build(tmp_path / "w", data__feature_dtype="float32")
    again = train.corpus(other).train[0]
    assert again["taps"].dtype == np.float32
    last = int(np.flatnonzero(item["assistant"])[-1])  # the token that the target has not read
    np.testing.assert_allclose(item["hidden"][:last], again["hidden"][:last], atol=1e-2)


def test_a_feature_that_does_not_fit_its_dtype_is_refused(corpora):
    experiment, _ = corpora
    big = dict(experiment.target_params, embedding={"embedding": np.full((31, 32), 1e5, np.float32)})
    half = dataclasses.replace(experiment.settings.data, feature_dtype="float16")
    broken = dataclasses.replace(
        experiment, target_params=big, settings=dataclasses.replace(experiment.settings, data=half)
    )
    with pytest.raises(UserError, match=r"config.data.feature_dtype: a feature does not fit into float16"):
        train.corpus(broken)
    assert records.shards(experiment.workdir / "features") == []
