"""The doctor finds a healthy workdir healthy, and each of many planted faults by name."""

import dataclasses
import pathlib
import subprocess
import sys

import faults
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small

from ppow_jax.doctor import acceptance, checks, findings
from ppow_jax.doctor.case import Case, Sample, Subject
from ppow_jax.doctor.findings import FINE, NOT_CHECKED, NOTE, WRONG, Finding
from ppow_jax.errors import ConfigError
from ppow_jax.experiment import Experiment
from ppow_jax.models.target import Target
from ppow_jax.models.target_outputs import taps_of
from ppow_jax.parallel import partition


def entries(directory) -> dict:
    """All files by content, and all folders."""
    return runs.digest(directory) | {str(p): "" for p in directory.rglob("*") if p.is_dir()}


def test_a_finished_workdir_is_healthy_and_left_as_it_is(finished, tmp_path):
    workdir = faults.copy(finished.workdir, tmp_path)
    before = entries(workdir)
    found = faults.examine(workdir)
    assert {name: finding for name, finding in found.items() if finding.verdict != FINE} == {}
    assert entries(workdir) == before
    assert found.keys() == checks.CHECKS.keys()


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_fault_is_found_by_name_and_nothing_else_is_called_wrong(finished, tmp_path, name):
    fault = faults.FAULTS[name]
    workdir = faults.copy(finished.workdir, tmp_path)
    found = faults.examine(workdir, **(fault.plant(workdir) or {}))
    said = {check: finding for check, finding in found.items() if finding.verdict != FINE}
    assert fault.found in faults.wrong(found), said
    assert fault.words in found[fault.found].found
    assert faults.wrong(found) <= {fault.found, *fault.follows}, said
    for finding in said.values():
        assert finding.found and "\n" not in finding.found + finding.remedy
    assert found[fault.found].remedy


def test_a_healthy_gguf_file_beside_the_workdir(finished, tmp_path):
    workdir = faults.copy(finished.workdir, tmp_path)
    found = faults.examine(workdir, **faults.gguf(workdir))
    assert {name for name, finding in found.items() if finding.verdict != FINE} == set()


def test_what_cannot_be_checked_says_why(finished, tmp_path):
    """A run that has not been trained, and of which nothing was exported."""
    workdir = faults.copy(finished.workdir, tmp_path)
    before = entries(workdir)
    found = faults.examine(workdir, run="ppow")
    assert faults.wrong(found) == set() and entries(workdir) == before
    assert found["parameters"].verdict == found["export"].verdict == NOT_CHECKED
    assert "no checkpoint of the run 'ppow'" in found["vocabulary"].found
    assert "no exported files of the run 'ppow'" in found["d2t"].found


def test_a_drafter_of_another_run_is_no_fault(finished, tmp_path):
    """Its parameters are compared with nothing, but all that can be measured is."""
    workdir = faults.copy(finished.workdir, tmp_path)
    drafter = workdir / "export" / "sglang"
    tensors = faults.tensors_of(drafter)
    rng = np.random.default_rng(0)
    other = {n: t for n, t in tensors.items() if n.endswith("_proj.weight") or n == "fc.weight"}
    faults.change(drafter, {n: rng.normal(size=t.shape).astype(t.dtype) for n, t in other.items()})
    found = faults.examine(workdir, drafter=str(drafter))
    assert found["parameters"].verdict == NOTE and "another drafter" in found["parameters"].found
    assert found["export"].verdict == NOT_CHECKED
    assert found["decoding"].verdict == FINE
    # in the workdir's own export the same is wrong
    assert faults.examine(workdir)["parameters"].verdict == WRONG


@pytest.fixture(scope="module")
def tiny_case(tiny, pupil, texts, tmp_path_factory):
    """A drafter that was trained on the taps (0, 1, 2), as if its files said which it reads."""
    settings = runs.make_settings(tmp_path_factory.mktemp("tiny"))
    mesh = partition.make_mesh(settings.mesh.shape)
    place = tmp_path_factory.mktemp("workdir")
    made = Experiment(settings, place, mesh, tiny.target, tiny.params, None, "")
    rows = [prompt + text for prompt, text in zip(small.PROMPTS, texts, strict=True)]
    tokens = np.zeros((len(rows), 32), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    reader = Target(dataclasses.replace(tiny.target.config, taps=(0, 1, 2, 3)))
    layers = jnp.split(taps_of(reader, tiny.params, {"tokens": tokens}), 4, -1)
    start, end = (np.array(x, np.int32) for x in ([len(p) for p in small.PROMPTS], [len(r) for r in rows]))

    def of(taps) -> Case:
        case = Case(made, "", None, given=False)
        case.__dict__["held"] = Sample(tokens, start, end, dict(enumerate(layers)))
        case.__dict__["trained"] = Subject("pupil", tiny.drafter, pupil, taps)
        return case

    return of


def test_another_convention_that_is_better_is_believed(tiny_case):
    assert acceptance.conventions(tiny_case((0, 1, 2))).verdict == FINE
    found = acceptance.conventions(tiny_case((1, 2, 3)))
    assert found.verdict == WRONG and "with taps one layer lower" in found.found


def test_rows_in_another_order_are_seen_without_the_run(tiny_case):
    case = tiny_case((0, 1, 2))
    others = dict(acceptance._otherwise(case, case.trained))
    case.__dict__["trained"] = others["query and key rows in GGUF's order"]
    found = acceptance.conventions(case)
    assert found.verdict == WRONG and "order of query and key rows undone" in found.found


def test_findings_are_shown_in_the_order_of_severity():
    lines = findings.shown(
        {
            "a": Finding(FINE, "good"),
            "b": Finding(NOT_CHECKED, "not there"),
            "c": Finding(WRONG, "bad", "mend it"),
            "d": Finding(NOTE, "odd"),
        }
    ).split("\n")
    assert [line.split()[0] for line in lines[:5]] == ["wrong", "->", "note", "not", "fine"]
    assert lines[0] == "wrong        c: bad" and lines[-1] == "1 wrong, 1 note, 1 not checked, 1 fine"


def test_the_exit_status_tells_whether_something_is_wrong(finished):
    healthy = checks.doctor(finished.workdir)
    assert findings.status(healthy) == 0
    assert "0 wrong, 0 note" in findings.shown(healthy)
    other = checks.doctor(finished.workdir, target="markov:1")
    assert findings.status(other) == 1
    assert findings.shown(other).startswith("wrong        target: the target is ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"workdir": pathlib.Path("/")}, "found no run in"),
        ({"run": "typo"}, "--run: found 'typo', expected one of supervise, cst, ppow"),
        ({"drafter": "nowhere"}, "--drafter: no directory or .gguf file 'nowhere'"),
    ],
)
def test_a_wrong_command_is_one_line(finished, flags, words):
    with pytest.raises(ConfigError, match=words):
        checks.doctor(**{"workdir": finished.workdir} | flags)


def test_a_wrong_command_exits_with_2():
    done = subprocess.run([sys.executable, "-m", "ppow_jax.doctor"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("ppow_jax: expected --workdir=DIR")
