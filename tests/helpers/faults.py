"""Copies of a finished workdir with one thing wrong in each, as `ppow_jax.doctor` must find it."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from drafter_files import LLAMA3, change, config_of, tensors_of

from ppow_jax import experiment
from ppow_jax.data import records
from ppow_jax.doctor import checks
from ppow_jax.doctor.findings import WRONG, Finding
from ppow_jax.drafters.files import dialects, llamacpp
from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.targets import orbax
from ppow_jax.targets.gguf import permute
from ppow_jax.training import drafters
from ppow_jax.training.drafters import Trained

RUN = "cst"  # that is exported
_TOKENIZER = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}


class Fault(NamedTuple):
    """Something wrong in a workdir.

    Attributes:
      plant: makes it in a copy; may return flags of the doctor, by name.
      found: the check that finds it.
      words: that it says.
      follows: other checks that may well call something wrong then.
    """

    plant: Callable[[pathlib.Path], dict[str, str] | None]
    found: str
    words: str
    follows: Iterable[str] = ()


def copy(workdir: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    """A workdir of its own, with its own files of prompts."""
    shutil.copytree(workdir, place / "workdir")
    for file in workdir.parent.glob("*.jsonl"):
        shutil.copy(file, place)
    path = place / "workdir" / "config.json"
    path.write_text(path.read_text().replace(str(workdir.parent), str(place)))
    return place / "workdir"


def load(workdir: pathlib.Path) -> experiment.Experiment:
    """The experiment of a workdir."""
    return experiment.load_target(experiment.read_settings(workdir), workdir)


def examine(workdir: pathlib.Path, target: str = "", drafter: str = "", run: str = "") -> dict[str, Finding]:
    """What the doctor finds."""
    return checks.doctor(workdir, run, target, drafter)


def wrong(found: dict[str, Finding]) -> set[str]:
    """The checks that call something wrong."""
    return {name for name, finding in found.items() if finding.verdict == WRONG}


def _files(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "export" / "sglang"


def _another_target(workdir: pathlib.Path) -> dict[str, str]:
    return {"target": "markov:1"}


def _taps_one_off(workdir: pathlib.Path) -> None:
    ids = config_of(_files(workdir))["eagle_config"][dialects.IDS]
    change(_files(workdir), eagle_config={dialects.IDS: [i + 1 for i in ids]})


def _ids_for_offsets(workdir: pathlib.Path) -> None:
    offsets = tensors_of(_files(workdir))["d2t"]
    change(_files(workdir), {"d2t": offsets + np.arange(len(offsets))})


def _descending(workdir: pathlib.Path) -> None:
    offsets = tensors_of(_files(workdir))["d2t"].copy()
    offsets[[3, 4]] = offsets[[4, 3]] + [1, -1]
    change(_files(workdir), {"d2t": offsets})


def _another_base(workdir: pathlib.Path) -> None:
    change(_files(workdir), rope_theta=500_000.0, rope_parameters=None)


def _scaling_left_out(workdir: pathlib.Path) -> None:
    """Of a run whose drafter has one: its files are those of before."""

    def scaled(trained: Trained) -> Trained:
        shape = dataclasses.replace(trained.drafter.config, rope_scaling=tuple(LLAMA3.items()))
        return trained._replace(drafter=type(trained.drafter)(shape))

    _change_checkpoint(workdir, scaled)


def _change_checkpoint(workdir: pathlib.Path, changed: Callable[[Trained], Trained]) -> None:
    """Puts another drafter in the place of the run's."""
    made = load(workdir)
    trained = changed(drafters.load(made, RUN))
    store = drafters.checkpoints(made, RUN)
    about = store.about() | {"drafter": dataclasses.asdict(trained.drafter.config)}
    store.close()
    where = drafters.directory(made.workdir, RUN)
    shutil.rmtree(where)
    store = Checkpoints(where, 1)
    store.save(about["steps"], {"params": trained.params, "vocab": np.asarray(trained.vocab)}, None, about)
    store.close()


def _half_the_vocabulary(workdir: pathlib.Path) -> None:
    def halved(trained: Trained) -> Trained:
        counts = sum(np.bincount(r["tokens"], minlength=31) for r in records.Records(workdir / "responses"))
        vocab = np.asarray(trained.vocab)
        kept = np.sort(np.argsort(-counts[vocab], kind="stable")[1::2])  # every other one, by frequency
        shape = dataclasses.replace(trained.drafter.config, vocab_size=len(kept))
        head = {"weight": np.asarray(trained.params["head"]["weight"])[kept]}
        params = trained.params | {"head": head}
        return trained._replace(drafter=type(trained.drafter)(shape), params=params, vocab=vocab[kept])

    _change_checkpoint(workdir, halved)
    shutil.rmtree(workdir / "export")


def _another_template(workdir: pathlib.Path) -> dict[str, str]:
    made, where = load(workdir), workdir.parent / "target"
    tokens = dataclasses.replace(made.tokenizer, template=made.tokenizer.template.replace("}}>{{", "}}> {{"))
    orbax.save(where, made.target.config, made.target_params, tokens)
    return {"target": str(where)}


def _masks(workdir: pathlib.Path, changed: Callable[[np.ndarray], np.ndarray]) -> None:
    for name in records.shards(workdir / "responses"):
        rows = list(records.Records(workdir / "responses", [name]))
        changes = [row | {"assistant": changed(row["assistant"])} for row in rows]
        records.write_shard(workdir / "responses", name, changes)


def _empty_masks(workdir: pathlib.Path) -> None:
    _masks(workdir, np.zeros_like)


def _shifted_masks(workdir: pathlib.Path) -> None:
    _masks(workdir, lambda mask: np.concatenate([[0], mask[:-1]]).astype(mask.dtype))


def _other_prompts(workdir: pathlib.Path) -> None:
    with (workdir.parent / "train.jsonl").open("a") as file:
        file.write('{"id": "new", "turns": ["a b"]}\n')


def _short_texts(workdir: pathlib.Path) -> None:
    values = json.loads((workdir / "config.json").read_text())
    values["data"]["length"] = 10
    (workdir / "config.json").write_text(json.dumps(values))


def _zeroed(workdir: pathlib.Path) -> None:
    name = "lm_head.weight"
    change(_files(workdir), {name: np.zeros_like(tensors_of(_files(workdir))[name])})


def _transposed(workdir: pathlib.Path) -> None:
    name = "midlayer.self_attn.v_proj.weight"
    change(_files(workdir), {name: np.ascontiguousarray(tensors_of(_files(workdir))[name].T)})


def gguf(workdir: pathlib.Path, **changes: Any) -> dict[str, str]:
    """A file of the run's drafter for llama.cpp, with parameters or other things changed."""
    made, file = load(workdir), workdir.parent / "drafter.gguf"
    trained = drafters.load(made, RUN)
    target = dataclasses.replace(made.target.config, taps=changes.get("taps", made.target.config.taps))
    vocab, params = changes.get("vocab", np.asarray(trained.vocab)), jax.device_get(trained.params)
    for name, order in changes.get("orders", {}).items():
        params["attention"][name] = {"weight": order(params["attention"][name]["weight"])}
    about = (trained.drafter.config, params, vocab, target, _TOKENIZER, "float32", made.fingerprint)
    llamacpp.write(file, *about)
    return {"drafter": str(file)}


def _rows_permuted(workdir: pathlib.Path) -> dict[str, str]:
    """As a converter leaves them that does not know of the interleaved order, the other way round."""
    config = drafters.load(load(workdir), RUN).drafter.config
    orders = {"query": lambda x: permute(x, config.heads), "key": lambda x: permute(x, config.kv_heads)}
    return gguf(workdir, orders=orders)


def _offsets_for_ids(workdir: pathlib.Path) -> dict[str, str]:
    vocab = np.asarray(drafters.load(load(workdir), RUN).vocab)
    return gguf(workdir, vocab=vocab - np.arange(len(vocab)))


def _gguf_taps_one_off(workdir: pathlib.Path) -> dict[str, str]:
    return gguf(workdir, taps=(0, 1, 2))


def _other_features(workdir: pathlib.Path) -> None:
    for name in records.shards(workdir / "features"):
        rows = list(records.Records(workdir / "features", [name]))
        changes = [row | {"taps": np.roll(row["taps"], 1, -1)} for row in rows]
        records.write_shard(workdir / "features", name, changes)


_MEASURED = ("export", "conventions", "decoding", "positions", "overfitting")
FAULTS = {
    "another target of the same shape": Fault(_another_target, "target", "the run cst was made with"),
    "taps one off": Fault(
        _taps_one_off, "taps", "sglang reads [2, 3, 4], expected the inputs of layers [1, 2, 3]", _MEASURED
    ),
    "taps one off in a GGUF file": Fault(
        _gguf_taps_one_off, "taps", "llamacpp reads [0, 1, 2], expected", _MEASURED
    ),
    "ids for offsets": Fault(_ids_for_offsets, "d2t", "found ids in d2t, expected offsets in safetensors"),
    "offsets for ids in a GGUF file": Fault(_offsets_for_ids, "d2t", "found offsets in d2t, expected ids"),
    "ids that do not ascend": Fault(_descending, "d2t", "1 that do not ascend"),
    "another rotary base": Fault(_another_base, "rotary", "found base 500000, no scaling", _MEASURED),
    "rotary scaling left out": Fault(
        _scaling_left_out, "rotary", "no scaling, expected the run's: base 10000, wavelengths", _MEASURED
    ),
    "another chat template": Fault(_another_template, "template", "24 of 24 responses begin with"),
    "empty masks": Fault(_empty_masks, "masks", "24 empty"),
    "shifted masks": Fault(_shifted_masks, "masks", "24 beginning elsewhere", ("positions",)),
    "half the vocabulary": Fault(_half_the_vocabulary, "vocabulary", "vocabulary of 10 ", ("positions",)),
    "other prompts": Fault(_other_prompts, "inputs", "what config.respond.prompts names has changed"),
    "texts far beyond data.length": Fault(
        _short_texts, "lengths", "data.length 10 lie of the written tokens: responses 75%", ("positions",)
    ),
    "a matrix of zeros": Fault(_zeroed, "parameters", "head/weight (all zero)", _MEASURED),
    "a matrix transposed": Fault(_transposed, "parameters", "attention/value/weight (transposed)", _MEASURED),
    "rows of queries and keys in another order": Fault(
        _rows_permuted, "parameters", "attention/query/weight (rows in another order)", _MEASURED
    ),
    "features of something else": Fault(
        _other_features, "features", "off what the target computes", ("positions", "overfitting")
    ),
}
