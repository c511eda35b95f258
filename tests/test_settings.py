"""The configuration: every ready-made one is valid; what is wrong is named with what was expected."""

import dataclasses
import importlib
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import base
from ppow_jax import settings
from ppow_jax.errors import ConfigError

READY = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def changed(**changes) -> dict:
    """The base configuration as plain dicts, with `supervise__steps=3` setting `supervise.steps`."""
    config = base.get_config().to_dict()
    for key, value in changes.items():
        *path, last = key.split("__")
        section = config
        for name in path:
            section = section[name]
        section[last] = value
    return config


def refusal(config) -> str:
    """The message that `from_config` refuses a config with; one line."""
    with pytest.raises(ConfigError) as caught:
        settings.from_config(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_ready_configs_are_found():
    assert {"base", "tiny", "smollm2_135m"} <= set(READY)


@pytest.mark.parametrize("name", [n for n in READY if n != "__init__"])
def test_every_ready_config_is_valid(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    found = settings.from_config(config)
    assert dataclasses.asdict(found) == config.to_dict()  # nothing lost, nothing changed


def test_values_arrive_with_their_types():
    found = settings.from_config(
        changed(stages=["respond", "evaluate"], respond__temperature=1, ppow__temperature=1, seed=-3)
    )
    assert found.stages == ("respond", "evaluate")
    assert type(found.respond.temperature) is float and found.respond.temperature == 1.0
    assert found.seed == -3
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seed = 1


def test_unknown_key_at_any_depth():
    message = refusal(changed(supervise__stepz=3))
    assert message.startswith("config.supervise.stepz: unknown key; expected one of steps, batch_size,")
    assert refusal(changed(colour="red")).startswith("config.colour: unknown key; expected one of seed,")
    deep = refusal(changed(ppow__adaw__warmup=3))
    assert (
        deep == "config.ppow.adaw.warmup: unknown key; expected one of enabled, warmup_steps, rescore_every"
    )


def test_missing_key_at_any_depth():
    config = changed()
    del config["ppow"]["adaw"]["rescore_every"]
    assert refusal(config).startswith("config.ppow.adaw.rescore_every: missing key")
    config = ConfigDict(changed())
    del config.log
    assert refusal(config).startswith("config.log: missing key")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("supervise__steps", 2.5, "config.supervise.steps: found 2.5 (float), expected int"),
        ("supervise__steps", True, "config.supervise.steps: found True (bool), expected int"),
        ("ppow__clip", "0.2", "config.ppow.clip: found '0.2' (str), expected float"),
        ("ppow__clip", False, "config.ppow.clip: found False (bool), expected float"),
        ("distributed", 1, "config.distributed: found 1 (int), expected bool"),
        ("target__path", None, "config.target.path: found None (NoneType), expected str"),
        ("ppow__gamma", 0.12, "config.ppow.gamma: found 0.12 (float), expected str"),
        ("stages", "respond", "config.stages: found 'respond', expected a tuple of strings"),
        ("stages", 3, "config.stages: found 3, expected a tuple of strings"),
        ("target__taps", (1, "2"), "config.target.taps: found (1, '2'), expected a tuple of whole numbers"),
        ("ppow__optimizer", 3e-4, "config.ppow.optimizer: found 0.0003, expected a group of keys"),
    ],
)
def test_wrong_type(key, value, expected):
    assert refusal(changed(**{key: value})) == expected


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        (dict(stages=("evaluate", "respond")), "stages", "a subset, in order, of respond, supervise"),
        (dict(stages=("respond", "train")), "stages", "a subset, in order"),
        (dict(stages=("cst", "cst")), "stages", "a subset, in order"),
        (dict(stages=()), "stages", "a subset, in order"),
        (dict(target__dtype="float16"), "target.dtype", "float32 or bfloat16"),
        (dict(drafter__dtype="int8"), "drafter.dtype", "float32 or bfloat16"),
        (dict(data__feature_dtype="int8"), "data.feature_dtype", "float32, bfloat16, float16"),
        (dict(ppow__credit="all"), "ppow.credit", "accepted or window"),
        (dict(ppow__gamma="fast"), "ppow.gamma", "'measured' or a number >= 0"),
        (dict(ppow__gamma="-0.1"), "ppow.gamma", "'measured' or a number >= 0"),
        (dict(ppow__gamma="nan"), "ppow.gamma", "'measured' or a number >= 0"),
        (dict(ppow__group=1), "ppow.group", "at least 2"),
        (dict(ppow__rollout_temperature=0.0), "ppow.rollout_temperature", "above 0"),
        (dict(respond__temperature=1.0), "ppow.temperature", "above 0, because respond.temperature is"),
        (dict(export__drafter="respond"), "export.drafter", "supervise, cst, ppow"),
        (dict(export__server="tgi"), "export.server", "sglang, vllm, vllm_tpu, or empty"),
        (dict(export__dtype="int8"), "export.dtype", "float32, bfloat16, float16"),
        (dict(drafter__layers=0), "drafter.layers", "at least 1"),
        (dict(drafter__width=64), "drafter.induction", "False for a drafter of a width of its own"),
        (dict(supervise__steps=0), "supervise.steps", "at least 1"),
        (dict(decode__shape="chain:0"), "decode.shape", "chain:K, group:GxK"),
        (dict(decode__shape="tree:60x2x4"), "decode.shape", "2 to 21, all that 2 levels of top_k 4 have"),
        (dict(decode__shape="auto", data__holdout=0), "data.holdout", "1 or more for decode.shape 'auto'"),
        (
            dict(decode__shape="auto", respond__temperature=1.0, ppow__temperature=1.0),
            "respond.temperature",
            "0 for decode.shape 'auto'",
        ),
        (dict(decode__sampling__top_p=0.0), "decode.sampling.top_p", "above 0, at most 1"),
        (dict(decode__sampling__temperature=-1.0), "decode.sampling.temperature", "0 or more"),
        (dict(evaluate__decode_prompts=0), "evaluate.decode_prompts", "at least 1"),
        (dict(log__keep_checkpoints=0), "log.keep_checkpoints", "at least 1"),
        (dict(cst__optimizer__warmup_steps=-1), "cst.optimizer.warmup_steps", "0 or more"),
        (dict(cst__optimizer__learning_rate=-1e-3), "cst.optimizer.learning_rate", "0 or more"),
        (dict(ppow__kl_weight=float("nan")), "ppow.kl_weight", "0 or more"),
        (dict(data__holdout=-1), "data.holdout", "0 or more"),
        (dict(mesh__tensor=0), "mesh.tensor", "at least 1, or -1"),
        (dict(respond__prompts=" "), "respond.prompts", "NAME=SOURCE pairs"),
        (dict(evaluate__prompts=","), "evaluate.prompts", "NAME=SOURCE pairs"),
        (dict(evaluate__prompts="gsm8k.jsonl"), "evaluate.prompts", "NAME=SOURCE"),
    ],
)
def test_impossible_values_and_combinations(changes, key, expected):
    message = refusal(changed(**changes))
    assert message.startswith(f"config.{key}: found ")
    assert f"expected {expected}" in message


def test_what_looks_odd_but_is_possible():
    """Nothing to answer is fine where no stage answers; zeros switch terms off; one axis takes the rest."""
    settings.from_config(changed(stages=("supervise",), respond__prompts="", evaluate__prompts=""))
    settings.from_config(changed(respond__prompts="", respond__responses="answers.jsonl"))
    settings.from_config(changed(ppow__proximity_weight=0, ppow__kl_weight=0.0, data__holdout=0))
    settings.from_config(changed(mesh__data=1, mesh__tensor=-1, ppow__gamma="measured"))
