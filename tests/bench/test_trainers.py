"""Training steps beside those of other trainers: what is told and counted."""

import json
import sys
import types

import pytest
import runs

from ppow_jax.bench import trainers, training_steps
from ppow_jax.bench.machine import fresh_drafter
from ppow_jax.config import to_dict
from ppow_jax.drafters.eagle3 import DrafterConfig
from ppow_jax.errors import UserError

PEER = """
import json, sys
print(json.dumps({"version": "1", "positions": 30, "rate": 4e9}), flush=True)
for n, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": 0.5 + n, "bytes": 2_000_000, "loss": 1.0}), flush=True)
"""


def ready(name, command):
    one = trainers._started(name, command)
    one.get_ready()
    return one


@pytest.mark.slow
def test_our_own_step_in_a_process_of_its_own(tmp_path):
    """The losses of a step are its anchors' tokens; texts of random ids are the target's to the end."""
    settings = runs.make_settings(tmp_path, runs=("supervise",))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(settings)))
    one = ready("ours", [sys.executable, "-m", "ppow_jax.bench.own_worker", str(file), "supervise"])
    one.step()
    one.process.kill()
    run = settings.train["supervise"]
    assert 0 < one.positions <= run.batch_size * run.method.anchors * run.method.window
    assert one.operations > 1e6 and one.rate > 1e8 and one.seconds[0] > 0


def test_the_table_has_medians_and_shares(capsys):
    one = ready("specforge", [sys.executable, "-c", PEER])
    one.operations = 6e9
    for _ in range(3):
        one.step()
    one.process.kill()
    trainers._report([one])
    out = capsys.readouterr().out
    for cell in ("1.500", "20", "4 of 4, 100%", "specforge: 1"):
        assert cell in out, cell


def test_a_worker_that_ends_is_named():
    with pytest.raises(UserError, match="specjax: the worker ended with status 3"):
        ready("specjax", [sys.executable, "-c", "raise SystemExit(3)"])


def test_a_worker_that_ends_between_steps_is_named():
    one = ready("specforge", [sys.executable, "-c", "print('{}', flush=True); raise SystemExit(7)"])
    one.process.wait()
    with pytest.raises(UserError, match="specforge: the worker ended with status 7; see above"):
        one.step()


@pytest.mark.parametrize("said", ["Welcome!", "3"])
def test_a_worker_that_says_something_else_is_named(said):
    with pytest.raises(UserError, match=f"specforge: found '{said}.*, expected a Python that prints nothing"):
        ready("specforge", [sys.executable, "-c", f"print('{said}', flush=True)"])


def test_operations_of_a_step_by_hand():
    shape = DrafterConfig(
        vocab_size=7, width=4, taps_width=12, heads=2, kv_heads=1, head_size=2, mlp_hidden=5, rope_theta=1e4,
        norm_epsilon=1e-5, dtype="float32",
    )  # fmt: skip
    B, T, K = 2, 3, 2
    query, key_value, out, mlp, head = 8 * 4, 8 * 2 * 2, 4 * 4, 3 * 4 * 5, 4 * 7
    scores = 2 * 4 * T
    trained = 3 * K * (query + key_value + out + mlp + head + scores)
    assert trainers.peer_operations(shape, B, T, K) == 2 * B * T * (trained + 2 * 12 * 4 + 4 * 7)


@pytest.mark.slow
def test_the_parts_of_a_step(tmp_path):
    """Operations: the windows' are at least three times those of a layer, attention aside."""
    made = runs.build(tmp_path / "w", runs=("supervise",))
    run = made.settings.train["supervise"]
    found = training_steps.parts(made, run, fresh_drafter(made))
    assert list(found) == ["prefix", "windows", "head and losses", "optimiser"]
    c, o = fresh_drafter(made).drafter.config, run.method
    rows = run.batch_size * o.anchors * o.window
    product = 2 * rows * c.width * c.vocab_size  # of the drafter: three; and the target's, for these rows
    assert found["head and losses"][0] == 4 * product
    layer = 3 * c.width * c.heads * c.head_size + 3 * c.width * c.mlp_hidden  # queries, output and MLP
    assert found["windows"][0] > 3 * 2 * rows * layer
    assert found["optimiser"][0] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("no-python", ""), "--torch_python: found 'no-python', expected a Python that can be run"),
        (("", "none"), "--specjax: found 'none', expected a checkout, with a folder specjax in it"),
    ],
)
def test_paths_of_other_trainers_are_looked_at_first(tmp_path, given, message):
    made = types.SimpleNamespace(settings=runs.make_settings(tmp_path))
    with pytest.raises(UserError, match=message):
        trainers.compare(made, None, *given, repeats=1)


def test_other_trainers_want_a_supervised_run_beside_them(tmp_path):
    made = types.SimpleNamespace(settings=runs.make_settings(tmp_path, runs=("ppow",)))
    with pytest.raises(UserError, match="found no run of `supervised`, expected one"):
        trainers.compare(made, None, sys.executable, "", repeats=1)
