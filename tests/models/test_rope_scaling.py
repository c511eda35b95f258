"""Rotary wavelengths by every kind of scaling, against golden values of transformers; and what is refused."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.errors import UserError
from ppow_jax.models import rope_scaling, rotary
from ppow_jax.models.fields import Fields
from ppow_jax.models.rotary import Rotary

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden/rope.json").read_text("utf-8"))
HEAD = GOLDEN["head"]
LLAMA3 = GOLDEN["cases"]["llama3"]["config"]["rope_scaling"]
YARN = GOLDEN["cases"]["yarn"]["config"]["rope_scaling"]
LONG = GOLDEN["cases"]["longrope, long"]["config"]["rope_scaling"]


def read(**keys) -> tuple[float, dict]:
    keys = {"max_position_embeddings": GOLDEN["context"]} | keys
    return rope_scaling.read(Fields(keys, "config.json"), HEAD)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_frequencies_and_scale_are_those_of_transformers(name):
    case = GOLDEN["cases"][name]
    theta, scaling = read(**case["config"])
    found = rotary.scaled(scaling, theta, HEAD, case["length"])
    frequencies = theta ** (-np.arange(HEAD // 2) / (HEAD // 2)) / (found.divisors or 1)
    np.testing.assert_allclose(frequencies, case["frequencies"], rtol=1e-5)
    assert found.scale == pytest.approx(case["scale"], rel=1e-6)


def test_newer_keys_say_the_same():
    newer = {"rope_theta": 1_000_000.0} | YARN
    assert read(rope_parameters=newer) == read(rope_theta=1_000_000.0, rope_scaling=YARN)
    both = dict(rope_parameters=newer, rope_scaling=YARN, rope_theta=1_000_000)
    assert read(**both) == read(rope_parameters=newer)


def test_what_is_rotated_is_scaled():
    x, at = jnp.ones((3, 2, 8)), jnp.arange(3)
    plain, scaled = (rotary.rotate(x, at, Rotary(100.0, scale=scale)) for scale in (1.0, 1.5))
    np.testing.assert_allclose(scaled, 1.5 * plain, rtol=1e-6)


def without(scaling: dict, key: str) -> dict:
    return {k: v for k, v in scaling.items() if k != key}


WRONG = {
    "a text": (dict(rope_scaling="linear"), "rope_scaling 'linear', expected a group of keys"),
    "a list": (dict(rope_parameters=[1]), "rope_parameters [1], expected a group of keys"),
    "an unknown kind": (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling.type 'dynamic'"),
    "a kind that is none": (dict(rope_scaling={"rope_type": 3}), "rope_scaling.rope_type 3, expected one of"),
    "linear without a factor": (dict(rope_scaling={"type": "linear"}), "no 'rope_scaling.factor'"),
    "a text as factor": (dict(rope_scaling=LLAMA3 | {"factor": "8"}), "rope_scaling.factor '8'"),
    "a factor of 0": (dict(rope_scaling=LLAMA3 | {"factor": 0}), "rope_scaling.factor 0, expected a number"),
    "no number": (dict(rope_scaling=YARN | {"factor": float("nan")}), "rope_scaling.factor nan"),
    "low above high": (dict(rope_scaling=LLAMA3 | {"low_freq_factor": 4.0}), "high_freq_factor 4.0"),
    "yarn without a factor": (dict(rope_scaling=without(YARN, "factor")), "no 'rope_scaling.factor'"),
    "a negative beta": (dict(rope_scaling=YARN | {"beta_fast": -1}), "rope_scaling.beta_fast -1"),
    "truth as a number": (dict(rope_scaling=YARN | {"mscale": True}), "rope_scaling.mscale True"),
    "a number as truth": (dict(rope_scaling=YARN | {"truncate": 1}), "rope_scaling.truncate 1"),
    "half a token": (
        dict(rope_scaling=YARN | {"original_max_position_embeddings": 9.5}),
        "original_max_position_embeddings 9.5, expected a whole number",
    ),
    "a list too short": (
        dict(rope_scaling=LONG | {"short_factor": [1.0] * 7}),
        "a list of 8 numbers above 0",
    ),
    "a list of texts": (
        dict(rope_scaling=LONG | {"long_factor": ["1"] * 8}),
        "rope_scaling.long_factor with '1' in it",
    ),
    "a list of zeros": (
        dict(rope_scaling=LONG | {"long_factor": [0.0] * 8}),
        "rope_scaling.long_factor with 0.0 in it",
    ),
    "an unknown key": (dict(rope_scaling=LONG | {"short_mscale": 1.1}), "rope_scaling.short_mscale 1.1"),
    "a key of another kind": (dict(rope_parameters={"factor": 8.0}), "rope_parameters.factor 8.0"),
    "a part of a head": (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5, expected 1.0"),
    "a part, inside": (
        dict(rope_parameters={"partial_rotary_factor": 0.25}),
        "rope_parameters.partial_rotary_factor 0.25",
    ),
    "a base that is none": (dict(rope_theta="10000"), "rope_theta '10000', expected a number above 1"),
    "a base of 1": (dict(rope_theta=1), "rope_theta 1, expected a number above 1"),
    "two bases": (
        dict(rope_theta=5.0, rope_parameters={"rope_theta": 7.0}),
        "rope_theta 5.0, expected as in",
    ),
    "two scalings": (
        dict(rope_parameters={"rope_type": "default", "rope_theta": 7.0}, rope_scaling=YARN),
        "expected what rope_parameters says too, or one of them alone",
    ),
    "by kinds of layers": (
        dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "rope_parameters.full_attention",
    ),
    "no context": (
        dict(rope_scaling={"type": "yarn", "factor": 2.0}, max_position_embeddings=None),
        "no rope_s",
    ),
}
WRONG |= {f"llama3 without {key}": (dict(rope_scaling=without(LLAMA3, key)), f"'rope_scaling.{key}'")
          for key in LLAMA3 if key != "rope_type"}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_obeyed_is_refused_by_name(name):
    keys, said = WRONG[name]
    with pytest.raises(UserError) as e:
        read(**keys)
    assert str(e.value).startswith("config.json: found ") and said in str(e.value), str(e.value)


def test_layers_with_a_window_have_wavelengths_of_their_own():
    def layers(**keys):
        c = Fields({"max_position_embeddings": GOLDEN["context"]} | keys, "config.json")
        return rope_scaling.read_layers(c, HEAD, 1000.0, 10.0)

    assert layers() == (1000.0, {}, 10.0) and layers(rope_local_base_freq=5) == (1000.0, {}, 5.0)
    linear = {"rope_type": "linear", "factor": 4.0}
    newer = {"full_attention": linear | {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 5.0}}
    assert layers(rope_parameters=newer) == (7.0, linear, 5.0)
    assert layers(rope_theta=7.0, rope_scaling=linear, rope_local_base_freq=5.0) == (7.0, linear, 5.0)
    for keys, said in (
        (dict(rope_parameters={"sliding_attention": linear}), "sliding_attention.rope_type 'linear'"),
        (dict(rope_parameters=linear), "rope_parameters.rope_type 'linear'"),
        (dict(rope_parameters=newer, rope_local_base_freq=6.0), "rope_local_base_freq 6.0, expected"),
        (dict(rope_parameters=newer, rope_scaling=YARN), "rope_scaling {"),
    ):
        with pytest.raises(UserError) as e:
            layers(**keys)
        assert said in str(e.value), str(e.value)
