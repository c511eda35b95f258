"""What stages have read is known by its content: another path is no change, another content is one."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ppow_jax import config, run
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel import partition
from ppow_jax.settings import STAGES, TargetSettings
from ppow_jax.stages import inputs
from ppow_jax.targets import orbax
from ppow_jax.targets.load import load

HERE = "what it names is not what the stages"


def settings(place, **changes):
    """Those of a run whose files lie in `place`: prompts, imported responses, a drafter."""
    place.mkdir(exist_ok=True)
    files = {name: place / f"{name}.jsonl" for name in ("asked", "imported", "benchmark")}
    for path in files.values():
        if not path.exists():
            runs.write_jsonl(path, [{"id": path.stem, "turns": ["ab"]}])
    for name in ("drafter", "start"):
        if not (place / name).exists():
            (place / name).mkdir()
            (place / name / "config.json").write_text("{}")
            (place / name / "model.safetensors").write_bytes(b"weights of " + name.encode())
    values = dict(
        runs=("supervise", "cst"),
        respond__prompts=f"asked={files['asked']},chat=builtin:chat/train[:2]",
        respond__responses=str(files["imported"]),
        evaluate__prompts=f"benchmark={files['benchmark']}",
        drafter__path=str(place / "drafter"),
        train__cst__start=str(place / "start"),
    )
    return config.from_config(runs.config(place.parent, **values | changes))


def done(workdir, chosen, finished=True, units=None, read=True):
    """A workdir in which units have been begun, or finished; of before `read` was kept, if that is false."""
    for name in ("evaluate/x", "export/x"):
        (workdir / name).mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "export/manifest.json", "target.json"):
        (workdir / name).write_text("{}")
    for name in ("responses", *(f"checkpoints/{name}" for name in chosen.train)):
        (workdir / name / "left").mkdir(parents=True, exist_ok=True)
    for unit in units or run.units(chosen):
        about = {"read": inputs.read(chosen, unit, workdir)} if read else {}
        run._mark(chosen, workdir, unit, finished=finished, **about)


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "w").mkdir()
    return tmp_path / "w"


def test_what_has_not_changed_is_not_done_again(tmp_path, workdir):
    chosen = settings(tmp_path / "a")
    done(workdir, chosen)
    assert run.plan(chosen, workdir) == []
    kept = json.loads((workdir / "stages.json").read_text())["train/cst"]["read"]
    names = {"respond.prompts", "respond.responses", "drafter.path", "train.cst.start"}
    assert kept.keys() == names and all(len(content) == 64 for content in kept.values())


def test_the_same_content_elsewhere_goes_on(tmp_path, workdir):
    done(workdir, settings(tmp_path / "a"))
    moved = settings(tmp_path / "b")
    assert run.plan(moved, workdir) == []


def test_the_same_content_elsewhere_goes_on_where_a_stage_was_stopped(tmp_path, workdir):
    done(workdir, settings(tmp_path / "a"), finished=False)
    shutil.rmtree(tmp_path / "a")
    assert run.plan(settings(tmp_path / "b"), workdir) == [
        "respond",
        "train/supervise",
        "train/cst",
        "evaluate",
        "export",
    ]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("file", "key", "stages"),
    [
        ("imported.jsonl", "respond.responses", ("respond",)),
        ("asked.jsonl", "respond.prompts", ("respond",)),
        ("imported.jsonl", "respond.responses", ("train",)),
        ("drafter/model.safetensors", "drafter.path", ("train",)),
        ("start/config.json", "train.cst.start", ("train",)),
    ],
)
def test_what_responses_and_runs_were_made_of_may_not_change(tmp_path, workdir, file, key, stages, finished):
    chosen = settings(tmp_path / "a", stages=stages)
    done(workdir, chosen, finished)
    path = tmp_path / "a" / file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(
        ConfigError, match=rf"^config\.{key}: {HERE} in .*w have read there; put that back, or use"
    ):
        run.plan(chosen, workdir)


def test_a_new_training_run_asks_what_the_responses_were_made_of(tmp_path, workdir):
    chosen = settings(tmp_path / "a", stages=("train",))
    done(workdir, chosen, units=["respond"])
    assert run.plan(chosen, workdir) == ["train/supervise", "train/cst"]
    runs.write_jsonl(tmp_path / "a" / "imported.jsonl", [{"turns": ["other"]}])
    with pytest.raises(ConfigError, match=rf"^config\.respond\.responses: {HERE}"):
        run.plan(chosen, workdir)


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("benchmark.jsonl", STAGES),
        ("imported.jsonl", ("evaluate",)),
    ],
)
def test_a_report_of_other_content_is_made_again(tmp_path, workdir, file, stages):
    chosen = settings(tmp_path / "a", stages=stages)
    done(workdir, chosen)
    path = tmp_path / "a" / file
    path.write_bytes(path.read_bytes() + b"\n")
    assert run.plan(chosen, workdir) == ["evaluate"]


def test_a_report_and_an_export_of_another_drafter_are_made_again(tmp_path, workdir):
    chosen = settings(tmp_path / "a", stages=("evaluate", "export"))
    done(workdir, chosen)
    (tmp_path / "a" / "drafter" / "model.safetensors").write_bytes(b"others")
    assert run.plan(chosen, workdir) == ["evaluate", "export"]


@pytest.mark.parametrize(
    "prompts",
    [
        "other={0},chat=builtin:chat/train[:2]",
        "asked={0}[:1],chat=builtin:chat/train[:2]",
        "asked={0},chat=builtin:code/train[:2]",
        "chat=builtin:chat/train[:2],asked={0}",
    ],
)
def test_names_limits_and_sources_of_prompts_count_too(tmp_path, workdir, prompts):
    done(workdir, settings(tmp_path / "a"))
    other = settings(tmp_path / "a", respond__prompts=prompts.format(tmp_path / "a" / "asked.jsonl"))
    with pytest.raises(
        ConfigError, match=r"^config\.respond\.prompts: found '.*, but stage 'respond' was begun"
    ):
        run.plan(other, workdir)


def test_a_workdir_of_before_goes_on_and_its_paths_count(tmp_path, workdir):
    chosen = settings(tmp_path / "a")
    done(workdir, chosen, read=False)
    runs.write_jsonl(tmp_path / "a" / "imported.jsonl", [{"turns": ["other"]}])
    assert run.plan(chosen, workdir) == []
    with pytest.raises(ConfigError, match=r"^config\.respond\.prompts: found"):
        run.plan(settings(tmp_path / "b"), workdir)


def test_a_file_that_is_gone_is_missed_by_nobody_who_is_done_with_it(tmp_path, workdir):
    chosen = settings(tmp_path / "a")
    done(workdir, chosen)
    shutil.rmtree(tmp_path / "a")
    assert run.plan(chosen, workdir) == []


def test_what_the_run_itself_exports_is_no_input_that_changes(tmp_path, workdir):
    chosen = settings(tmp_path / "a", train__cst__start=str(workdir / "export" / "sglang"))
    (workdir / "export" / "sglang").mkdir(parents=True)
    (workdir / "export" / "sglang" / "config.json").write_text("{}")
    done(workdir, chosen)
    (workdir / "export" / "sglang" / "config.json").write_text("another")
    assert run.plan(chosen, workdir) == []


@pytest.mark.parametrize("text", ["[]", '{"respond": 3}', '{"respond": {"finished": true}}', '{"respond": '])
def test_a_damaged_record_is_one_line(tmp_path, workdir, text):
    (workdir / "stages.json").write_text(text)
    with pytest.raises(UserError, match=r"stages\.json: damaged.*; restore it, or delete it"):
        run.plan(settings(tmp_path / "a"), workdir)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A place with the chain in a directory of an odd name, and `w`, in which it has answered prompts."""
    place = tmp_path_factory.mktemp("target")
    before = runs.make_settings(place, stages=("respond",))
    orbax.save(place / "old[1]", *load(before.target, partition.make_mesh((1, 1, 1))))
    runs.run(place / "w", stages=("respond",), target__path=str(place / "old[1]"))
    return place


def test_the_same_weights_under_another_path_go_on(target, tmp_path, log_lines):
    workdir = shutil.copytree(target / "w", tmp_path / "w")
    shutil.copytree(target / "old[1]", tmp_path / "new")
    before = runs.digest(workdir / "responses")
    chosen = runs.make_settings(target, stages=("respond",), target__path=str(tmp_path / "new"))
    run.run(chosen, workdir)
    assert any(line.startswith("every stage is finished") for line in log_lines)
    assert runs.digest(workdir / "responses") == before
    assert json.loads((workdir / "target.json").read_text())["path"] == str(tmp_path / "new")


def test_a_target_that_was_changed_where_it_lies_is_found_when_nothing_is_left_to_do(target, tmp_path):
    workdir, place = shutil.copytree(target / "w", tmp_path / "w"), tmp_path / "new"
    shutil.copytree(target / "old[1]", place)
    chosen = runs.make_settings(target, stages=("respond",), target__path=str(place))
    run.run(chosen, workdir)
    manifest = place / "target_manifest.json"
    manifest.write_text(manifest.read_text().replace("<assistant>", "<user>"))
    with pytest.raises(UserError, match="made with another tokenizer or chat template"):
        run.run(chosen, workdir)


def test_a_run_that_was_refused_before_it_began_leaves_the_workdir_to_other_targets(tmp_path):
    with pytest.raises(UserError, match="all 24 prompts are left out"):
        runs.run(tmp_path / "w", stages=("respond",), data__length=3)
    assert not (tmp_path / "w" / "target.json").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    config, params, tokens = load(TargetSettings("markov:0", "float32", ()), partition.make_mesh((1, 1, 1)))
    params["layers_0"]["mlp"]["up"]["weight"] = jnp.full_like(
        params["layers_0"]["mlp"]["up"]["weight"], np.nan
    )
    orbax.save(tmp_path / "bad", config, params, tokens)
    chosen = runs.make_settings(tmp_path, stages=("respond",), target__path=str(tmp_path / "bad"))
    with pytest.raises(UserError, match=r"bad': layers_0/mlp/up/weight holds values that are not finite"):
        run.run(chosen, tmp_path / "w")


def test_other_weights_and_another_template_are_refused_even_if_nothing_is_left_to_do(target, tmp_path):
    workdir = shutil.copytree(target / "w", tmp_path / "w")
    kept = runs.digest(workdir)
    other = runs.make_settings(target, stages=("respond",), target__path="markov:1")
    with pytest.raises(UserError, match="made with another target"):
        run.run(other, workdir)
    shutil.copytree(target / "old[1]", tmp_path / "new")
    manifest = tmp_path / "new" / "target_manifest.json"
    manifest.write_text(manifest.read_text().replace("<assistant>", "<user>"))
    other = runs.make_settings(target, stages=("respond",), target__path=str(tmp_path / "new"))
    with pytest.raises(UserError, match="made with another tokenizer or chat template"):
        run.run(other, workdir)
    assert runs.digest(workdir) == kept
