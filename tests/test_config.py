"""The configuration: every ready-made one is valid; what is wrong is named with what was expected."""

import dataclasses
import importlib
import pathlib
import types

import pytest
from ml_collections import ConfigDict

from ppow_jax import config, keys
from ppow_jax.configs import base
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.objectives.supervised import Supervised
from ppow_jax.settings import OBJECTIVES, DataSettings, OptimizerSettings, Settings
from ppow_jax.stages import evaluate, export, respond, train

READY = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def changed(**changes) -> dict:
    """The base configuration as plain dicts, with `data__length=3` setting `data.length`."""
    values = base.get_config().to_dict()
    for key, value in changes.items():
        *path, last = key.split("__")
        section = values
        for name in path:
            section = section[name]
        section[last] = value
    return values


def refusal(values, of=config.from_config) -> str:
    """The message that a config is refused with; one line."""
    with pytest.raises(ConfigError) as caught:
        of(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_ready_configs_are_found():
    assert {"base", "tiny", "smollm2_135m"} <= set(READY)


@pytest.mark.parametrize("name", [n for n in READY if n != "__init__"])
def test_every_ready_config_is_valid(name):
    values = importlib.import_module(f"ppow_jax.configs.{name}").get_config()
    found = config.from_config(values)
    assert config.to_dict(found) == values.to_dict()  # nothing lost, nothing changed
    if name == "objectives":  # one run for each, and some of supervised
        assert {run.objective for run in found.train.values()} == set(OBJECTIVES)
    elif name in ("equal_minutes", "temperature_1"):  # the same seeds of both
        seeds = [
            [r.seed for n, r in found.train.items() if n.startswith(kind)] for kind in ("cst", "expected")
        ]
        assert seeds == [[0, 1, 2]] * 2
    elif name == "ablation":  # every run but one differs from `plain`
        methods = {n: r.method for n, r in found.train.items() if r.objective == "ppow"}
        assert [n for n, method in methods.items() if method == methods["plain"]] == ["plain"]
    elif name == "data_size":  # a run goes on with the texts of its start
        assert {(run.start, run.texts) for run in found.train.values() if run.start != "fresh"} == {
            (name, run.texts) for name, run in found.train.items() if run.start == "fresh"
        }
        assert len({run.texts for run in found.train.values()}) == 3
    else:
        last = "expected" if name in ("quickstart", "hf_directory") else "ppow"
        assert list(found.train) == ["supervise", "cst", last]
    if name != "hf_directory":
        train.check(found)
        export.check(found)


def test_values_arrive_with_their_types():
    found = config.from_config(changed(stages=["respond", "evaluate"], respond__temperature=1, seed=-3))
    assert found.stages == ("respond", "evaluate")
    assert type(found.respond.temperature) is float and found.respond.temperature == 1.0
    assert found.seed == -3
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seed = 1


def test_what_a_config_leaves_out_has_its_default():
    found = config.from_config({"data": {"length": 64}, "train": {"a": {"objective": "ppow", "steps": 3}}})
    assert (found.data.length, found.data.holdout) == (64, DataSettings().holdout)
    assert found.train["a"].method == config.objective_class("ppow")()
    assert found.train["a"].optimizer == OptimizerSettings()


def test_every_key_has_a_comment():
    for where, _, comment in keys.described(Settings()):
        assert comment, where
    for name in OBJECTIVES:
        for where, _, comment in keys.described(config.objective_class(name)()):
            assert comment, (name, where)


def test_a_key_that_two_runs_share_is_set_by_either():
    for name in ("cst", "ppow"):
        c = base.get_config()
        c.train[name].steps = 7
        found = config.from_config(c)
        assert (found.train["cst"].steps, found.train["ppow"].steps) == (7, 7)


def test_unknown_key_at_any_depth():
    message = refusal(changed(train__supervise__stepz=3))
    assert message.startswith("config.train.supervise.stepz: unknown key; expected one of anchors, window,")
    assert "(the objective 'supervised'), accumulate, average, batch_size" in message
    assert refusal(changed(colour="red")).startswith("config.colour: unknown key; expected one of seed,")
    deep = refusal(changed(train__ppow__anchor_rule__warmup=3))
    assert deep.startswith(
        "config.train.ppow.anchor_rule.warmup: unknown key; expected one of rule, warmup_steps"
    )


def test_a_run_with_another_objectives_keys():
    message = refusal(changed(train__ppow__objective="supervised"))
    assert message.startswith("config.train.ppow.")
    assert "unknown key" in message and "(the objective 'supervised')" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data__length", 2.5, "config.data.length: found 2.5 (float), expected int"),
        ("train__cst__steps", True, "config.train.cst.steps: found True (bool), expected int"),
        ("train__ppow__clip", "0.2", "config.train.ppow.clip: found '0.2' (str), expected float"),
        ("train__ppow__clip", False, "config.train.ppow.clip: found False (bool), expected float"),
        ("distributed", 1, "config.distributed: found 1 (int), expected bool"),
        ("target__path", None, "config.target.path: found None (NoneType), expected str"),
        ("train__ppow__gamma", 0.12, "config.train.ppow.gamma: found 0.12 (float), expected str"),
        ("stages", "respond", "config.stages: found 'respond', expected a tuple of strings"),
        ("stages", 3, "config.stages: found 3, expected a tuple of strings"),
        ("target__taps", (1, "2"), "config.target.taps: found (1, '2'), expected a tuple of whole numbers"),
        (
            "train__ppow__optimizer",
            3e-4,
            "config.train.ppow.optimizer: found 0.0003, expected a group of keys",
        ),
        ("train__ppow", 3, "config.train.ppow: found 3, expected a group of keys"),
        ("train", 3, "config.train: found 3, expected runs by name"),
    ],
)
def test_wrong_type(key, value, expected):
    assert refusal(changed(**{key: value})) == expected


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        (dict(stages=("evaluate", "respond")), "stages", "a subset, in order, of respond, train, evaluate"),
        (dict(stages=("respond", "supervise")), "stages", "a subset, in order"),
        (dict(stages=("train", "train")), "stages", "a subset, in order"),
        (dict(stages=()), "stages", "a subset, in order"),
        (dict(runs=("gto",)), "runs", "some of supervise, cst, ppow"),
        (dict(target__dtype="float16"), "target.dtype", "float32 or bfloat16"),
        (dict(drafter__dtype="int8"), "drafter.dtype", "float32 or bfloat16"),
        (dict(drafter__remat="some"), "drafter.remat", "none or dots or all"),
        (dict(data__feature_dtype="int8"), "data.feature_dtype", "float32 or bfloat16 or float16"),
        (dict(train__ppow__credit="all"), "train.ppow.credit", "accepted or window"),
        (dict(train__ppow__advantage="raw"), "train.ppow.advantage", "standardised or centred"),
        (dict(train__ppow__gamma="fast"), "train.ppow.gamma", "'measured' or a number >= 0"),
        (dict(train__ppow__gamma="-0.1"), "train.ppow.gamma", "'measured' or a number >= 0"),
        (dict(train__ppow__gamma="nan"), "train.ppow.gamma", "'measured' or a number >= 0"),
        (dict(train__ppow__reward="speed"), "train.ppow.reward", "speedup, length, or module:function"),
        (dict(train__ppow__group=1), "train.ppow.group", "2 or more"),
        (dict(train__ppow__rollout_temperature=0.0), "train.ppow.rollout_temperature", "above 0"),
        (
            dict(train__ppow__anchor_rule__rule="best"),
            "train.ppow.anchor_rule.rule",
            "uniform or adaw or rounds",
        ),
        (dict(train__cst__losses="kl+tv"), "train.cst.losses", "one of cross_entropy, kl"),
        (dict(train__cst__step_weights="decay*x"), "train.cst.step_weights", "one of uniform, decay"),
        (dict(train__cst__objective="gone"), "train.cst.objective", "supervised, expected, ppow"),
        (dict(train__cst__start="ppow"), "train.cst.start", "fresh, an earlier run, or a directory"),
        (dict(train__cst__start="cst"), "train.cst.start", "fresh, an earlier run, or a directory"),
        (dict(train__supervise__steps=0), "train.supervise.steps", "one of them, the other 0"),
        (dict(train__supervise__minutes=2.0), "train.supervise.steps", "one of them, the other 0"),
        (dict(train__cst__renormalise=False), "train.cst.renormalise", "True for losses cross_entropy"),
        (dict(train__supervise__accumulate=3), "train.supervise.accumulate", "a divisor of"),
        (dict(export__drafter="respond"), "export.drafter", "supervise, cst, ppow, or empty"),
        (dict(evaluate__control="best"), "evaluate.control", "supervise, cst, ppow, or empty"),
        (dict(export__dtype="int8"), "export.dtype", "float32 or bfloat16 or float16"),
        (dict(drafter__layers=0), "drafter.layers", "1 or more"),
        (dict(drafter__width=64), "drafter.induction", "False for a drafter of a width of its own"),
        (dict(decode__sampling__top_p=0.0), "decode.sampling.top_p", "above 0, at most 1"),
        (dict(decode__sampling__top_p=1.5), "decode.sampling.top_p", "above 0, at most 1"),
        (dict(decode__sampling__temperature=-1.0), "decode.sampling.temperature", "0 or more"),
        (dict(evaluate__decode_prompts=0), "evaluate.decode_prompts", "1 or more"),
        (dict(log__keep_checkpoints=0), "log.keep_checkpoints", "1 or more"),
        (dict(train__cst__optimizer__warmup_steps=-1), "train.cst.optimizer.warmup_steps", "0 or more"),
        (dict(train__cst__optimizer__learning_rate=-1e-3), "train.cst.optimizer.learning_rate", "0 or more"),
        (dict(train__ppow__kl_weight=float("nan")), "train.ppow.kl_weight", "0 or more"),
        (dict(train__ppow__kl_weight=float("inf")), "train.ppow.kl_weight", "0 or more"),
        (dict(data__holdout=-1), "data.holdout", "0 or more"),
        (dict(mesh__tensor=0), "mesh.tensor", "1 or more, or -1"),
    ],
)
def test_impossible_values_and_combinations(changes, key, expected):
    message = refusal(changed(**changes))
    assert message.startswith(f"config.{key}: found ")
    assert f"expected {expected}" in message or expected in message.partition("expected ")[2]


def test_a_name_of_a_run_is_a_name():
    values = changed()
    values["train"]["my run"] = values["train"].pop("ppow")
    assert refusal(values).startswith("config.train.my run: found this name of a run, expected a letter")


@pytest.mark.parametrize(
    ("stage", "changes", "key", "expected"),
    [
        (
            train,
            dict(respond__temperature=1.0),
            "train.ppow.temperature",
            "above 0, because respond.temperature is",
        ),
        (train, dict(train={}), "train", "at least one"),
        (train, dict(train__cst__start="supervised"), "train.cst.start", "fresh, an earlier run"),
        (export, dict(export__server="tgi"), "export.server", "sglang, vllm, vllm_tpu, llamacpp, or empty"),
        (evaluate, dict(decode__shape="chain:0"), "decode.shape", "chain:K, group:GxK"),
        (evaluate, dict(evaluate__tree="tree:60x8"), "evaluate.tree", "chain:K, group:GxK"),
        (
            evaluate,
            dict(decode__shape="tree:60x2x4"),
            "decode.shape",
            "2 to 21, all that 2 levels of top_k 4 have",
        ),
        (
            evaluate,
            dict(decode__shape="auto", data__holdout=0),
            "data.holdout",
            "1 or more for decode.shape 'auto'",
        ),
        (
            evaluate,
            dict(decode__shape="auto", respond__temperature=1.0),
            "respond.temperature",
            "0 for decode.shape 'auto'",
        ),
        (respond, dict(respond__prompts=" "), "respond.prompts", "NAME=SOURCE pairs"),
        (evaluate, dict(evaluate__prompts=","), "evaluate.prompts", "NAME=SOURCE pairs"),
        (evaluate, dict(evaluate__prompts="gsm8k.jsonl"), "evaluate.prompts", "NAME=SOURCE"),
    ],
)
def test_what_a_stage_finds_before_a_target_is_loaded(stage, changes, key, expected):
    values = changed(**changes)
    if "train" in changes:
        values["evaluate"]["control"] = ""
    settings = config.from_config(values)
    message = refusal(settings, stage.check)
    assert message.startswith(f"config.{key}: found ")
    assert expected in message


def test_a_missing_file_of_prompts_is_found_before_a_target_is_loaded():
    settings = config.from_config(changed(evaluate__prompts="a=nowhere.jsonl"))
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        evaluate.check(settings)


def test_what_looks_odd_but_is_possible(tmp_path):
    """Answers from elsewhere alone; zeros switch terms off; one axis takes the rest."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"turns": ["a"], "response_ids": [[1]]}\n')
    respond.check(config.from_config(changed(respond__prompts="", respond__responses=str(path))))
    config.from_config(changed(train__ppow__proximity_weight=0, train__ppow__kl_weight=0.0, data__holdout=0))
    config.from_config(changed(mesh__data=1, mesh__tensor=-1, train__ppow__gamma="measured"))
    config.from_config(changed(train__cst__steps=0, train__cst__minutes=1.5))


def test_runs_are_those_that_are_named_and_know_where_they_come_from():
    values = changed(runs=("ppow", "cst"))
    found = config.from_config(values)
    assert list(found.chosen()) == ["cst", "ppow"]
    assert found.lineage("ppow") == ["supervise", "ppow"]
    assert list(config.from_config(changed()).chosen()) == ["supervise", "cst", "ppow"]


@dataclasses.dataclass(frozen=True)
class Own(Supervised):
    """An objective of one's own."""

    strength: float = keys.key(2.0, "of something")


def test_an_objective_from_outside_the_package(monkeypatch):
    module = types.ModuleType("elsewhere")
    module.Own, module.thing = Own, object
    monkeypatch.setitem(__import__("sys").modules, "elsewhere", module)
    c = base.get_config()
    c.train.own = config.training_run("elsewhere:Own", steps=3, strength=0.5)
    assert isinstance(c, ConfigDict) and c.train.own.anchors == Supervised().anchors
    found = config.from_config(c).train["own"].method
    assert type(found) is Own and found.strength == 0.5
    module.function, module.Blank, module.Clash, module.Owing = print, Blank, Clash, Owing
    module.Mapped, module.Mistyped = Mapped, Mistyped
    for wrong, why in {
        "elsewhere:Gone": "module:Class of a frozen dataclass",
        "nowhere:Own": "module:Class of a frozen dataclass",
        "elsewhere:thing": "is none)",
        "elsewhere:function": "is none)",
        "Own": "module:Class of a frozen dataclass",
        ":Own": "module:Class of a frozen dataclass",
        ".elsewhere:Own": "module:Class of a frozen dataclass",
        "elsewhere:Blank": "has no check, rounds, init, signal, prepare, inputs, observe, summarise, loss, "
        "window",
        "elsewhere:Clash": "its field 'seed' has a name that is taken: rename it",
        "elsewhere:Owing": "its field 'due' has no default",
        "elsewhere:Mapped": "its field 'table' has the type dict[str, int]; expected bool, int, float, str,",
        "elsewhere:Mistyped": "its types cannot be read: name 'Nowhere' is not defined",
    }.items():
        assert why in refusal(changed(train__cst__objective=wrong)), wrong


@dataclasses.dataclass(frozen=True)
class Blank:
    """No objective at all."""


@dataclasses.dataclass(frozen=True)
class Clash(Supervised):
    """One whose field would never be set."""

    seed: int = keys.key(7, "of something")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owing(Supervised):
    """One that a config cannot leave at its defaults."""

    due: int


@dataclasses.dataclass(frozen=True)
class Mapped(Supervised):
    """One with a field of a type that no config key has."""

    table: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Mistyped(Supervised):
    """One with a type that there is not."""

    strength: "Nowhere" = 1  # noqa: F821


def test_a_training_run_with_a_value_of_another_type_is_one_line():
    for changes in (dict(gamma=0.2), dict(steps="10"), dict(nothing=1)):
        try:
            made = config.training_run("ppow", **changes)
        except ConfigError as e:
            assert "\n" not in str(e) and "a training run of 'ppow'" in str(e)
        else:
            c = base.get_config()
            c.train.own = made
            assert "unknown key" in refusal(c)


@pytest.mark.parametrize("name", ["fresh", "imported", "autoregressive", "decode", "respond", "export"])
def test_names_that_mean_something_else_are_no_runs(name):
    c = base.get_config()
    c.train[name] = config.training_run("supervised", steps=3)
    assert refusal(c).startswith(f"config.train.{name}: found the name '{name}', expected one that")


def test_the_exported_run_is_the_named_one_or_the_last_chosen():
    assert config.from_config(changed()).exported() == "ppow"
    assert config.from_config(changed(runs=("cst", "supervise"))).exported() == "cst"
    assert config.from_config(changed(export__drafter="supervise")).exported() == "supervise"
