"""Checks of a drafter's files and of whom they belong to: what they say, against the target and the run."""

import contextlib

import numpy as np

from ppow_jax import experiment
from ppow_jax.doctor.case import Case
from ppow_jax.doctor.findings import FINE, NOTE, WRONG, Finding
from ppow_jax.drafters.eagle3 import DrafterConfig
from ppow_jax.errors import UserError
from ppow_jax.models import rotary
from ppow_jax.models.rotary import Rotary
from ppow_jax.targets.gguf import permute, unpermute

_SHOWN = 4  # names in a line
_AGAIN = "export again: --config.stages=\"('export',)\""


def target(case: Case) -> Finding:
    """The target that responses, checkpoint and files were made with, against the one there is."""
    found, others = case.experiment.fingerprint, {}
    changed = experiment.changed(case.experiment)
    if "fingerprint" in changed:
        others["the workdir"] = changed["fingerprint"][1]
    with contextlib.suppress(UserError):  # the other checks say what it is
        others[f"the run {case.run}"] = case.about_checkpoint["target"]
    if case.path is not None and case.file.fingerprint:
        others[str(case.path)] = case.file.fingerprint
    wrong = [f"{name} was made with {other[:12]}" for name, other in others.items() if other != found]
    if wrong:
        return Finding(
            WRONG,
            f"the target is {found[:12]}, but {', '.join(wrong)}",
            "serve the drafter beside the target that it was trained with, or train one for this target",
        )
    if not others:
        return Finding(NOTE, f"the target is {found[:12]}; the files do not say which they were trained with")
    return Finding(FINE, f"{found[:12]}, as {', '.join(others)} has it")


def vocabulary_map(case: Case) -> Finding:
    """`d2t`: offsets in safetensors, ids in GGUF files, ascending, below the target's size."""
    file, V = case.file, case.experiment.target.config.vocab_size
    if file.d2t is None:
        return Finding(FINE, "no d2t: the draft vocabulary is the target's")
    raw, number = file.d2t.astype(np.int64), np.arange(len(file.d2t))
    kinds = {"offsets": number + raw, "ids": raw}
    meant, other = ("ids", "offsets") if file.is_gguf else ("offsets", "ids")
    N = file.draft_tokens or len(raw)
    if len(raw) != N or not N:
        return Finding(WRONG, f"found {len(raw)} numbers in d2t, expected {N}, the rows of the head", _AGAIN)
    fits = {kind: _fits(ids, V, file.t2d) for kind, ids in kinds.items()}
    if not fits[meant] and fits[other]:
        where = "a GGUF file" if file.is_gguf else "safetensors"
        return Finding(
            WRONG,
            f"found {other} in d2t, expected {meant} in {where}",
            "write ids: draft id + offset" if file.is_gguf else "write offsets: id - draft id",
        )
    ids = kinds[meant]
    if not fits[meant]:
        outside = int(((ids < 0) | (ids >= V)).sum())
        falls = int((np.diff(ids) <= 0).sum())
        found = f"{outside} ids outside 0 to {V - 1}, {falls} that do not ascend"
        if not outside and not falls:
            found = "other tokens than in the mask t2d"
        return Finding(WRONG, f"found in d2t {found}, expected {N} ascending {meant}", _AGAIN)
    if case.kin and not np.array_equal(ids, np.asarray(case.checkpoint.vocab)):
        different = int((ids != np.asarray(case.checkpoint.vocab)).sum())
        return Finding(WRONG, f"{different} of {N} draft ids stand for other tokens than in the run", _AGAIN)
    return Finding(FINE, f"{N} ascending {meant} below {V}")


def _fits(ids_N: np.ndarray, vocab_size: int, t2d_V: np.ndarray | None) -> bool:
    """Whether they are ascending ids of the target, those of the mask if there is one."""
    inside = bool((np.diff(ids_N) > 0).all()) and ids_N[0] >= 0 and ids_N[-1] < vocab_size
    return inside and (t2d_V is None or np.array_equal(np.flatnonzero(t2d_V), ids_N))


def taps(case: Case) -> Finding:
    """The layers that the files name, as each server takes them, against those of the run."""
    expected = case.experiment.target.config.taps
    read = case.file.taps(case.experiment.target.config.layers)
    wrong = [f"{name} reads {list(layers)}" for name, layers in read.items() if layers != expected]
    if not wrong:
        return Finding(FINE, f"{', '.join(read)}: the inputs of layers {list(expected)}")
    found = f"{', '.join(wrong)}, expected the inputs of layers {list(expected)}"
    if not case.kin:
        return Finding(
            NOTE, f"{found} (config.target.taps)", "set config.target.taps if this drafter has others"
        )
    return Finding(
        WRONG,
        found,
        "eagle_config holds outputs (input - 1), the top level and GGUF files hold inputs; correct the ids",
    )


def rotary_base(case: Case) -> Finding:
    """Base and scaling of the rotary embedding, against the run's, or else the target's."""
    found, target = wavelengths(case.imported.config), case.experiment.target.config
    if case.kin:
        expected, whose = wavelengths(case.checkpoint.drafter.config), "the run's"
    else:
        expected, whose = Rotary(target.rope_theta, target.rope_divisors, target.rope_scale), "the target's"
    if alike(found, expected):
        return Finding(FINE, f"{_described(found)}, {whose}")
    return Finding(
        WRONG if case.kin else NOTE,
        f"found {_described(found)}, expected {whose}: {_described(expected)}",
        "set rope_theta and rope_scaling (GGUF: rope.freq_base and rope_freqs) to what the drafter was "
        "trained with",
    )


def wavelengths(config: DrafterConfig) -> Rotary:
    """Of a drafter."""
    return rotary.scaled(dict(config.rope_scaling), config.rope_theta, config.head_size, config.rope_context)


def alike(one: Rotary, other: Rotary) -> bool:
    """Whether they are the same but for the rounding of a file."""
    same_length = len(one.divisors) == len(other.divisors)
    first, second = ([r.theta, r.scale, *r.divisors] for r in (one, other))
    return same_length and np.allclose(first, second, rtol=1e-5)


def _described(found: Rotary) -> str:
    longest = max(found.divisors, default=1.0)
    scaling = f"wavelengths stretched up to {longest:g}-fold" if longest != 1 else "no scaling"
    return f"base {found.theta:g}, {scaling}"


def parameters(case: Case) -> Finding:
    """Every matrix of the files against the checkpoint that they came from."""
    strange, total = case.strange, len(case.distances)
    if not strange:
        return Finding(FINE, f"all {total} parameters are those of the run {case.run}")
    if not case.kin:
        found = f"{len(strange)} of {total} parameters are not those of the run {case.run}"
        if case.given:
            return Finding(NOTE, f"{found}: another drafter", "name the run that it came from with --run")
        return Finding(WRONG, f"{found}, which is said to be exported", _AGAIN)
    named = [f"{name} ({_how(case, name)})" for name in strange[:_SHOWN]]
    more = f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
    return Finding(
        WRONG, f"other than in the run {case.run}: {', '.join(named)}{more}", f"{_AGAIN}, or convert again"
    )


def _how(case: Case, name: str) -> str:
    """In which way a parameter differs."""
    ours, theirs = case.checkpoint.params, case.imported.params
    for part in name.split("/"):
        ours, theirs = ours.get(part, {}), theirs.get(part, {})
    if isinstance(ours, dict) or isinstance(theirs, dict):
        return "missing in one of them"
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape:
        return f"shape {b.shape}, expected {a.shape}"
    forms = {"all zero": np.zeros_like(a)}
    if a.ndim == 2 and a.shape[0] == a.shape[1]:
        forms["transposed"] = a.T
    config = case.checkpoint.drafter.config
    if name.endswith(("attention/query/weight", "attention/key/weight")):
        heads = config.heads if "query" in name else config.kv_heads
        forms |= {"rows in another order": permute(a, heads), "rows put in order twice": unpermute(a, heads)}
    for form, values in forms.items():
        if np.linalg.norm(b - values) <= 0.2 * np.linalg.norm(a):
            return form
    return f"{case.distances[name]:.0%} off"
