"""The respond stage with a server that writes the texts: the Markov chain's, as our own decoder's."""

import collections
import json
import threading

import numpy as np
import pytest
import runs
from fakes import Fake
from written import ASSISTANT, END, USER, greedy, ids, stored, trace

from ppow_jax.data import records
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel import preemption
from ppow_jax.serving import connection
from ppow_jax.stages import endpoint, features


def own(prompt, tokens):
    """What the chain writes."""
    return greedy(prompt[-1], tokens), False


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(connection, "_PAUSE", 0.0)


def respond(workdir, fake, **changes):
    """Runs respond alone."""
    known = dict(stages=("respond",), respond__endpoint=fake.url, respond__timeout=5.0)
    return runs.run(workdir, **(known | changes))


def questions(fake) -> collections.Counter:
    """How often each prompt was asked, by what is asked for training: 16 tokens."""
    lengths = ("n_predict", "max_tokens")
    of = [b for b in fake.asked() if any(b.get(k) == 16 for k in lengths)]
    return collections.Counter(json.dumps(b.get("prompt", b.get("messages"))) for b in of)


@pytest.mark.parametrize("kind", ["llamacpp", "vllm", "sglang", "openai"])
def test_a_server_of_each_kind_writes_what_our_decoder_writes(tmp_path, finished, kind, log_lines):
    with Fake(kind, own) as fake:
        respond(tmp_path / "w", fake)
    ours = {r["id"]: r for r in records.Records(finished.workdir / "responses")}
    theirs = stored(tmp_path / "w")
    assert set(theirs) == set(ours) and len(theirs) == 24
    for name, record in theirs.items():
        np.testing.assert_array_equal(record["tokens"], ours[name]["tokens"])
        np.testing.assert_array_equal(record["assistant"], ours[name]["assistant"])
    assert records.shards(tmp_path / "w" / "responses") == ["write-00000", "write-00001"]  # of 16
    bodies = fake.asked()
    assert len(bodies) == 4 + 24  # 4 are compared first
    assert "respond: 64 of 64 tokens of the server's first texts are ours" in log_lines
    how = [b.get("sampling_params", b) for b in bodies]
    assert {h["temperature"] for h in how} == {0.0} and {h["top_p"] for h in how} == {1.0}
    assert {(h["presence_penalty"], h["frequency_penalty"]) for h in how} == {(0.0, 0.0)}
    if kind == "llamacpp":
        assert {(h["repeat_penalty"], h["dry_multiplier"]) for h in how} == {(1.0, 0.0)}
    if kind in ("vllm", "sglang"):
        assert {tuple(h["stop_token_ids"]) for h in how} == {(END,)}
    counts = json.loads((tmp_path / "w" / "responses.json").read_text())
    assert counts["other_ids"] == counts["turns_not_asked"] == 0


def test_features_are_computed_as_of_imported_texts(tmp_path):
    """The chain's are known: tap and hidden are the token, one-hot times sqrt(width)."""
    with Fake("vllm", own) as fake:
        respond(tmp_path / "w", fake)
    assert not (tmp_path / "w" / "features").exists()
    found = features.ensure(runs.build(tmp_path / "w"))
    texts = records.Records(tmp_path / "w" / "responses")
    assert len(found) == len(texts) == 24
    np.testing.assert_allclose(found[3]["hidden"], np.eye(32)[texts[3]["tokens"]] * np.sqrt(32), atol=1e-2)


@pytest.mark.parametrize("kind", ["llamacpp", "vllm", "sglang", "openai"])
def test_a_finished_text_ends_with_the_stop_token_and_a_cut_one_does_not(tmp_path, kind):
    """SGLang's ids lack the token here, those of the others have it."""

    def writes(prompt, tokens):
        return greedy(prompt[-1], tokens)[: 3 if prompt[1] == ids("a")[0] else None], prompt[1] == ids("a")[0]

    with Fake(kind, writes) as fake:
        respond(tmp_path / "w", fake, respond__compared=0)
    found = stored(tmp_path / "w")
    assert found["t0"]["tokens"].tolist()[-4:] == [*greedy(ASSISTANT, 3), END]
    assert found["t0"]["assistant"].sum() == 4
    assert found["t1"]["assistant"].sum() == 16 and END not in found["t1"]["tokens"]


def test_what_follows_a_stop_token_is_dropped(tmp_path):
    with Fake("vllm", lambda prompt, tokens: ([10, END, 11], False)) as fake:
        respond(tmp_path / "w", fake, respond__compared=0)
    assert stored(tmp_path / "w")["t0"]["tokens"].tolist() == [USER, *ids("a ok"), ASSISTANT, 10, END]


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_dialogues_go_on_turn_by_turn(tmp_path, kind):
    prompts = runs.write_jsonl(tmp_path / "p.jsonl", [{"id": "d", "turns": ["ab", "c"]}, {"turns": ["b"]}])
    with Fake(kind, lambda prompt, tokens: (greedy(prompt[-1], 3), True)) as fake:
        respond(tmp_path / "w", fake, respond__prompts=f"p={prompts}", respond__compared=0)
    answer = [*greedy(ASSISTANT, 3), END]
    record = stored(tmp_path / "w")["d"]
    assert record["tokens"].tolist() == [
        *[USER, *ids("ab"), ASSISTANT, *answer],
        *[USER, *ids("c"), ASSISTANT, *answer],
    ]
    assert record["assistant"].tolist() == [0] * 4 + [1] * 4 + [0] * 3 + [1] * 4


def test_a_killed_run_asks_again_only_for_shards_that_are_not_whole(tmp_path, monkeypatch):
    """With two requests at a time and shards of four; killed when the second shard is to be written."""
    monkeypatch.setattr(endpoint, "SHARD", 4)
    write_shard, written = records.write_shard, []

    def killed(directory, name, rows):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(name)
        write_shard(directory, name, rows)

    with Fake("llamacpp", own) as fake:
        changes = dict(respond__compared=0, respond__concurrency=2)
        monkeypatch.setattr(records, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            respond(tmp_path / "w", fake, **changes)
        monkeypatch.setattr(records, "write_shard", write_shard)
        (first,) = records.shards(tmp_path / "w" / "responses")
        before = trace(tmp_path / "w" / "responses" / f"{first}.arrayrecord")
        done = {json.dumps(r["tokens"][:6].tolist()) for r in stored(tmp_path / "w").values()}
        once = questions(fake)
        assert len(done) == 4 and len(once) <= 4 + 4 + 2 + 2
        fake.requests.clear()
        respond(tmp_path / "w", fake, **changes)
        again = questions(fake)
        assert len(again) == 20 and not done & set(again) and set(again.values()) == {1}
        assert trace(tmp_path / "w" / "responses" / f"{first}.arrayrecord") == before
        assert len(stored(tmp_path / "w")) == 24
        fake.requests.clear()
        respond(tmp_path / "w", fake, **changes)
        assert fake.requests == []  # a finished stage asks nothing


def test_several_are_asked_at_a_time_and_a_run_that_is_to_end_ends(tmp_path, monkeypatch):
    together = threading.Barrier(3)  # breaks if fewer come

    def writes(prompt, tokens):
        together.wait(5)
        return own(prompt, tokens)

    def asked(done):
        raise preemption.Stopped(done)

    with Fake("vllm", writes) as fake:
        respond(tmp_path / "a", fake, respond__compared=0, respond__concurrency=3)
        monkeypatch.setattr(endpoint.preemption, "leave", asked)
        with pytest.raises(preemption.Stopped, match="respond is written up to shard 1 of 2"):
            respond(tmp_path / "b", fake, respond__compared=0, respond__concurrency=3)


def test_the_server_may_move_and_requests_may_change(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "SHARD", 4)
    with Fake("vllm", own) as fake:
        fake.before = lambda path, body: (
            (400, {"error": {"message": "no"}}) if len(fake.asked()) > 9 else None
        )
        with pytest.raises(UserError, match=r"400 Bad Request: no; what is finished is kept: mend that"):
            respond(tmp_path / "w", fake, respond__concurrency=1)
    with Fake("llamacpp", own) as other:
        respond(tmp_path / "w", other, respond__concurrency=2, respond__compared=1, respond__timeout=6.0)
    assert len(stored(tmp_path / "w")) == 24 and len(other.asked()) == 1 + 20
    with pytest.raises(
        ConfigError, match=r"^config.respond.endpoint: found '', but stage 'respond' was begun"
    ):
        runs.run(tmp_path / "w", stages=("respond",))


def test_texts_that_are_others_when_they_are_encoded_are_left_out_and_counted(tmp_path, log_lines):
    """Capitals, which the chain's tokenizer does not keep."""

    def spoilt(path, body):
        if body is None or body["messages"][0]["content"] not in ("a ok", "b ok"):
            return None
        choice = {"message": {"content": "Abc"}, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 3}}

    with Fake("openai", own, before=spoilt) as fake:
        respond(tmp_path / "w", fake, respond__compared=0)
    assert set(stored(tmp_path / "w")) == {f"t{i}" for i in range(2, 24)}
    assert json.loads((tmp_path / "w" / "responses.json").read_text())["other_ids"] == 2
    assert "respond: 2 prompts are left out: encoded, the server's text is another" in log_lines


def test_another_model_is_refused_before_anything_is_written(tmp_path):
    with Fake("vllm", lambda prompt, tokens: ([10, 11] * (tokens // 2), False), model="m") as fake:
        with pytest.raises(UserError) as caught:
            respond(tmp_path / "w", fake)
        assert len(fake.asked()) == 4
    said = str(caught.value)
    assert said.startswith("config.respond.endpoint: ") and "of 64 tokens of the first 4 greedy texts" in said
    assert "serve the model of 'markov:0' in place of 'm'" in said
    assert not (tmp_path / "w" / "responses").exists()
    other = Fake("vllm", lambda prompt, tokens: ([999], False))
    with (
        other,
        pytest.raises(UserError, match="token id 999, expected ids below 31; it serves another model"),
    ):
        respond(tmp_path / "x", other)


def test_a_text_that_parts_late_is_no_other_model(tmp_path):
    """As of quantised weights: of 16 tokens the last five are others."""
    with Fake("vllm", lambda prompt, tokens: (greedy(prompt[-1], 11) + [10] * 5, False)) as fake:
        respond(tmp_path / "w", fake)
    assert len(stored(tmp_path / "w")) == 24


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"{"), r"^prompt 't\d+': http.*/v1/completions: found '{', expected JSON"),
        (
            (200, {"choices": [{}]}),
            r"^prompt 't\d+': .*/v1/completions: found .*KeyError.* an answer of vLLM;",
        ),
        ((503, {}), r"^prompt 't\d+': .*/v1/completions: 503 Service Unavailable"),
        (
            (200, {"choices": [{"finish_reason": "stop", "text": "", "token_ids": ["a"]}], "usage": {}}),
            "expected an answer of vLLM",
        ),
    ],
)
def test_a_server_that_fails_on_the_way(tmp_path, answer, message):
    with Fake("vllm", own) as fake:
        fake.before = lambda path, body: answer if len(fake.asked()) > 20 else None
        with pytest.raises(UserError, match=message):
            respond(tmp_path / "w", fake)


def test_a_server_that_dies(tmp_path):
    with Fake("vllm", own) as fake:

        def die(path, body):
            if len(fake.asked()) > 20:
                fake._server.socket.close()
                raise ConnectionResetError

        fake.before = die
        fake._server.handle_error = lambda *_: None
        with pytest.raises(
            UserError, match=r"not reached \(.*\); is the server running\?; what is finished is k"
        ):
            respond(tmp_path / "w", fake)


def test_a_server_that_is_not_there_is_named_before_a_target_is_loaded(tmp_path):
    with Fake("vllm", own) as fake:
        pass
    with pytest.raises(UserError, match=r"^config.respond.endpoint: http.*/v1/models: not reached"):
        respond(tmp_path / "w", fake, target__path="no such target")
    with pytest.raises(ConfigError, match=r"^config.respond.endpoint: found 'x', expected http://HOST:PORT"):
        respond(tmp_path / "w", fake, respond__endpoint="x")


def test_sampled_texts_have_seeds_of_their_own(tmp_path):
    changes = dict(respond__temperature=1.0, train__ppow__temperature=1.0)
    with Fake("llamacpp", own) as fake:
        respond(tmp_path / "a", fake, **changes)
        seeds = [(b["temperature"], b["seed"]) for b in fake.asked()]
        assert len({seed for at, seed in seeds if at == 1.0}) == 24 and seeds[0][0] == 0.0
        fake.requests.clear()
        respond(tmp_path / "b", fake, **changes)
        assert sorted(b["seed"] for b in fake.asked()) == sorted(seed for _, seed in seeds)
