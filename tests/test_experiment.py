"""Which stages a run has still to do, and what it refuses before it does anything."""

import json

import jax
import pytest
import runs

from ppow_jax import experiment, settings
from ppow_jax.errors import ConfigError, UserError


def begun(workdir, chosen, stage, finished):
    """A workdir in which `stage` was begun with these settings."""
    record = {"finished": finished, "settings": experiment._relevant(chosen, stage)}
    (workdir / "stages.json").write_text(json.dumps({stage: record}))


def changed(tmp_path, **changes):
    return settings.from_config(runs.config(tmp_path, **changes))


def test_an_unfinished_stage_may_go_on_with_another_learning_rate(tmp_path):
    begun(tmp_path, changed(tmp_path), "supervise", finished=False)
    lower = changed(tmp_path, supervise__optimizer__learning_rate=1e-4)
    assert "supervise" in experiment._plan(lower, tmp_path)
    begun(tmp_path, changed(tmp_path), "supervise", finished=True)
    with pytest.raises(ConfigError, match=r"config\.supervise\.optimizer\.learning_rate: found 0\.0001"):
        experiment._plan(lower, tmp_path)


def test_nothing_else_of_a_begun_stage_may_change(tmp_path):
    begun(tmp_path, changed(tmp_path), "supervise", finished=False)
    both = changed(tmp_path, supervise__optimizer__learning_rate=1e-4, supervise__window=3)
    with pytest.raises(ConfigError, match=r"config\.supervise\.window: found 3, .* begun .* with 2"):
        experiment._plan(both, tmp_path)


def test_a_missing_benchmark_shows_before_anything_runs(tmp_path):
    chosen = changed(tmp_path, evaluate__prompts=f"gsm8k={tmp_path}/nowhere.jsonl")
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        experiment.run(chosen, tmp_path / "run")
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
        experiment._keep_programs(tmp_path)
        assert jax.config.jax_compilation_cache_dir == (kept and kept.format(workdir=tmp_path))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
