"""The respond stage: batches and restarts, dialogues turn by turn, imported responses.

The target is the Markov chain, so that greedy text is known: after each letter its likeliest successor.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import runs

from ppow_jax.data import records
from ppow_jax.data.conversations import Conversation, spans
from ppow_jax.data.prompt import Prompt
from ppow_jax.errors import UserError
from ppow_jax.models.target import Target
from ppow_jax.stages import respond
from ppow_jax.targets import markov
from ppow_jax.targets.tokenizer import Tokenizer
from ppow_jax.targets.tokenizer_gguf import from_gguf

USER, ASSISTANT, END = (markov.SPECIALS.index(x) for x in ("<user>", "<assistant>", "<end>"))
BEST = markov.transition(0).argmax(1)
# As the chain's own, but it keeps the case of what it renders.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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


@pytest.fixture
def experiment(tmp_path):
    """A target ready to answer, its template fit for dialogues."""
    built = runs.build(tmp_path / "w")
    return dataclasses.replace(built, tokenizer=dataclasses.replace(built.tokenizer, template=TEMPLATE))


def test_every_prompt_is_answered_once_with_the_targets_own_text(finished):
    found = list(records.Records(finished.workdir / "responses"))
    assert sorted(r["id"] for r in found) == sorted(f"t{i}" for i in range(24))
    assert records.shards(finished.workdir / "responses") == [f"write-{i:05}" for i in range(3)]  # of 8
    for record in found:
        letter = runs.LETTERS[int(record["id"][1:])]
        prompt = [USER, *ids(f"{letter} ok"), ASSISTANT]
        assert record["tokens"].tolist() == prompt + greedy(ASSISTANT, 16)
        assert record["assistant"].tolist() == [0] * len(prompt) + [1] * 16


def test_batches_are_cut_by_turns_and_length(experiment):
    prompts = [
        Prompt("long", "", ("abcdef",)),
        Prompt("two", "", ("a", "b")),
        Prompt("b", "", ("ab",)),
        Prompt("a", "", ("ba",)),
    ]
    batches = respond.batches_of(prompts, respond.lengths_of(experiment, prompts, 8), 2, 8)
    assert [[p.id for p in batch] for batch in batches] == [["a", "b"], ["long", "two"]]


def sampled(workdir, **changes):
    """Runs respond alone, at temperature 1, so that a batch's text depends on its key."""
    changes = dict(stages=("respond",), respond__temperature=1.0, train__ppow__temperature=1.0) | changes
    return runs.run(workdir, **changes)


def test_batches_of_long_texts_hold_fewer_of_them(monkeypatch):
    prompts = [respond.Prompt(str(n), "", ("x",)) for n in range(20)]
    lengths = {p.id: 10 if n < 9 else 200 if n < 15 else 500 for n, p in enumerate(prompts)}
    batches = respond.batches_of(prompts, lengths, 6, 100)
    assert [len(b) for b in batches] == [6, 3, 3, 3, 2, 2, 1]  # of 110, 300 (a half) and 600 tokens (a third)
    assert [p.id for b in batches for p in b] == [
        str(n) for n in sorted(range(20), key=lambda n: (lengths[str(n)], str(n)))
    ]
    assert [len(b) for b in respond.batches_of(prompts, lengths, 1, 10_000)] == [1] * 20
    monkeypatch.setattr(respond.partition, "platform", lambda: "tpu")  # whose batch size is for 2,048 tokens
    assert [len(b) for b in respond.batches_of(prompts, lengths, 6, 100)] == [6, 6, 6, 2]
    assert [len(b) for b in respond.batches_of(prompts, lengths, 6, 2000)] == [6, 3, 3, 3, 3, 2]


def test_a_killed_run_repeats_only_the_batch_in_flight(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sampled(whole)
    complete = runs.digest(whole / "responses")
    assert len(complete) == 3

    answered = []
    converse = respond.converse

    def counted(experiment, prompts, *rest):
        answered.append([p.id for p in prompts])
        if len(answered) == 2:
            raise KeyboardInterrupt
        return converse(experiment, prompts, *rest)

    monkeypatch.setattr(respond, "converse", counted)
    with pytest.raises(KeyboardInterrupt):
        sampled(killed)
    assert records.shards(killed / "responses") == ["write-00000"]
    first = trace(killed / "responses" / "write-00000.arrayrecord")
    sampled(killed)
    assert answered[1] == answered[2]  # the batch in flight, again
    assert sorted(itertools.chain(answered[0], *answered[2:])) == sorted(f"t{i}" for i in range(24))
    assert trace(killed / "responses" / "write-00000.arrayrecord") == first  # not touched
    assert runs.digest(killed / "responses") == complete  # bit by bit
    sampled(killed)
    assert len(answered) == 4  # a finished stage is not run again


@pytest.mark.parametrize("row", [20, 28])  # of the features of 8 texts, the texts, again 8 and 8
def test_a_kill_while_a_shard_is_written_leaves_no_half_shard(tmp_path, monkeypatch, row):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sampled(whole)
    restored = records.serialization.msgpack_serialize
    count = itertools.count(1)

    def serialize(value):
        if next(count) == row:
            raise KeyboardInterrupt
        return restored(value)

    monkeypatch.setattr(records.serialization, "msgpack_serialize", serialize)
    with pytest.raises(KeyboardInterrupt):
        sampled(killed)
    assert records.shards(killed / "responses") == ["write-00000"]
    sampled(killed)
    for directory in ("responses", "features"):
        assert runs.digest(killed / directory) == runs.digest(whole / directory)


def test_a_lost_shard_is_written_again_as_it_was(tmp_path):
    sampled(tmp_path / "w")
    directory = tmp_path / "w" / "responses"
    before = runs.digest(directory)
    (directory / "write-00001.arrayrecord").unlink()
    (tmp_path / "w" / "stages.json").unlink()
    sampled(tmp_path / "w")
    assert runs.digest(directory) == before


def converse(experiment, prompts: list[Prompt], tokens: int) -> list[Conversation]:
    return respond.converse(experiment, prompts, 4, tokens, 0.0, jax.random.key(0))


def test_dialogues_go_on_turn_by_turn(experiment):
    one, two = converse(experiment, [Prompt("1", "", ("ab",)), Prompt("2", "", ("a", "bc"))], 4)
    answer = greedy(ASSISTANT, 4)
    assert one.tokens == [USER, *ids("ab"), ASSISTANT, *answer]
    turn = [END, USER, *ids("bc"), ASSISTANT]
    assert two.tokens == [USER, *ids("a"), ASSISTANT, *answer, *turn, *answer]
    assert two.assistant == [False] * 3 + [True] * 4 + [False] * 5 + [True] * 4
    assert spans(np.array(two.assistant)) == [(3, 7), (12, 16)]


def test_features_are_kept_turn_by_turn_and_belong_to_their_texts(experiment):
    """The chain's are known: tap and hidden are the token, one-hot times sqrt(width)."""
    prompts = [Prompt("1", "", ("ab",)), Prompt("2", "", ("a", "bc"))]
    for held in respond.converse(experiment, prompts, 4, 4, 0.0, jax.random.key(0), "float32"):
        want = np.eye(32)[held.tokens] * np.sqrt(32)
        want[-1] = 0.0  # never read
        np.testing.assert_allclose(held.texts[-1].features["hidden"], want, atol=1e-4)
        np.testing.assert_allclose(held.texts[-1].features["taps"], np.tile(want, 3), atol=1e-4)


def test_an_answer_ends_at_the_stop_id_which_is_not_said_twice(experiment):
    """With a letter for a stop id: the answer includes it, and the next turn does not repeat it."""
    stop = greedy(ASSISTANT, 3)[-1]
    template = TEMPLATE.replace("<end>", markov.LETTERS[stop - 4])
    changed = dataclasses.replace(experiment.tokenizer, stop_ids=(stop,), template=template)
    stopping = dataclasses.replace(experiment, tokenizer=changed)
    answer = greedy(ASSISTANT, 3)
    (found,) = converse(stopping, [Prompt("1", "", ("a", "b"))], 9)
    begin = [USER, *ids("a"), ASSISTANT]
    assert found.tokens == [*begin, *answer, USER, *ids("b"), ASSISTANT, *answer]
    assert sum(found.assistant) == 6


def test_a_full_context_ends_a_dialogue_early(experiment):
    """39 tokens of the first turn, 28 of the next question and 12 to come: one more than the context."""
    target = Target(dataclasses.replace(experiment.target.config, context=78))
    long, short = Prompt("1", "", ("a" * 25, "b" * 25, "c")), Prompt("2", "", ("a", "b", "c"))
    full, other = converse(dataclasses.replace(experiment, target=target), [long, short], 12)
    assert spans(np.array(full.assistant)) == [(27, 39)]
    assert len(full.tokens) == 39  # and no question stays without an answer
    assert len(spans(np.array(other.assistant))) == 3


def test_a_prompt_longer_than_the_context_is_refused_before_any_is_answered(tmp_path):
    rows = [{"id": "ok", "turns": ["a"]}, {"id": "giant", "turns": ["b" * 500]}]
    path = runs.write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError, match="prompt 'giant' has 502 tokens; with 16 new ones that is more than"):
        sampled(tmp_path / "w", respond__prompts=f"p={path}", respond__batch_size=1)
    assert not (tmp_path / "w" / "responses").exists()


def test_a_prompt_that_leaves_no_room_in_a_training_text_is_left_out(tmp_path, caplog):
    rows = [{"id": i, "turns": ["b" * n]} for i, n in (("fits", 28), ("long", 29), ("short", 1))]
    path = runs.write_jsonl(tmp_path / "p.jsonl", rows)
    with caplog.at_level("INFO", logger="ppow_jax"):
        sampled(tmp_path / "w", respond__prompts=f"p={path}", data__length=32)
    written = records.Records(tmp_path / "w" / "responses")
    assert sorted(written[i]["id"] for i in range(len(written))) == ["fits", "short"]  # 28 + 2 and BOS, EOS
    assert "1 prompts of more than 30 tokens left out: config.data.length" in caplog.text


def test_padding_repeats_the_shortest_prompt():
    padded, lengths = respond.pad([[7] * 33, [8, 9]], 4)
    assert padded.shape == (4, 40) and padded.dtype == np.int32
    assert lengths.tolist() == [33, 2, 2, 2]
    assert padded[3, :3].tolist() == [8, 9, 0]


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


def bpe() -> Tokenizer:
    """Tokens a, b, ab, <end>: the text ab is the one token ab."""
    return from_gguf(
        {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["a", "b", "ab", "<end>"], "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.token_type": [1, 1, 1, 3], "tokenizer.ggml.eos_token_id": 3,
            "tokenizer.ggml.bos_token_id": 3,
            "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        }
    )  # fmt: skip


def test_responses_of_another_tokenizer_are_refused(tmp_path):
    own = [{"turns": ["a"], "response_ids": [[2, 0]]}] * 3
    foreign = [{"turns": ["a"], "response_ids": [[0, 1]]}] * 4  # decodes to ab, which is one token
    path = runs.write_jsonl(tmp_path / "r.jsonl", own + foreign[:1])
    assert len(respond.import_responses(str(path), bpe(), 4)) == 4
    runs.write_jsonl(path, own + foreign)
    with pytest.raises(UserError, match=r"only 3 of 7 responses keep their ids .* another tokenizer's"):
        respond.import_responses(str(path), bpe(), 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": ["a"], "response_ids": [[10, 31]]}, "object 1 has the token id 31, expected ids below 31"),
        ({"turns": ["a"], "response_ids": [[-1]]}, "object 1 has the token id -1"),
        ({"turns": ["a"], "response_ids": [["x"]]}, "object 1 has the token id 'x'"),
        ({"turns": ["a"], "response_ids": [10, 11]}, "object 1: expected one list .*'response_ids'"),
        ({"turns": ["a"], "response_ids": []}, "object 1 lacks 'turns' or 'response_ids'"),
        ({"turns": "a", "response_ids": [[10]]}, "object 1 lacks 'turns' or 'response_ids'"),
        ({"turns": [3], "response_ids": [[10]]}, "object 1 lacks 'turns' or 'response_ids'"),
        ({"turns": ["a"], "response_ids": [[10]], "finished": []}, "object 1: expected .*'finished'"),
        ({"response_ids": [[10]]}, "object 1 lacks 'turns' or 'response_ids'"),
    ],
)
def test_malformed_responses_are_named(experiment, tmp_path, row, message):
    path = runs.write_jsonl(tmp_path / "r.jsonl", [row])
    with pytest.raises(UserError, match=message) as caught:
        respond.import_responses(str(path), experiment.tokenizer, 31)
    assert str(path) in str(caught.value)


def test_an_empty_responses_file_is_refused_and_an_empty_response_is_not(experiment, tmp_path):
    path = runs.write_jsonl(tmp_path / "r.jsonl", [])
    with pytest.raises(UserError, match="holds no responses"):
        respond.import_responses(str(path), experiment.tokenizer, 31)
    runs.write_jsonl(path, [{"turns": ["a"], "response_ids": [[]], "finished": [False]}])
    (found,) = respond.import_responses(str(path), experiment.tokenizer, 31)
    assert not any(found.assistant)
