"""Fixtures that the tests share; see `small` for what they hold."""

import pathlib
import sys

import jax
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # for configs/

import small


@pytest.fixture(scope="session")
def tiny() -> small.Pair:
    """A random target of 3 layers with a random drafter over 24 of its 40 tokens."""
    return small.tiny_pair()


@pytest.fixture(scope="session")
def chain() -> small.Chain:
    """The Markov chain as a target."""
    return small.markov_chain()


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles in half the time, for modules of small arrays that compile much and run little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
