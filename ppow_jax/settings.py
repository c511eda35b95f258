"""The configuration as frozen dataclasses: every key, its type and its limits.

`configs/` holds ConfigDicts with the same keys; `from_config` turns one into `Settings` and names the
key of anything unknown, missing, of a wrong type or impossible. Nothing below ever sees a ConfigDict.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from ppow_jax.data import prompts
from ppow_jax.decode import shapes
from ppow_jax.errors import ConfigError
from ppow_jax.interop import eagle3

STAGES = ("respond", "supervise", "cst", "ppow", "evaluate", "export")


@dataclasses.dataclass(frozen=True)
class TargetSettings:
    """Which target, and which of its layers the drafter sees. See `configs/base.py`."""

    path: str
    dtype: str
    taps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis; one of them may be -1: whatever is left."""

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class RespondSettings:
    """What the target answers, and how."""

    prompts: str
    responses: str
    max_new_tokens: int
    temperature: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """How responses become training batches; `length` is the tokens of a training text."""

    length: int
    holdout: int
    cache_features: bool
    feature_dtype: str


@dataclasses.dataclass(frozen=True)
class DrafterSettings:
    """Files to begin with; or of a fresh drafter draft vocabulary size, layers, width, MLP width and
    key/value heads (0: the target's), and whether some of these begin as induction heads. Compute dtype, and
    what the backward pass computes again."""

    path: str
    vocab_size: int
    layers: int
    width: int
    mlp_hidden: int
    kv_heads: int
    induction: bool
    dtype: str
    remat: str


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up, cosine decay to a tenth, and global-norm clipping."""

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class SuperviseSettings:
    """The supervised stage: training-time test over `window` steps from `anchors` a text."""

    steps: int
    batch_size: int
    accumulate: int
    anchors: int
    window: int
    decay: float
    optimizer: OptimizerSettings


@dataclasses.dataclass(frozen=True)
class CSTSettings:
    """Continued supervised training; steps and texts are ppow's, the window supervise's."""

    anchors: int
    optimizer: OptimizerSettings


@dataclasses.dataclass(frozen=True)
class AdawSettings:
    """Adaptive divergence-aware windowing: anchors by criticality after a uniform warm-up."""

    enabled: bool
    warmup_steps: int
    rescore_every: int


@dataclasses.dataclass(frozen=True)
class PPOWSettings:
    """The reinforcement stage. See `configs/base.py` for what each key means."""

    steps: int
    batch_size: int
    accumulate: int
    anchors: int
    group: int
    window: int
    temperature: float
    rollout_temperature: float
    gamma: str
    speedup_weight: float
    proximity_weight: float
    proximity_epsilon: float
    kl_weight: float
    clip: float
    credit: str
    updates: int
    adaw: AdawSettings
    optimizer: OptimizerSettings


@dataclasses.dataclass(frozen=True)
class EvaluateSettings:
    """Benchmarks: simulated on all prompts with `window`, decoded on some as `decode` says."""

    prompts: str
    max_new_tokens: int
    batch_size: int
    window: int
    decode_prompts: int


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How texts are sampled when they are decoded; temperature 0 is greedy."""

    temperature: float
    top_k: int
    top_p: float


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """The shape of drafts, and what is decoded with them. See `configs/base.py` for what each key means."""

    shape: str
    exact: bool
    sampling: SamplingSettings


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Which stage's drafter is exported, for which server, and in which dtype."""

    drafter: str
    server: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """How often to log and save, in steps; how often a stage measures acceptance; how many saves to keep."""

    every_steps: int
    curve_points: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    tensorboard: bool


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole run."""

    seed: int
    stages: tuple[str, ...]
    distributed: bool
    target: TargetSettings
    mesh: MeshSettings
    respond: RespondSettings
    data: DataSettings
    drafter: DrafterSettings
    supervise: SuperviseSettings
    cst: CSTSettings
    ppow: PPOWSettings
    decode: DecodeSettings
    evaluate: EvaluateSettings
    export: ExportSettings
    log: LogSettings


def from_config(config: Mapping[str, Any]) -> Settings:
    """Validated settings from a ConfigDict (or any nested mapping).

    Raises:
      ConfigError: naming the key, what was found and what was expected.
    """
    settings = _build(Settings, config, "config")
    _check(settings)
    return settings


_PLURALS = {str: "strings", int: "whole numbers"}


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    if not isinstance(values, Mapping) and not hasattr(values, "keys"):
        raise ConfigError(f"{path}: found {values!r}, expected a group of keys")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: unknown key; expected one of {', '.join(fields)}")
    missing = [f"{path}.{name}" for name in fields if name not in values]
    if missing:
        raise ConfigError(f"{missing[0]}: missing key; see configs/base.py for its meaning")
    hints = typing.get_type_hints(cls)
    return cls(**{k: _convert(hints[k], values[k], f"{path}.{k}") for k in fields})


def _convert(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)[0]
        if not isinstance(value, tuple | list) or not all(type(v) is of for v in value):
            raise ConfigError(f"{path}: found {value!r}, expected a tuple of {_PLURALS[of]}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}: found {value!r} ({type(value).__name__}), expected {kind.__name__}")
    return value


def _check(s: Settings) -> None:
    """Limits and combinations, each with the key to blame."""

    def require(holds: bool, key: str, found: Any, expected: str) -> None:
        if not holds:
            raise ConfigError(f"config.{key}: found {found!r}, expected {expected}")

    order = [STAGES.index(x) for x in s.stages if x in STAGES]
    known = len(order) == len(s.stages) and order == sorted(set(order)) and order
    require(bool(known), "stages", s.stages, f"a subset, in order, of {', '.join(STAGES)}")
    dtypes = ("float32", "bfloat16")
    require(s.target.dtype in dtypes, "target.dtype", s.target.dtype, "float32 or bfloat16")
    require(s.drafter.dtype in dtypes, "drafter.dtype", s.drafter.dtype, "float32 or bfloat16")
    remats = ("none", "dots", "all")
    require(s.drafter.remat in remats, "drafter.remat", s.drafter.remat, ", ".join(remats))
    for key, stage in (("supervise", s.supervise), ("ppow", s.ppow)):
        even = stage.accumulate >= 1 and stage.batch_size % stage.accumulate == 0
        require(even, f"{key}.accumulate", stage.accumulate, f"a divisor of {key}.batch_size")
    stored = (*dtypes, "float16")
    require(
        s.data.feature_dtype in stored,
        "data.feature_dtype",
        s.data.feature_dtype,
        ", ".join(stored),
    )
    credits = ("accepted", "window")
    require(s.ppow.credit in credits, "ppow.credit", s.ppow.credit, "accepted or window")
    require(_is_gamma(s.ppow.gamma), "ppow.gamma", s.ppow.gamma, "'measured' or a number >= 0")
    drafters = ("supervise", "cst", "ppow")
    require(s.export.drafter in drafters, "export.drafter", s.export.drafter, ", ".join(drafters))
    servers = (*eagle3.SERVERS, "")
    require(
        s.export.server in servers, "export.server", s.export.server, f"{', '.join(servers[:-1])}, or empty"
    )
    require(s.export.dtype in stored, "export.dtype", s.export.dtype, ", ".join(stored))
    require(
        not (s.drafter.width and s.drafter.induction),
        "drafter.induction",
        s.drafter.induction,
        "False for a drafter of a width of its own: the heads read the target's embedding",
    )
    require(
        s.ppow.temperature > 0 or s.respond.temperature == 0,
        "ppow.temperature",
        s.ppow.temperature,
        "above 0, because respond.temperature is: greedy acceptance needs greedy text",
    )
    require(
        s.ppow.rollout_temperature > 0,
        "ppow.rollout_temperature",
        s.ppow.rollout_temperature,
        "above 0 (rollouts are sampled)",
    )
    top_p = s.decode.sampling.top_p
    require(0 < top_p <= 1, "decode.sampling.top_p", top_p, "above 0, at most 1")
    if s.decode.shape != "auto":
        shapes.parse(s.decode.shape, "config.decode.shape")
    auto = s.decode.shape != "auto" or "evaluate" not in s.stages
    require(auto or s.data.holdout > 0, "data.holdout", s.data.holdout, "1 or more for decode.shape 'auto'")
    require(
        auto or s.respond.temperature == 0,
        "respond.temperature",
        s.respond.temperature,
        "0 for decode.shape 'auto', which measures acceptance on greedy texts",
    )
    require(s.ppow.group >= 2, "ppow.group", s.ppow.group, "at least 2 windows to compare")
    pairs = "NAME=SOURCE pairs, see configs/base.py"
    sources = prompts.parse(s.respond.prompts, "respond.prompts") or s.respond.responses
    texts = bool(sources) or "respond" not in s.stages
    require(texts, "respond.prompts", s.respond.prompts, pairs)
    benchmarks = prompts.parse(s.evaluate.prompts, "evaluate.prompts")
    measured = bool(benchmarks) or "evaluate" not in s.stages
    require(measured, "evaluate.prompts", s.evaluate.prompts, pairs)
    for key, value in _walk(s, ""):
        if key.split(".")[-1] in _POSITIVE:
            require(value >= 1, key, value, "at least 1")
        elif key.startswith("mesh."):
            require(value == -1 or value >= 1, key, value, "at least 1, or -1 for what is left")
        elif isinstance(value, int | float) and key != "seed":
            require(value >= 0, key, value, "0 or more")


_POSITIVE = {
    "steps", "layers", "batch_size", "anchors", "window", "length", "vocab_size", "max_new_tokens",
    "updates", "rescore_every", "every_steps", "curve_points", "checkpoint_every_steps",
    "keep_checkpoints", "decode_prompts",
}  # fmt: skip


def _is_gamma(text: str) -> bool:
    if text == "measured":
        return True
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _walk(value: Any, path: str) -> typing.Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    else:
        yield path, value
