"""The report: statistics on hand-worked rounds, report.json's contract, report.md and the plots."""

import json

import numpy as np
import pytest

from ppow_jax import report
from ppow_jax.report import TurnDecoded, TurnRounds

PNG = b"\x89PNG"


def rounds(emitted: list[int], accepted: list[int], offered: list[int]) -> TurnRounds:
    return TurnRounds(*(np.array(x, np.int32) for x in (emitted, accepted, offered)))


def simple(*emitted: int) -> TurnRounds:
    """Rounds that accept all but the bonus token of what they emit, of three that were offered."""
    return rounds(list(emitted), [e - 1 for e in emitted], [3] * len(emitted))


def decoded(prompt: str, tokens: list[int], emitted: list[int], seconds: float) -> TurnDecoded:
    return TurnDecoded(prompt, np.array(tokens), np.array(emitted), seconds)


def test_tau_is_the_micro_average_over_rounds():
    """6 tokens in 2 passes and 4 in 4 are 10 / 6, not the mean of 3 and 1."""
    found = report.acceptance(["a", "b"], [simple(4, 2), simple(1, 1, 1, 1)], 3)
    assert found["tau"] == pytest.approx(10 / 6)
    assert (found["tokens"], found["rounds"]) == (10, 6)


def test_interval_resamples_prompts():
    """Of two prompts a resample is aa (tau 3), ab or ba (10 / 6), bb (1), each bb and aa in a quarter."""
    two = report.acceptance(["a", "b"], [simple(4, 2), simple(1, 1, 1, 1)], 3)
    assert two["tau_ci95"] == [1.0, 3.0]
    # Turns of one prompt belong together: there is nothing to resample.
    one = report.acceptance(["a", "a"], [simple(4, 2), simple(1, 1, 1, 1)], 3)
    assert one["tau_ci95"] == pytest.approx([10 / 6, 10 / 6])
    assert one["tau"] == two["tau"]


def test_interval_narrows_with_the_prompts():
    """400 prompts, half with tau 1 and half with tau 2, in one pass each: sd of the mean 0.025."""
    found = report.acceptance([str(i) for i in range(400)], [simple(1 + i % 2) for i in range(400)], 3)
    assert found["tau"] == 1.5
    assert found["tau_ci95"] == pytest.approx([1.5 - 0.049, 1.5 + 0.049], abs=0.006)


def test_acceptance_by_position_counts_only_what_was_offered():
    found = report.acceptance(["a", "b"], [rounds([3, 1], [2, 0], [3, 3]), rounds([2], [1], [1])], 4)
    # position 1: 2 of 3 rounds; position 2: 1 of the 2 that offered one; 3: none of 2; 4: never offered
    assert found["accepted_per_position"] == pytest.approx([2 / 3, 1 / 2, 0, 0])


def test_speed_and_identity_by_prompt():
    plain = [
        decoded("a", [1, 2, 3, 4], [1, 1, 1], 2.0),
        decoded("a", [5, 6], [1], 1.0),
        decoded("b", [7, 8], [1], 1.0),
    ]
    drafted = [
        decoded("a", [1, 2, 3, 9], [2, 1], 1.0),  # one turn differs: prompt a does
        decoded("a", [5, 6], [1], 0.5),
        decoded("b", [7, 8], [1], 0.5),
    ]
    expected = [np.array([2, 1]), np.array([1]), np.array([1, 1])]
    found = report.speed(plain, drafted, expected)
    assert found == {
        "tokens_per_s": 4.0,  # 8 tokens in 2 s
        "tokens_per_s_autoregressive": 2.0,  # 8 in 4
        "speedup": 2.0,
        "decode_tau": 5 / 4,
        "identical_outputs": 1,
        "same_rounds_as_simulated": 1,
        "prompts": 2,
    }


def test_the_mean_is_over_benchmarks():
    assert report.mean({"a": {"tau": 2.0, "speedup": 1.5}, "b": {"tau": 5.0, "speedup": 0.5}}) == {
        "tau": 3.5,
        "speedup": 1.0,
    }


SAMPLED = {"temperature": 0.7, "top_k": 0, "top_p": 0.9}


def hand_made() -> dict:
    benchmark = {
        "tau": 2.25, "tau_ci95": [2.0, 2.5], "accepted_per_position": [0.75, 0.5], "rounds": 40,
        "tokens": 90, "tokens_per_s": 30.0, "tokens_per_s_autoregressive": 20.0, "speedup": 1.5,
        "identical_outputs": 7, "prompts": 8, "decode_tau": 1.75,
    }  # fmt: skip
    drafter = {
        "params_sha256": "0123456789abcdef", "steps": 30, "seconds": 75.0,
        "benchmarks": {"chat": benchmark, "maths": benchmark | {"tau": 3.25, "speedup": 2.5}},
        "mean": {"tau": 2.75, "speedup": 2.0},
    }  # fmt: skip
    return {
        "schema": 1,
        "target": {"path": "markov:0", "dtype": "float32"},
        "device": {"platform": "cpu", "kind": "abacus", "count": 1, "cores": 2, "jax": "0.1"},
        "window": 3, "decode_shape": "chain:2", "decode_sampling": SAMPLED, "gamma_measured": 0.1234,
        "drafters": {"supervise": drafter, "ppow": drafter},
    }  # fmt: skip


def test_markdown_has_a_row_a_benchmark_and_a_mean_row():
    text = report.markdown(hand_made()).splitlines()
    for stage in ("supervise", "ppow"):
        at = text.index(
            f"| {stage} | chat | 2.250 | [2.000, 2.500] | 40 | 1.750 | 30.0 | 20.0 | 1.50x | 7/8 |"
        )
        assert text[at + 1].startswith(f"| {stage} | maths | 3.250 |")
        assert text[at + 2] == f"| {stage} | mean | 2.750 |  |  |  |  |  | 2.00x |  |"
        assert f"| {stage} | 30 | 1m15s | `0123456789ab` |" in text
    assert any("Measured gamma 0.123" in line for line in text)
    assert any("chain:2, temperature 0.7, top_p 0.9, against" in line for line in text)
    table = [line.count("|") for line in text if line.startswith("|")]
    assert table == [11] * 8 + [5] * 4  # headings, rules and rows are as wide


def test_write_puts_report_and_plots_in_place(tmp_path, capsys):
    stages = {"supervise": "loss", "cst": "loss", "ppow": "reward"}
    rows = [
        {"stage": s, "step": n, k: 1 / n, "holdout_tau": n} for s, k in stages.items() for n in range(1, 60)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report.write(tmp_path, hand_made())
    assert json.loads((tmp_path / "report.json").read_text()) == hand_made()
    assert (tmp_path / "report.md").read_text() == report.markdown(hand_made())
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == [
        "acceptance_by_position.png", "acceptance_length.png", "training_curves.png",
    ]  # fmt: skip
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000
    assert "maths" in capsys.readouterr().out


def test_the_plots_show_what_the_report_says(tmp_path, monkeypatch):
    """The heights of the bars, and the points of the curves, read back from the figures."""
    from ppow_jax import plots

    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    plots.acceptance_length(hand_made(), tmp_path / "a.png")
    plots.acceptance_by_position(hand_made(), tmp_path / "b.png")
    rows = [{"stage": "supervise", "step": s, "loss": 1 / s, "holdout_tau": 1.5} for s in (1, 2)]
    rows += [{"stage": "ppow", "step": 1, "reward": 0.5, "holdout_tau": 2.0, "train_sampled": 0.7}]
    plots.training_curves(rows, tmp_path / "c.png")
    lengths, positions, curves = figures
    assert [bar.get_height() for bar in lengths.axes[0].patches] == [2.25, 3.25, 2.25, 3.25]
    assert positions.axes[1].get_title() == "maths"
    assert positions.axes[0].lines[0].get_xydata().tolist() == [[1, 0.75], [2, 0.5]]
    tau, sampled, loss, reward = curves.axes
    # ppow's step 1 is drawn after supervise's last
    assert [x.get_xydata().tolist() for x in tau.lines] == [[[1, 1.5], [2, 1.5]], [[3, 2.0]]]
    assert [(x.get_xydata().tolist(), x.get_linestyle()) for x in sampled.lines] == [([[3, 0.7]], ":")]
    assert loss.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 0.5]]
    assert reward.lines[0].get_xydata().tolist() == [[1, 0.5]]


BENCHMARK = {
    "tau": float, "tau_ci95": list, "accepted_per_position": list, "rounds": int, "tokens": int,
    "tokens_per_s": float, "tokens_per_s_autoregressive": float, "speedup": float,
    "identical_outputs": int, "prompts": int,
}  # fmt: skip


def test_a_run_writes_every_field_of_the_contract(finished):
    found = json.loads((finished.workdir / "report.json").read_text())
    assert found["schema"] == 1
    assert isinstance(found["target"], dict) and isinstance(found["device"], dict)
    assert found["gamma_measured"] > 0
    assert set(found["drafters"]) == {"supervise", "cst"}
    for stage, drafter in found["drafters"].items():
        assert (
            drafter["steps"]
            == getattr(finished.settings, "supervise" if stage == "supervise" else "ppow").steps
        )
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
        taus = [b["tau"] for b in drafter["benchmarks"].values()]
        assert drafter["mean"]["tau"] == pytest.approx(sum(taus) / 2)
        speedups = [b["speedup"] for b in drafter["benchmarks"].values()]
        assert drafter["mean"]["speedup"] == pytest.approx(sum(speedups) / 2)
    hashes = [d["params_sha256"] for d in found["drafters"].values()]
    assert hashes[0] != hashes[1]
    # the prompts answer with 16 tokens each, of which the target's prefill writes one
    totals = [b["tokens"] for b in found["drafters"]["cst"]["benchmarks"].values()]
    assert totals == [3 * 15, 4 * 15]
    markdown = (finished.workdir / "report.md").read_text()
    assert "| cst | mean |" in markdown
    assert len(list((finished.workdir / "plots").glob("*.png"))) == 3
