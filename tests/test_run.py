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
    (workdir / "checkpoints" / unit.partition("/")[2] / "1").mkdir(parents=True, exist_ok=True)
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


def test_an_unfinished_stage_may_go_on_in_other_parts(tmp_path):
    """Of its batches, as where memory is short."""
    begun(tmp_path, changed(tmp_path), "train/supervise", finished=False)
    assert "train/supervise" in run.plan(changed(tmp_path, train__supervise__accumulate=2), tmp_path)


def test_a_unit_that_is_done_again_counts_its_time_anew_and_one_that_goes_on_does_not(tmp_path):
    chosen = changed(tmp_path)
    for finished, seconds in ((False, 7.0), (True, 0.0)):
        run._mark(chosen, tmp_path, "evaluate", finished=finished, seconds=7.0)
        assert run._seconds(tmp_path, "evaluate") == seconds


def test_what_is_trained_is_evaluated_and_exported_again(tmp_path):
    """Even where nothing else says that the report is of before."""
    chosen = changed(tmp_path)
    all_done(tmp_path, chosen)
    records = json.loads((tmp_path / "stages.json").read_text())
    records["train/cst"]["finished"] = False
    (tmp_path / "stages.json").write_text(json.dumps(records))
    assert run.plan(chosen, tmp_path) == ["train/cst", "evaluate", "export"]


def test_what_was_stopped_before_it_left_anything_may_begin_with_other_settings(tmp_path):
    begun(tmp_path, changed(tmp_path), "train/supervise", finished=False)
    (tmp_path / "checkpoints" / "supervise" / "1").rmdir()
    other = changed(tmp_path, train__supervise__window=3)
    assert "train/supervise" in run.plan(other, tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "supervise.json").write_text("{}")  # its steps are settled
    with pytest.raises(ConfigError, match=r"window: found 3, but stage 'train/supervise' was begun"):
        run.plan(other, tmp_path)


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


def test_keys_that_have_come_since_had_their_defaults(tmp_path):
    chosen = changed(tmp_path)
    all_done(tmp_path, chosen)
    records = json.loads((tmp_path / "stages.json").read_text())
    for unit, section, key in (
        ("respond", "respond", "temperature"),
        ("train/cst", "data", "feature_dtype"),
        ("train/cst", "train", "cst"),
    ):
        if key == "cst":
            del records[unit]["settings"]["train"]["cst"]["average"]
        else:
            del records[unit]["settings"][section][key]
    (tmp_path / "stages.json").write_text(json.dumps(records))
    assert run.plan(chosen, tmp_path) == []
    warm = changed(tmp_path, respond__temperature=0.5)
    with pytest.raises(ConfigError, match=r"respond\.temperature: found 0\.5, but .* begun .* with 0\.0"):
        run.plan(warm, tmp_path)
    with pytest.raises(ConfigError, match=r"train\.cst\.average: found 0\.5, but .* begun .* with 0\.0"):
        run.plan(changed(tmp_path, train__cst__average=0.5), tmp_path)


def all_done(workdir, chosen):
    """A workdir in which all units are finished."""
    for name in ("evaluate", "export"):
        (workdir / name).mkdir(exist_ok=True)
    for name in ("report.json", "export/manifest.json"):
        (workdir / name).write_text("{}")
    records = {
        unit: {"finished": True, "settings": run._relevant(chosen, unit)} for unit in run.units(chosen)
    }
    (workdir / "stages.json").write_text(json.dumps(records))


def test_a_new_run_in_a_finished_workdir_is_trained_and_all_are_evaluated_again(tmp_path):
    chosen = changed(tmp_path, runs=("supervise", "cst"))
    all_done(tmp_path, chosen)
    assert run.plan(chosen, tmp_path) == []
    others = changed(tmp_path, runs=(), export__drafter="")
    assert run.plan(others, tmp_path) == ["train/ppow", "evaluate", "export"]


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        (dict(runs=("supervise",)), ["evaluate"]),  # the export is that of cst, which it names
        (dict(runs=("supervise",), export__drafter=""), ["evaluate", "export"]),
        (dict(export__drafter="supervise"), ["export"]),
        (dict(export__drafter=""), ["export"]),  # of cst again
        (dict(evaluate__window=4), ["evaluate"]),
    ],
)
def test_what_changes_a_report_or_an_export_does_it_again(tmp_path, changes, again):
    all_done(tmp_path, changed(tmp_path))
    assert run.plan(changed(tmp_path, **changes), tmp_path) == again


def test_a_report_of_another_imported_drafter_is_made_again(tmp_path):
    only = dict(stages=("evaluate",), drafter__path="a/b")
    all_done(tmp_path, changed(tmp_path, **only))
    assert run.plan(changed(tmp_path, **only | dict(drafter__path="a/c")), tmp_path) == ["evaluate"]


@pytest.mark.parametrize(
    ("gone", "again"),
    [("report.json", "evaluate"), ("evaluate", "evaluate"), ("export/manifest.json", "export")],
)
def test_what_is_deleted_is_made_again(tmp_path, gone, again):
    chosen = changed(tmp_path)
    all_done(tmp_path, chosen)
    if (tmp_path / gone).is_dir():
        (tmp_path / gone).rmdir()
    else:
        (tmp_path / gone).unlink()
    assert run.plan(chosen, tmp_path) == [again]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (dict(runs=("cst",)), "train.cst.start: the run 'supervise' is neither finished"),
        (dict(runs=("supervise",), stages=("respond", "train", "export")), "export.drafter: the run 'cst'"),
    ],
)
def test_a_run_that_nobody_trains_is_found_before_anything_runs(tmp_path, changes, key):
    with pytest.raises(ConfigError, match=key):
        run.run(changed(tmp_path, **changes), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_start_that_is_finished_need_not_be_among_the_runs(tmp_path):
    chosen = changed(tmp_path, runs=("cst",))
    begun(tmp_path, chosen, "train/supervise", finished=True)
    run.check_starts(chosen, ["train/cst", "export"], tmp_path)
    begun(tmp_path, chosen, "train/supervise", finished=False)
    with pytest.raises(ConfigError, match="'supervise' is neither finished"):
        run.check_starts(chosen, ["train/cst", "export"], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(drafter__vocab_size=32),
            r"config\.drafter\.vocab_size: found 32, expected at most the target's 31",
        ),
        (dict(drafter__module="nope"), r"config\.drafter\.module: found 'nope', expected eagle3, or"),
        (dict(drafter__module="math:pi"), r"config\.drafter\.module: .* is none"),
        (
            dict(target__taps=(0, 1, 2)),
            r"config\.export\.server: 'sglang' would ignore .* name the embedding",
        ),
        (dict(evaluate__tree="tree:60x8x21"), r"config\.evaluate\.tree: found 21 candidates .* at most 20"),
        (dict(decode__shape="tree:60x8x21"), r"config\.decode\.shape: found 21 candidates"),
        (dict(train__cst__start="/no/where"), r"/no/where"),
        (dict(train__cst__window=33), r"config\.train\.cst\.window: found 33, expected at most data\.length"),
    ],
)
def test_what_does_not_fit_the_target_is_found_before_it_writes_anything(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run.run(changed(tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "responses").exists()


def test_a_tree_of_more_candidates_than_tokens_is_found_too(tmp_path):
    c = runs.config(tmp_path, runs=("supervise", "trees"), export__drafter="")
    c.train.trees = config.training_run("gto", start="supervise", steps=2, tree="tree:60x8x21", batch_size=4)
    with pytest.raises(ConfigError, match=r"config\.train\.trees\.tree: found 21 candidates after a token"):
        run.run(config.from_config(c), tmp_path / "run")


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
