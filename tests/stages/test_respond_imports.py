"""The respond stage: responses that were written elsewhere, and answers that prompts have already."""

import pytest
import runs
from written import ASSISTANT, END, USER, greedy, ids, sampled, stored, trace

from ppow_jax.data import records
from ppow_jax.data.prompt import Prompt
from ppow_jax.errors import ConfigError
from ppow_jax.stages import evaluate, respond, train

IMPORTED = [
    {"id": "t3", "category": "c", "turns": ["ab"], "response_ids": [[10, 11]], "finished": [True]},
    {"id": "t5", "turns": ["a"], "response_ids": [[12, 13, 14]], "finished": [False]},
    {"id": "new", "turns": ["a"], "response_ids": [[15]]},
]


def test_imported_responses_are_taken_and_their_prompts_not_answered(tmp_path):
    path = runs.write_jsonl(tmp_path / "r.jsonl", IMPORTED)
    sampled(tmp_path / "w", respond__responses=str(path))
    found = stored(tmp_path / "w")
    assert set(found) == {f"t{i}" for i in range(24)} | {"new"}
    assert len(records.Records(tmp_path / "w" / "responses")) == 25  # none twice
    assert records.shards(tmp_path / "w" / "responses") == [
        "import-00000",
        *(f"write-{i:05}" for i in range(3)),
    ]
    t3, t5, new = found["t3"], found["t5"], found["new"]
    assert t3["category"] == "c"
    assert t3["tokens"].tolist() == [USER, *ids("ab"), ASSISTANT, 10, 11, END]
    assert t3["assistant"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert t5["tokens"].tolist() == [USER, *ids("a"), ASSISTANT, 12, 13, 14]  # cut: no end of turn
    assert t5["assistant"].tolist() == [0, 0, 0, 1, 1, 1]
    assert new["tokens"].tolist()[-2:] == [15, END]
    files = sorted((tmp_path / "w" / "responses").iterdir())
    before = [trace(file) for file in files]
    (tmp_path / "w" / "stages.json").unlink()  # as after a kill
    sampled(tmp_path / "w", respond__responses=str(path))
    assert sorted((tmp_path / "w" / "responses").iterdir()) == files
    assert [trace(file) for file in files] == before  # not written again


def test_imported_responses_alone(tmp_path):
    path = runs.write_jsonl(tmp_path / "r.jsonl", IMPORTED)
    sampled(tmp_path / "w", respond__responses=str(path), respond__prompts="")
    assert set(stored(tmp_path / "w")) == {"t3", "t5", "new"}


def test_fewer_texts_than_are_kept_out_of_training(tmp_path):
    path = runs.write_jsonl(tmp_path / "r.jsonl", IMPORTED)
    changes = dict(respond__responses=str(path), respond__prompts="", data__holdout=3)
    with pytest.raises(ConfigError, match=r"^config.data.holdout: found 3, expected fewer than the 3 turns"):
        runs.run(tmp_path / "w", **changes)
    assert not (tmp_path / "w" / "responses").exists()
    sampled(tmp_path / "w", **changes)  # of `respond` alone


@pytest.fixture
def answered(monkeypatch) -> None:
    """Prompts of which some have answers already."""
    prompts = [
        Prompt("taken", "c", ("ab", "c"), answers=("xy", "z")),
        Prompt("open", "", ("ab",)),
        Prompt("long", "", ("a", "b"), answers=("x", "y" * 600)),
        Prompt("too long", "", ("a",), answers=("y" * 600,)),
    ]
    monkeypatch.setattr(respond, "load", lambda spec, key, warn=True: {"p": prompts} if spec else {})


def test_answers_that_are_there_are_taken_word_for_word(tmp_path, answered, caplog):
    changes = {"respond__keep_answers": True, "stages": ("respond",)}
    with caplog.at_level("INFO", logger="ppow_jax"):
        runs.run(tmp_path / "w", **changes)
    found = stored(tmp_path / "w")
    assert set(found) == {"taken", "open", "long"}
    first, second = [USER, *ids("ab"), ASSISTANT], [USER, *ids("c"), ASSISTANT]
    assert found["taken"]["tokens"].tolist() == [*first, *ids("xy"), END, *second, *ids("z"), END]
    assert found["taken"]["assistant"].tolist() == [0] * 4 + [1] * 3 + [0] * 3 + [1] * 2
    assert found["taken"]["category"] == "c"
    assert found["open"]["tokens"].tolist() == first + greedy(ASSISTANT, 16)
    assert found["long"]["tokens"].tolist() == [USER, *ids("a"), ASSISTANT, *ids("x"), END]
    assert "3 of 5 answers taken as the prompts have them; others exceed the context of 512" in caplog.text


def test_keeping_answers_that_are_not_there_or_that_must_be_the_targets(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^config.respond.keep_answers: found True, but no prompt of"):
        runs.run(tmp_path / "w", respond__keep_answers=True)
    chosen = {"respond__keep_answers": True, "runs": ("supervise", "ppow"), "train__ppow__temperature": 0.0}
    with pytest.raises(ConfigError, match=r"^config.train.ppow.temperature: found 0, .*respond.keep_answers"):
        train.check(runs.make_settings(tmp_path, **chosen))
    with pytest.raises(ConfigError, match=r"^config.respond.keep_answers: found True, expected False for"):
        evaluate.check(runs.make_settings(tmp_path, respond__keep_answers=True, decode__shape="auto"))
