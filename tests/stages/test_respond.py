"""The respond stage: batches and restarts, dialogues turn by turn, imported responses.

The target is the Markov chain, so that greedy text is known: after each letter its likeliest successor.
"""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import runs
from written import ASSISTANT, END, USER, greedy, ids, sampled, stored, trace

from ppow_jax.data import records
from ppow_jax.data.conversations import Conversation, spans
from ppow_jax.data.prompt import Prompt
from ppow_jax.decode.sampling import GREEDY
from ppow_jax.errors import UserError
from ppow_jax.models.target import Target
from ppow_jax.report import measure
from ppow_jax.stages import respond
from ppow_jax.targets import markov

# As the chain's own, but it keeps the case of what it renders.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
    batches = respond.batches_of(prompts, respond.select(experiment, prompts, 8).lengths, 2, 8)
    assert [[p.id for p in batch] for batch in batches] == [["a", "b"], ["long", "two"]]


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
    return respond.converse(experiment, prompts, 4, tokens, GREEDY, jax.random.key(0))


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
    for held in respond.converse(experiment, prompts, 4, 4, GREEDY, jax.random.key(0), "float32"):
        want = np.eye(32)[held.tokens] * np.sqrt(32)
        want[-1] = 0.0  # never read
        np.testing.assert_allclose(held.texts[-1].features["hidden"], want, atol=1e-4)
        np.testing.assert_allclose(held.texts[-1].features["taps"], np.tile(want, 3), atol=1e-4)


# Of what the assistant said before, it keeps two letters.
SHORT = TEMPLATE.replace(
    "m['content'] }}", "m['content'][:2] if m['role'] == 'assistant' else m['content'] }}"
)


def test_a_turn_whose_template_changes_what_was_said_is_a_text_of_its_own(experiment, tmp_path):
    """Written, with its features, and read by `evaluate` as one more turn of the prompt."""
    changed = dataclasses.replace(experiment.tokenizer, template=SHORT)
    experiment = dataclasses.replace(experiment, tokenizer=changed)
    prompts, answer = [Prompt("1", "", ("ab",)), Prompt("2", "", ("a", "bc"))], greedy(ASSISTANT, 4)
    about = (tmp_path / "r", 4, GREEDY, 4)
    respond.write(
        experiment, respond.select(experiment, prompts, 4), *about, kept=tmp_path / "r" / "features"
    )
    begun = [USER, *ids("a"), ASSISTANT]
    again = [*begun, *answer[:2], END, USER, *ids("bc"), ASSISTANT]
    found = {(r["id"], *r["tokens"].tolist()): r for r in records.Records(tmp_path / "r")}
    assert set(found) == {
        ("1", USER, *ids("ab"), ASSISTANT, *answer),
        ("2", *begun, *answer),
        ("2", *again, *answer),
    }
    assert found["2", *again, *answer]["assistant"].tolist() == [0] * len(again) + [1] * 4
    turns = measure.Benchmark("b", prompts, tmp_path / "r").turns(["2"])
    assert [turn.context.tolist() for turn in turns] == [begun, again]
    for turn in turns:  # the chain's taps are known: the token, one-hot times sqrt(width)
        text = [*turn.context, *turn.response]
        want = np.eye(32)[text] * np.sqrt(32)
        want[-1] = 0.0  # never read
        np.testing.assert_allclose(turn.taps, np.tile(want, 3), atol=1e-4)


def test_a_prompt_that_the_template_refuses_is_named_before_any_is_answered(experiment):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    changed = dataclasses.replace(experiment.tokenizer, template=refusing)
    experiment = dataclasses.replace(experiment, tokenizer=changed)
    prompts = [Prompt("fine", "", ("a",)), Prompt("mine", "", ("a",), "be kind")]
    with pytest.raises(UserError, match=r"^prompt 'mine': markov:0: chat template: line 1: no system$"):
        respond.select(experiment, prompts, 4)


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


def with_context(experiment, context: int):
    target = Target(dataclasses.replace(experiment.target.config, context=context))
    return dataclasses.replace(experiment, target=target)


def respond_to(experiment, context: int, rows: list[dict], length: int = 256, **changes) -> dict[str, int]:
    """Runs respond on prompts, with answers of 12 tokens; what is in responses.json."""
    path = runs.write_jsonl(experiment.workdir / "p.jsonl", rows)
    changes = dict(prompts=f"p={path}", max_new_tokens=12) | changes
    chosen = dataclasses.replace(
        experiment.settings,
        respond=dataclasses.replace(experiment.settings.respond, **changes),
        data=dataclasses.replace(experiment.settings.data, length=length, cache_features=False),
    )
    respond.run(dataclasses.replace(with_context(experiment, context), settings=chosen))
    return json.loads((experiment.workdir / "responses.json").read_text())


def test_prompts_that_there_is_no_room_for_are_left_out_and_counted(experiment, caplog):
    """A first turn has two tokens more than its text; 64 - 12 tokens fit into the context, 58 into a text."""
    rows = [{"id": str(n), "turns": ["b" * n]} for n in (57, 56, 51, 50, 1)]
    with caplog.at_level("INFO", logger="ppow_jax"):
        left_out = respond_to(experiment, 64, rows, length=60)
    assert set(stored(experiment.workdir)) == {"50", "1"}
    assert left_out == {"beyond_context": 2, "beyond_data_length": 1, "turns_not_asked": 0, "imported_cut": 0}
    assert (
        "respond: prompts left out: 2 of more than 52 tokens, which with max_new_tokens 12 exceed the t"
        in (caplog.text)
    )
    assert (
        "1 of more than 58 tokens, which with two of an answer exceed config.data.length (raise"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("context", "length", "message"),
    [
        (
            512,
            12,
            "2 of more than 10 tokens, which with two of an answer exceed config.data.length (raise it,",
        ),
        (
            24,
            256,
            "2 of more than 12 tokens, which with max_new_tokens 12 exceed the target's context of 24 (low",
        ),
        (10, 256, "2 of more than 0 tokens, which with max_new_tokens 12 exceed the target's context of 10"),
    ],
)
def test_prompts_of_which_none_has_room(experiment, context, length, message):
    with pytest.raises(UserError) as caught:
        respond_to(experiment, context, [{"turns": ["a" * n]} for n in (12, 30)], length)
    assert str(caught.value).startswith(f"respond.prompts: all 2 prompts are left out: {message}")
    assert not (experiment.workdir / "responses").exists()


def test_a_run_that_is_refused_for_its_prompts_may_use_others(tmp_path):
    long = runs.write_jsonl(tmp_path / "long.jsonl", [{"turns": ["a" * 40]}])
    with pytest.raises(UserError, match=r"^respond.prompts: all 1 prompts are left out: 1 of more than 30 "):
        sampled(tmp_path / "w", respond__prompts=f"p={long}")
    sampled(tmp_path / "w")
    assert len(stored(tmp_path / "w")) == 24


def test_a_prompt_that_the_chat_template_refuses_is_named(experiment):
    template = "{% if messages[0]['content'] == 'b' %}{{ raise_exception('no b') }}{% endif %}x"
    strict = dataclasses.replace(experiment.tokenizer, template=template)
    with pytest.raises(UserError, match=r"^prompt 'p/2': markov:0: chat template: line 1: no b$"):
        respond_to(
            dataclasses.replace(experiment, tokenizer=strict), 512, [{"turns": ["a"]}, {"turns": ["b"]}]
        )


def test_turns_that_are_not_asked_are_counted_also_by_a_run_that_goes_on(experiment, caplog):
    """The first turn has 39 tokens, its second question 28 and the answer 12: one more than the context."""
    rows = [{"turns": ["a" * 25, "b" * 25, "c"]}, {"turns": ["a", "b", "c"]}]
    for _ in range(2):  # the second time all is there
        with caplog.at_level("INFO", logger="ppow_jax"):
            assert respond_to(experiment, 78, rows)["turns_not_asked"] == 2
        assert (
            "respond: 2 later turns were not asked: with an answer they exceed the target's context of 78"
            in (caplog.text)
        )
        caplog.clear()


def test_imported_texts_end_with_the_context(experiment, tmp_path, caplog):
    row = {"id": "long", "turns": ["a"], "response_ids": [[10, 11] * 60]}
    path = runs.write_jsonl(
        tmp_path / "r.jsonl", [row, {"id": "short", "turns": ["a"], "response_ids": [[10]]}]
    )
    with caplog.at_level("INFO", logger="ppow_jax"):
        left_out = respond_to(experiment, 64, [], 200, prompts="", responses=str(path))
    found = stored(experiment.workdir)
    assert len(found["long"]["tokens"]) == len(found["long"]["assistant"]) == 64
    assert found["long"]["assistant"].sum() == 61
    assert found["short"]["tokens"].tolist() == [USER, *ids("a"), ASSISTANT, 10, END]
    assert left_out["imported_cut"] == 1
    assert f"respond: 1 texts of {path} are cut to the 64 tokens of the target's context" in caplog.text


def test_an_import_without_an_id_answers_no_prompt(experiment, tmp_path):
    """Its number was an id before, and prompts are often numbered from 1."""
    path = runs.write_jsonl(tmp_path / "r.jsonl", [{"turns": ["a"], "response_ids": [[10]]}])
    respond_to(experiment, 64, [{"id": 1, "turns": ["a"]}], responses=str(path))
    assert set(stored(experiment.workdir)) == {"respond.responses/1", "1"}


def test_all_files_are_read_before_a_target_is_loaded(tmp_path):
    good = runs.write_jsonl(tmp_path / "good", [{"id": "x", "turns": ["a"], "response_ids": [[10]]}])
    bad = runs.write_jsonl(tmp_path / "bad", [{"turns": ["a"], "response_ids": [[True]]}, {"id": 1}])
    respond.check(runs.make_settings(tmp_path, respond__prompts=f"p={good}", respond__responses=str(good)))
    for changes, message in (
        (dict(respond__prompts=f"p={bad}"), "bad:2: found the fields none"),
        (dict(respond__responses=str(bad)), "bad:2: found the fields none"),
        (dict(respond__responses=str(tmp_path)), "respond.responses: .* is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            respond.check(runs.make_settings(tmp_path, **changes))


def test_padding_repeats_the_shortest_prompt():
    padded, lengths = respond.pad([[7] * 33, [8, 9]], 4)
    assert padded.shape == (4, 40) and padded.dtype == np.int32
    assert lengths.tolist() == [33, 2, 2, 2]
    assert padded[3, :3].tolist() == [8, 9, 0]
