"""The cost model: which shape it favours follows from the costs; and what it measures is time."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small

from ppow_jax.decode import cost, profile, shapes
from ppow_jax.decode.cost import Costs
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.profile import Texts
from ppow_jax.decode.simulate import simulate
from ppow_jax.decode.tree import Candidates

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)


def costs(slope: float, level: float, overhead: float = 0.0) -> Costs:
    """A pass over n tokens costs 1 + slope (n - 1) steps, a level of the drafter `level` at any width."""
    passes = {n: 1 + slope * (n - 1) for n in SIZES}
    return Costs(1.0, passes, level, {w: level for w in (1, 2, 4, 10)}, {1: 0.0, 48: overhead})


@pytest.fixture(scope="module")
def texts_of(chain) -> Texts:
    """Greedy texts of the chain."""
    rows = np.array([[3, *small.walk(5 + i, 28)] for i in range(3)], np.int32)
    taps = small.forward(chain.target, chain.params, rows)[0].taps[:, 0]
    return Texts(taps, rows, np.full(3, 2, np.int32), np.full(3, 25, np.int32))


def best(chain, texts: Texts, wrong: tuple[int, ...], prices: Costs) -> list[cost.Choice]:
    drafter, weights = small.flawed(chain, wrong)
    return cost.choices(prices, drafter, weights, texts)


def test_a_round_costs_its_pass_its_levels_and_the_rest():
    prices = Costs(1.0, {1: 1.0, 4: 1.5, 16: 3.0}, 0.25, {1: 0.1, 4: 0.2, 10: 0.4}, {4: 0.1, 14: 0.3})
    assert prices.round(4, 3, 1) == pytest.approx(1.5 + 0.25 + 2 * 0.1 + 0.1)
    assert prices.round(9, 3, 3) == pytest.approx(3.0 + 0.25 + 2 * 0.2 + 0.2)  # as 16 tokens, as 4 windows
    assert prices.round(16, 1, 5) == pytest.approx(3.0 + 0.25 + 0.3)


@pytest.mark.slow
def test_a_drafter_that_is_always_right_drafts_long_chains_where_they_are_cheap(chain, texts_of):
    found = best(chain, texts_of, (), costs(0.0, 0.0))
    assert found[0].shape == shapes.chain(10)
    assert found[0].tau == found[0].speedup == pytest.approx(11)  # 22 tokens after the first in two rounds


@pytest.mark.slow
def test_dear_passes_or_dear_drafts_shorten_them(chain, texts_of):
    assert best(chain, texts_of, (), costs(0.0, 2.0))[0].shape == shapes.chain(1)
    assert best(chain, texts_of, (), costs(3.0, 0.0))[0].shape == shapes.chain(1)
    assert best(chain, texts_of, (), costs(0.5, 0.0))[0].shape == shapes.chain(
        7
    )  # 22 tokens in 3 rounds of 4.5
    assert best(chain, texts_of, (), costs(0.5, 0.0, 40.0))[0].shape == shapes.chain(1)


def test_what_is_predicted_of_a_shape_is_its_simulation(chain, texts_of):
    drafter, weights = small.flawed(chain, (8, 19, 30))
    found = cost.choices(costs(0.1, 0.1), drafter, weights, texts_of)
    assert [c.speedup for c in found] == sorted((c.speedup for c in found), reverse=True)
    assert len({c.shape for c in found}) == len(found) > 60
    for choice in (*found[:3], *found[-3:]):
        emitted = np.asarray(simulate(drafter, weights, *texts_of, choice.shape).emitted)
        assert choice.tau == pytest.approx(emitted.sum() / (emitted > 0).sum())
        assert choice.speedup == pytest.approx(choice.tau / choice.seconds)


@pytest.mark.parametrize("seed", range(3))
def test_equally_likely_candidates_enter_a_tree_in_their_order(seed):
    rng, text, top_k = np.random.default_rng(seed), np.array([0, 1, 0]), 2
    parents = np.array([0, 0, 1, 1, 2, 2, 3, 3, 6, 6])  # two of level 1, four of level 2 and of level 3
    tokens, scores = np.tile([0, 1], 5), np.zeros(10)
    for i, parent in enumerate(parents):
        scores[i] = (scores[parent - 1] if parent else 0) - rng.integers(2)  # ties everywhere
    found = Candidates(*map(jnp.asarray, (tokens, parents, scores)))
    needed = np.asarray(profile._way(found, jnp.asarray(text), jnp.array([True, True, True]), top_k))
    way = [0, 3, None]  # the text: candidate 1, then 4, whose continuations the beam has not
    for levels, end in enumerate((2, 6, 10)):
        order = sorted(range(end), key=lambda i: -scores[i]).index  # stable, as top_k is
        for level, node in enumerate(way):
            want = 2 + order(node) if node is not None and level <= levels else profile.NEVER
            assert needed[levels, level] == want


def test_a_measurement_that_other_work_falls_into_is_a_time_all_the_same(monkeypatch):
    """2 repeats take 0.15 s: 4 more are measured. Then these take 1.2 s, but the 2 are disturbed."""
    ticks = iter([0, 9, 0, 0.15, 0, 0.15, 0, 0.75, 0, 5, 0, 1.2])  # compilation, 2; then 2 and 6, twice
    monkeypatch.setattr(cost, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    timer = cost._in_loop(lambda x: x + 1, jnp.zeros(()))
    assert timer() == pytest.approx((0.75 - 0.15) / 4)
    assert timer() == pytest.approx(1.2 / 6)


def test_the_parts_of_a_round_are_a_draft_and_a_pass(tiny, monkeypatch):
    """In operations: their sum, and no more than a round has."""

    def operations(once, begin, *arguments, many=0):
        return jax.jit(once).lower(begin, *arguments).compile().cost_analysis()["flops"]

    monkeypatch.setattr(cost, "_in_loop", operations)
    drafting, slots = Eagle(tiny.drafter, shapes.Dynamic(3, 4, 2)), 32
    verification = cost.target_timer(tiny.target, tiny.params, drafting.tokens, slots)
    drafts = cost.draft_timer(tiny.target, drafting, tiny.weights, slots)
    of_round = (tiny.target, tiny.params, drafting, tiny.weights, slots)
    assert cost.parts_timer(*of_round) == pytest.approx(verification + drafts, rel=0.05)
    assert verification + drafts < cost.round_timer(*of_round) < 1.1 * (verification + drafts)


@pytest.mark.slow
def test_measured_costs_are_times(tiny, monkeypatch):
    monkeypatch.setattr(cost, "_SIZES", (1, 4, 32))
    monkeypatch.setattr(cost, "_WIDTHS", (1, 4))
    monkeypatch.setattr(cost, "_PROBES", (shapes.chain(3), shapes.Dynamic(24, 3, 4)))
    found = cost.measure(tiny.target, tiny.params, tiny.drafter, tiny.weights, slots=96)
    assert set(found.target) == {1, 4, 32} and set(found.level) == {1, 4} and set(found.overhead) == {4, 24}
    assert found.step > 0 and found.first > 0 and all(s > 0 for s in found.target.values())
    assert found.target[32] > found.target[1]
    assert min(found.overhead.values()) >= 0


@pytest.mark.slow
def test_auto_decodes_with_what_it_finds_and_the_report_shows_what_it_expected(
    finished, tmp_path, monkeypatch
):
    workdir = tmp_path / "workdir"
    shutil.copytree(finished.workdir, workdir)
    for name in ("train", "chat", "maths"):
        shutil.copy(finished.workdir.parent / f"{name}.jsonl", tmp_path)
    monkeypatch.setattr(cost, "measure", lambda *_: costs(0.01, 0.05))
    changes = {"stages": ("evaluate",), "decode__shape": "auto"}  # evaluated already, but not so
    runs.run(workdir, **changes)
    report = json.loads((workdir / "report.json").read_text())
    shape = shapes.parse(report["decode_shape"])
    assert report["prediction"]["drafter"] == "cst"
    assert report["prediction"]["speedup"] > 1 and 1 <= report["prediction"]["tau"] <= shape.depth + 1
    text = (workdir / "report.md").read_text()
    assert f"decoded for real at temperature 0, {report['decode_shape']}" in text
    assert (
        f"speedup {report['prediction']['speedup']:.2f}x (reading the prompt not counted), measured" in text
    )
    before = json.loads((finished.workdir / "report.json").read_text())
    for stage, drafter in report["drafters"].items():
        for name, benchmark in drafter["benchmarks"].items():
            assert benchmark["tokens_per_s"] != before["drafters"][stage]["benchmarks"][name]["tokens_per_s"]
            assert benchmark["identical_outputs"] == benchmark["same_rounds_as_simulated"] == 2
    monkeypatch.setattr(cost, "measure", None)  # it is not asked again
    stages = json.loads((workdir / "stages.json").read_text())
    del stages["evaluate"]
    (workdir / "stages.json").write_text(json.dumps(stages))
    runs.run(workdir, **changes)
    assert json.loads((workdir / "report.json").read_text())["decode_shape"] == report["decode_shape"]
    runs.run(workdir, stages=("evaluate",), decode__shape="chain:1")  # another shape, another evaluation
    again = json.loads((workdir / "report.json").read_text())
    assert again["decode_shape"] == "chain:1" and again["prediction"] is None
    for stage, drafter in again["drafters"].items():
        for name, benchmark in drafter["benchmarks"].items():
            assert benchmark["decode_tau"] < report["drafters"][stage]["benchmarks"][name]["decode_tau"]
