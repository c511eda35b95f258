"""The stage: report.json's contract, what is measured again and what is not, and the windows it shows."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import runs

from ppow_jax.data.conversations import Conversation, Text
from ppow_jax.data.prompts import Prompt
from ppow_jax.decode import shapes
from ppow_jax.decode.rounds import Round
from ppow_jax.drafters.eagle3 import weights_of
from ppow_jax.errors import UserError
from ppow_jax.parallel import preemption
from ppow_jax.report import contents, measure, samples
from ppow_jax.report.samples import as_text
from ppow_jax.stages import evaluate, respond
from ppow_jax.targets.tokenizer import Tokenizer
from ppow_jax.training import drafters

BENCHMARK = {
    "tau": float, "tau_ci95": list, "accepted_per_position": list, "rounds": int, "tokens": int,
    "tokens_per_s": float, "tokens_per_s_autoregressive": float, "speedup": float,
    "identical_outputs": int, "prompts": int,
}  # fmt: skip


def report(workdir) -> dict:
    return json.loads((workdir / "report.json").read_text())


def test_a_run_writes_every_field_of_the_contract(finished):
    found = report(finished.workdir)
    assert found["schema"] == 2
    assert isinstance(found["target"], dict) and isinstance(found["device"], dict)
    assert found["gamma_measured"] > 0
    assert set(found["drafters"]) == {"supervise", "cst"}
    assert found["control"] == "cst" and found["runs"] == {} and found["tree"] is None
    nothing = {"beyond_context": 0, "beyond_data_length": 0, "turns_not_asked": 0}
    assert found["left_out"] == {
        "respond": nothing | {"imported_cut": 0},
        "evaluate": {"maths": nothing, "chat": nothing},
    }
    assert {"respond", "train/supervise", "train/cst"} <= set(found["stages"])
    assert all(of["seconds"] > 0 and of["peak_bytes"] > 2**26 for of in found["stages"].values())
    for name, drafter in found["drafters"].items():
        run = finished.settings.train[name]
        assert (drafter["steps"], drafter["start"], drafter["seed"]) == (run.steps, run.start, run.seed)
        assert drafter["lineage"] == (["supervise"] if name == "supervise" else ["supervise", "cst"])
        assert drafter["seconds"] > 0 and len(drafter["params_sha256"]) == 64
        assert list(drafter["benchmarks"]) == ["maths", "chat"]
        for benchmark in drafter["benchmarks"].values():
            assert {k: type(benchmark[k]) for k in BENCHMARK} == BENCHMARK
            low, high = benchmark["tau_ci95"]
            assert 1 <= low <= benchmark["tau"] <= high <= 4
            assert benchmark["tau"] == pytest.approx(benchmark["tokens"] / benchmark["rounds"])
            assert len(benchmark["accepted_per_position"]) == 3  # evaluate.window
            # float32: greedy decoding with a drafter repeats autoregressive text, round by round
            assert benchmark["identical_outputs"] == benchmark["prompts"] == 2
            assert benchmark["same_rounds_as_simulated"] == 2
            assert ("difference" in benchmark) == (name == "supervise")
        for key in ("tau", "speedup"):
            values = [b[key] for b in drafter["benchmarks"].values()]
            assert drafter["mean"][key] == pytest.approx(sum(values) / 2)
    hashes = [d["params_sha256"] for d in found["drafters"].values()]
    assert hashes[0] != hashes[1]
    # the prompts answer with 16 tokens each, of which the target's prefill writes one
    totals = [b["tokens"] for b in found["drafters"]["cst"]["benchmarks"].values()]
    assert totals == [3 * 15, 4 * 15]
    assert "| cst | mean |" in (finished.workdir / "report.md").read_text()
    assert len(list((finished.workdir / "plots").glob("*.png"))) == 5
    assert "<svg" in (finished.workdir / "report.html").read_text()


def test_a_drafter_that_is_not_trained_to_its_end_is_left_out(finished, tmp_path, caplog):
    """Its newest checkpoint, the last of 30 steps, is gone."""
    shutil.copytree(finished.workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "supervise" / "30")
    experiment = runs.build(tmp_path / "w")
    with caplog.at_level("WARNING", logger="ppow_jax"):
        assert [c.run for c in evaluate.find_candidates(experiment)] == ["cst"]
    assert "supervise is left out" in caplog.text and "at step 20 of 30" in caplog.text
    with pytest.raises(UserError, match="the run 'supervise' is at step 20 of 30; train it to its end"):
        drafters.load(experiment, "supervise")


def test_differences_are_those_of_the_benchmarks(finished):
    one, other = (report(finished.workdir)["drafters"][name] for name in ("supervise", "cst"))
    pairs = [(one["benchmarks"][b], other["benchmarks"][b]) for b in one["benchmarks"]]
    for ours, control in [*pairs, (one["mean"], other["mean"])]:
        for key, ends in (("tau", "ci95"), ("speedup", "speedup_ci95")):
            value, (low, high) = ours["difference"][key], ours["difference"][ends]
            assert value == pytest.approx(ours[key] - control[key])
            assert low <= value <= high


def test_windows_are_the_texts_that_the_target_wrote(finished):
    shown = json.loads((finished.workdir / "evaluate" / "windows.json").read_text())["samples"]
    assert [(s["benchmark"], s["prompt"]) for s in shown] == [
        ("maths", "m0"), ("chat", "c0"), ("maths", "m1"), ("chat", "c1"), ("maths", "m2"),
    ]  # fmt: skip
    experiment = runs.build(finished.workdir)
    for sample in shown:
        (directory,) = (finished.workdir / "evaluate").glob(f"{sample['benchmark']}-*")
        benchmark = measure.Benchmark("", [Prompt(sample["prompt"], "", ())], directory)
        (turn,) = benchmark.turns()
        text = sample["first"] + "".join(r["accepted"] + r["own"] for r in sample["rounds"])
        assert text == experiment.tokenizer.decode(turn.response.tolist())
        assert not sample["cut"]
        for r in sample["rounds"]:  # a token is a letter
            assert len(r["accepted"]) == r["count"]
            assert len(r["refused"]) + len(r["dropped"]) == r["drafted"] - r["count"]
            assert len(r["refused"]) == (r["count"] < r["drafted"])


class Calls:
    """What was measured: (kind, drafters, shape)."""

    def __init__(self, monkeypatch) -> None:
        self.made: list[tuple] = []
        simulate_all, decode_all = measure.simulate_all, measure.decode_all

        def simulated(experiment, candidates, turns, shape):
            self.made.append(("simulated", [c.run for c in candidates], shapes.name(shape)))
            return simulate_all(experiment, candidates, turns, shape)

        def decoded(experiment, candidates, turns, shape):
            self.made.append(("decoded", [c.run for c in candidates], shapes.name(shape)))
            return decode_all(experiment, candidates, turns, shape)

        monkeypatch.setattr(measure, "simulate_all", simulated)
        monkeypatch.setattr(measure, "decode_all", decoded)
        monkeypatch.setattr(evaluate.cost, "measure_gamma", lambda *about: 0.25)

    def take(self) -> list[tuple]:
        made, self.made = self.made, []
        return made


@pytest.fixture
def calls(monkeypatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of the finished workdir, beside the same prompt files."""
    for path in finished.workdir.parent.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    return shutil.copytree(finished.workdir, tmp_path / "w")


def stage(workdir, **changes) -> dict:
    """Evaluates and reads the report."""
    experiment = runs.build(workdir, **changes)
    with jax.set_mesh(experiment.mesh):
        evaluate.run(experiment)
    return report(workdir)


def test_what_is_known_is_not_measured_again(finished, workdir, calls):
    again = stage(workdir)
    assert calls.take() == []
    before = report(finished.workdir)
    assert again["drafters"] == before["drafters"] and again["gamma_measured"] == 0.25

    # one drafter is new: nothing of the other is simulated, but plain decoding is timed again beside it
    for path in (workdir / "evaluate").rglob("cst-*.json"):
        path.unlink()
    again = stage(workdir)
    parts = [
        ("simulated", ["cst"], "chain:3"),
        ("simulated", ["cst"], "chain:2"),
        ("decoded", ["cst"], "chain:2"),
    ]
    assert sorted(calls.take()) == sorted(parts * 2)
    assert (
        again["drafters"]["supervise"]["benchmarks"]["chat"]["speedup"]
        == (before["drafters"]["supervise"]["benchmarks"]["chat"]["speedup"])
    )
    ours, theirs = (r["drafters"]["cst"]["benchmarks"]["chat"] for r in (again, before))
    assert ours["tau_ci95"] == theirs["tau_ci95"] and ours["speedup"] != theirs["speedup"]


def test_trees_are_measured_beside_what_is_known(workdir, calls):
    found = stage(
        workdir, evaluate__tree="tree:6x2x3", evaluate__control="supervise", runs=("supervise", "cst")
    )
    assert calls.take() == [("simulated", ["supervise", "cst"], "tree:6x2x3")] * 2
    assert found["tree"] == "tree:6x2x3" and found["control"] == "supervise"
    chain, trees = (found["drafters"]["cst"]["mean"][key] for key in ("difference", "difference_tree"))
    for name, drafter in found["drafters"].items():
        for result in (*drafter["benchmarks"].values(), drafter["mean"]):
            low, high = result["tau_tree_ci95"]
            assert low <= result["tau_tree"] <= high
            assert ("difference_tree" in result) == (name == "cst")
        assert drafter["mean"]["tau_tree"] > 1.5  # three guesses at two tokens
    assert set(chain) > set(trees) == {"tau", "ci95"}
    assert "tree difference" in (workdir / "report.md").read_text()


def test_what_the_template_gets_and_system_messages_decide_which_texts_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.respond, "write", lambda *_, **__: None)
    experiment = runs.build(tmp_path / "w")

    def name(*prompts: Prompt, variables: str = "") -> str:
        target = dataclasses.replace(experiment.settings.target, template_variables=variables)
        settings = dataclasses.replace(experiment.settings, target=target)
        chosen = dataclasses.replace(experiment, settings=settings)
        return evaluate.write_texts(chosen, "b", list(prompts)).directory.name

    asked = Prompt("1", "", ("a",))
    assert name(asked) == name(dataclasses.replace(asked, category="c", answers=("x",)))
    others = {name(Prompt("1", "", ("a",), "be kind")), name(asked, variables='{"enable_thinking": false}')}
    assert len(others | {name(asked)}) == 3


def test_a_stopped_evaluation_goes_on_with_the_next_benchmark(workdir, calls, monkeypatch):
    for path in (workdir / "evaluate").rglob("*-*.json"):
        path.unlink()
    (workdir / "report.json").unlink()

    def stop(done: str) -> None:
        raise preemption.Stopped(done)

    with monkeypatch.context() as patch:
        patch.setattr(preemption, "leave", stop)
        with pytest.raises(preemption.Stopped, match="evaluate is done with maths"):
            stage(workdir)
    assert len(calls.take()) == 3 and not (workdir / "report.json").exists()
    stage(workdir)
    assert len(calls.take()) == 3  # of chat
    assert list(report(workdir)["drafters"]["cst"]["benchmarks"]) == ["maths", "chat"]


def test_sampled_answers_are_simulated_as_they_are_decoded(workdir):
    """tau of the simulation and of real decoding, of 24 answers of 64 tokens, differ by chance alone."""
    rows = [{"id": f"t{i}", "turns": [x + " ok"]} for i, x in enumerate(runs.LETTERS)]
    prompts = runs.write_jsonl(workdir.parent / "some.jsonl", rows)
    changes = dict(runs=("supervise",), evaluate__prompts=f"e={prompts}", evaluate__max_new_tokens=64)
    changes |= dict(evaluate__decode_prompts=24, export__drafter="supervise")
    greedy = stage(workdir, **changes)["drafters"]["supervise"]["benchmarks"]["e"]
    changes |= dict(decode__sampling__temperature=0.7)
    of = stage(workdir, **changes)["drafters"]["supervise"]["benchmarks"]["e"]
    assert of["tau"] < greedy["tau"] - 0.1
    assert of["tau"] == pytest.approx(of["decode_tau"], abs=0.1)
    assert len(list((workdir / "evaluate").glob("e-*"))) == 2  # greedy answers, and sampled ones
    assert not {"same_rounds_as_simulated", "identical_outputs"} & set(of)  # other texts each time
    tree = r"^config.evaluate.tree: found 'tree:6x2x2', expected '' with decode"
    with pytest.raises(UserError, match=tree):
        runs.run(workdir, stages=("evaluate",), evaluate__tree="tree:6x2x2", **changes)


def test_without_its_control_a_report_compares_nothing(workdir, calls):
    found = stage(workdir, runs=("supervise",))
    assert found["control"] is None and list(found["drafters"]) == ["supervise"]
    assert "difference" not in found["drafters"]["supervise"]["mean"]
    assert calls.take() == []


@pytest.fixture(scope="module")
def measured(finished):
    """The experiment, the trained drafters as candidates, and a benchmark whose texts are there."""
    experiment = runs.build(finished.workdir)
    (directory,) = (finished.workdir / "evaluate").glob("chat-*")
    prompts = [Prompt(f"c{i}", "", ("?",)) for i in range(4)]
    return experiment, evaluate.find_candidates(experiment), measure.Benchmark("chat", prompts, directory)


def test_prompts_beyond_the_context_show_before_any_work(tmp_path, caplog):
    """300 tokens and 256 of an answer are beyond the chain's 512."""
    rows = [{"id": "ok", "turns": ["a"]}, {"id": "long", "turns": ["a" * 300]}]
    some = runs.write_jsonl(tmp_path / "some.jsonl", rows)
    none = runs.write_jsonl(tmp_path / "none.jsonl", rows[1:])
    changes = dict(evaluate__prompts=f"e={some}", evaluate__max_new_tokens=256)
    experiment = runs.build(tmp_path / "w", **changes)
    with caplog.at_level("WARNING", logger="ppow_jax"):
        evaluate.check_target(experiment)
    assert "evaluate.prompts: e: prompts left out: 1 of more than 256 tokens, which with" in caplog.text
    changes["evaluate__prompts"] = f"e={some},f={none}"
    with pytest.raises(
        UserError, match=r"^evaluate.prompts: f: all 1 prompts are left out: 1 of more than 256"
    ):
        evaluate.check_target(runs.build(tmp_path / "w", **changes))


def test_a_benchmark_says_what_it_leaves_out(tmp_path, monkeypatch):
    experiment = runs.build(tmp_path / "w")
    monkeypatch.setattr(respond, "converse", lambda experiment, prompts, *about: [
        Conversation(p, [Text([1, 2], [False, True], {"taps": np.zeros((2, 1)), "hidden": np.zeros((2, 1))})])
        for p in prompts
    ])  # fmt: skip
    prompts = [Prompt("a", "", ("a", "b", "c")), Prompt("b", "", ("b" * 600,))]
    found = evaluate.write_texts(experiment, "x", prompts)
    assert found.left_out == {"beyond_context": 1, "beyond_data_length": 0, "turns_not_asked": 2}
    assert [turn.prompt for turn in found.turns()] == []  # of one token each


def test_texts_depend_on_the_system_message_and_old_ones_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(respond, "write", lambda *about, **more: {})
    experiment = runs.build(tmp_path / "w")
    plain = evaluate.write_texts(experiment, "x", [Prompt("a", "", ("a",))])
    briefed = evaluate.write_texts(experiment, "x", [Prompt("a", "", ("a",), "Be brief.")])
    taps = experiment.target.config.taps
    identity = json.dumps([16, "float32", taps, [("a", ("a",))]])  # as it was before there were any
    assert plain.directory.name == f"x-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    assert briefed.directory != plain.directory


@pytest.mark.slow
def test_drafters_of_other_shapes_are_measured_side_by_side(measured):
    experiment, candidates, benchmark = measured
    settings = dataclasses.replace(experiment.settings.drafter, mlp_hidden=24, induction=False)
    other = dataclasses.replace(
        experiment, settings=dataclasses.replace(experiment.settings, drafter=settings)
    )
    made = drafters.fresh(other, np.arange(4, 24), None, seed=1)
    weights = weights_of(made.params, experiment.target_params, made.vocab)
    new = measure.Candidate("new", made.drafter, weights, 0, 0.0, measure.params_sha256(made.params))
    turns, both = benchmark.turns()[:2], [candidates[0], new]
    found = measure.simulate_all(experiment, both, turns, shapes.chain(2))
    alone = measure.simulate_all(experiment, both[:1], turns, shapes.chain(2))
    assert [r.emitted.tolist() for r in alone["supervise"]] == [
        r.emitted.tolist() for r in found["supervise"]
    ]
    assert sum(len(r.emitted) for r in found["new"]) > sum(len(r.emitted) for r in found["supervise"])
    decoded = measure.decode_all(experiment, both, turns, shapes.chain(2))
    for name in ("supervise", "new"):
        assert [d.tokens.tolist() for d in decoded[name]] == [t.response.tolist() for t in turns]
        assert [d.emitted.tolist() for d in decoded[name]] == [r.emitted.tolist() for r in found[name]]


def test_whatever_drafts_depend_on_is_part_of_a_results_name(measured, monkeypatch):
    _, (first, _), _ = measured
    names = {json.dumps(first.identity)}
    vocab = first.weights._replace(vocab=first.weights.vocab + 1)
    shape = dataclasses.replace(first.drafter.config, dtype="bfloat16")
    for change in (
        dict(sha256="0" * 64),
        dict(weights=vocab),
        dict(drafter=dataclasses.replace(first.drafter, config=shape)),
    ):
        names.add(json.dumps(dataclasses.replace(first, **change).identity))
    assert len(names) == 4
    assert dataclasses.replace(first, run="other", seconds=3.0).identity == first.identity


def test_another_machine_times_again_but_does_not_simulate_again(workdir, calls, monkeypatch):
    here = contents.device()
    monkeypatch.setattr(contents, "device", lambda: here | {"kind": "abacus"})
    stage(workdir)
    assert sorted(calls.take()) == sorted(
        [("simulated", ["supervise", "cst"], "chain:2"), ("decoded", ["supervise", "cst"], "chain:2")] * 2
    )


def test_answers_of_a_single_token_leave_nothing_to_draft(measured, tmp_path, monkeypatch):
    experiment, candidates, benchmark = measured
    monkeypatch.setattr(measure.Benchmark, "turns", lambda self: [])
    empty = dataclasses.replace(benchmark, directory=tmp_path)
    with pytest.raises(UserError, match=r"config.evaluate.prompts: 'chat' has no answer of two tokens"):
        measure.measure(experiment, candidates, shapes.chain(2), empty)


def test_samples_are_of_the_prompts_that_they_name(measured, monkeypatch):
    """The chain answers all prompts alike, so the texts cannot tell."""
    experiment, candidates, benchmark = measured
    assert {turn.prompt for turn in benchmark.turns(["c2", "c1"])} == {"c1", "c2"}
    monkeypatch.setattr(samples, "as_text", lambda experiment, turn, rounds: {"turn": turn.prompt})
    found = samples.samples(experiment, candidates[0], [benchmark], 3, 8)
    assert [(s["prompt"], s["turn"]) for s in found] == [("c0", "c0"), ("c1", "c1"), ("c2", "c2")]


class Bytes(Tokenizer):
    """A tokenizer whose tokens are bytes, and which drops a first space."""

    def __init__(self) -> None:
        pass

    def decode(self, ids: list[int], special: bool = True) -> str:
        return bytes(ids).decode(errors="replace").removeprefix(" ")


def test_windows_become_text_even_where_tokens_are_parts_of_characters():
    said = list("Ab cdé".encode())
    turn = measure.Turn("", np.array([1]), np.array(said), *np.zeros((2, 1, 1)))

    class Experiment:
        tokenizer = Bytes()

    rounds = [
        Round(list(b"b x y"), 2, list(b"c")),  # a space is accepted, x refused
        Round(list(b"d\xc3"), 2, [0xA9]),  # half of a letter is drafted, the target adds the other
    ]
    found = as_text(Experiment(), turn, rounds)
    assert found["first"] == "A" and not found["cut"]
    assert [(r["accepted"], r["refused"], r["dropped"], r["own"]) for r in found["rounds"]] == [
        ("b ", "x", " y", "c"), ("d", "", "", "é"),
    ]  # fmt: skip
    assert [(r["drafted"], r["count"]) for r in found["rounds"]] == [(5, 2), (2, 2)]
    assert as_text(Experiment(), turn, rounds[:1])["cut"]
