"""Which stages a run has still to do, and what it refuses before it does anything."""

import json

import jax
import pytest
import runs

from ppow_jax import config, run
from ppow_jax.errors import ConfigError, UserError


def begun(workdir, chosen, unit, finished):
    """A workdir in which a unit was begun with these settings."""
    record = {"finished": finished, "settings": run._relevant(chosen, unit)}
    (workdir / "stages.json").write_text(json.dumps({unit: record}))


def changed(tmp_path, **changes):
    return config.from_config(runs.config(tmp_path, **changes))


def test_an_unfinished_stage_may_go_on_with_another_learning_rate(tmp_path):
    begun(tmp_path, changed(tmp_path), "train/supervise", finished=False)
    lower = changed(tmp_path, train__supervise__optimizer__learning_rate=1e-4)
    assert "train/supervise" in run.plan(lower, tmp_path)
    begun(tmp_path, changed(tmp_path), "train/supervise", finished=True)
    with pytest.raises(
        ConfigError, match=r"config\.train\.supervise\.optimizer\.learning_rate: found 0\.0001"
    ):
        run.plan(lower, tmp_path)


def test_nothing_else_of_a_begun_stage_may_change(tmp_path):
    begun(tmp_path, changed(tmp_path), "train/supervise", finished=False)
    both = changed(tmp_path, train__supervise__optimizer__learning_rate=1e-4, train__supervise__window=3)
    with pytest.raises(ConfigError, match=r"config\.train\.supervise\.window: found 3, .* begun .* with 2"):
        run.plan(both, tmp_path)


def test_a_run_asks_after_the_runs_that_it_starts_from_and_no_other(tmp_path):
    begun(tmp_path, changed(tmp_path), "train/cst", finished=True)
    other = changed(tmp_path, train__ppow__group=4, train__ppow__steps=10)
    assert "train/cst" not in run.plan(other, tmp_path)
    before = changed(tmp_path, train__supervise__window=3)
    with pytest.raises(
        ConfigError, match=r"config\.train\.supervise\.window: found 3, but stage 'train/cst'"
    ):
        run.plan(before, tmp_path)


def test_the_units_are_the_stages_with_one_for_each_run(tmp_path):
    chosen = changed(tmp_path, runs=("supervise", "ppow"), stages=("respond", "train", "export"))
    assert run.units(chosen) == ["respond", "train/supervise", "train/ppow", "export"]


def test_a_new_run_in_a_finished_workdir_is_trained_and_all_are_evaluated_again(tmp_path):
    chosen = changed(tmp_path, runs=("supervise", "cst"))
    records = {
        unit: {"finished": True, "settings": run._relevant(chosen, unit)} for unit in run.units(chosen)
    }
    (tmp_path / "stages.json").write_text(json.dumps(records))
    assert run.plan(chosen, tmp_path) == []
    assert run.plan(changed(tmp_path, runs=()), tmp_path) == ["train/ppow", "evaluate", "export"]


def test_a_missing_benchmark_shows_before_anything_runs(tmp_path):
    chosen = changed(tmp_path, evaluate__prompts=f"gsm8k={tmp_path}/nowhere.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        run.run(chosen, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "given", "kept"),
    [("tpu", None, "{workdir}/compiled"), ("tpu", "elsewhere", "elsewhere"), ("cpu", None, None)],
)
def test_where_compiled_programs_are_kept(tmp_path, monkeypatch, platform, given, kept):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", given)
        run._keep_programs(tmp_path)
        assert jax.config.jax_compilation_cache_dir == (kept and kept.format(workdir=tmp_path))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
