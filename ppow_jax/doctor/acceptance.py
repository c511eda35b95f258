"""Checks that measure: drafts on held-out texts, simulated and decoded for real.

Accepted means drafted tokens that a verification pass keeps, tau less 1: what a drafter wins.

Shape letters: B texts, T positions, K window.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ppow_jax.data import texts
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.profile import Texts
from ppow_jax.decode.session import Session
from ppow_jax.decode.shapes import chain
from ppow_jax.decode.simulate import simulate
from ppow_jax.doctor.case import Case, Subject
from ppow_jax.doctor.files import alike, wavelengths
from ppow_jax.doctor.findings import FINE, NOTE, WRONG, Finding
from ppow_jax.errors import UserError
from ppow_jax.models.rotary import Rotary
from ppow_jax.models.target import Target
from ppow_jax.parallel import processes
from ppow_jax.report.statistics import TurnRounds, by_prompt
from ppow_jax.targets.gguf import permute, unpermute
from ppow_jax.training import curves, metrics

_DRAFTED = 3  # tokens a round, where decoding for real is compared
_ROUNDS = 2  # by which they may differ in all, where rounding parts two candidates
_MEASURED, _MEASURED_ANEW = 32, 8  # texts with features on disk, and without
_A_LITTLE, _LESS, _LESS_IF_COARSE = 0.97, 0.9, 0.8  # of the accepted tokens; q4_0 has cost a tenth
_BETTER = 1.07  # times the accepted tokens, which another convention must give to be believed
_SAVED = 4  # passes, which it must save at least: in short texts one may be chance
_CHANCE = 0.05  # accepted tokens a round that mean nothing
_OVERFIT, _OVERFIT_MUCH = 0.7, 0.3  # accepted on held-out texts, as a share of that on training texts


class Counted(NamedTuple):
    """Rounds of some texts.

    Attributes:
      tau: tokens a verification pass.
      passes: how many there were.
      rates: float `[K]`, of the rounds that had text to compare with, the share that accepted each position.
    """

    tau: float
    passes: int
    rates: np.ndarray

    @property
    def accepted(self) -> float:
        """Drafted tokens that a pass keeps."""
        return self.tau - 1


def _rounds(subject: Subject, on: Texts, depth: int) -> list[TurnRounds]:
    """The rounds of each text, by simulation."""
    found = processes.host(simulate(subject.drafter, subject.weights, *on, chain(depth)))
    counts = (found.emitted > 0).sum(1)
    return [TurnRounds(*(x[row, :count] for x in found)) for row, count in enumerate(counts)]


def _counted(rounds: Sequence[TurnRounds], depth: int) -> Counted:
    found = by_prompt(["all"] * len(rounds), rounds, depth)
    if not found.passes[0]:
        raise UserError("the held-out texts have no round: their responses are of one token or two")
    tau, passes = float(found.tokens[0] / found.passes[0]), int(found.passes[0])
    return Counted(tau, passes, found.accepted / np.maximum(1, found.offered))


def _on_held(case: Case, subject: Subject) -> Counted:
    """A drafter on the held-out texts."""
    sample, depth = case.held, case.experiment.settings.evaluate.window
    on = Texts(sample.taps(subject.taps), jnp.asarray(sample.tokens), sample.start, sample.end)
    return _counted(_rounds(subject, on, depth), depth)


def exported(case: Case) -> Finding:
    """The drafter in the files accepts as much as the run's checkpoint."""
    if case.strange and not case.kin:
        raise UserError("the files are not those of the run's drafter (see parameters)")
    ours, theirs = (_on_held(case, subject).accepted for subject in (case.trained, case.served))
    found = f"accepted a round: {theirs:.2f} with the files, {ours:.2f} with the checkpoint"
    if theirs < (_LESS_IF_COARSE if case.stored_coarsely else _LESS) * ours:
        remedy = "the other checks of the files say why; if they do not, export or convert again"
        return Finding(WRONG, f"{found}; expected the same", remedy)
    if theirs < _A_LITTLE * ours:
        return Finding(
            NOTE,
            f"{found}; expected the same",
            "a coarse config.export.dtype may be why; if not, the other checks",
        )
    return Finding(FINE, found)


def conventions(case: Case) -> Finding:
    """The drafter with one convention changed: where that is better, the files are wrong about it."""
    subject = case.examined if case.path is None else case.served
    own = _on_held(case, subject)
    others = {name: _on_held(case, other) for name, other in _otherwise(case, subject)}
    if not others:
        raise UserError("there is no other convention to compare with")
    best = max(others, key=lambda name: others[name].tau)
    found = f"accepted a round: {own.accepted:.2f} as it is, {others[best].accepted:.2f} with {best}"
    saved = own.passes - others[best].passes
    if saved >= _SAVED and others[best].accepted > _BETTER * own.accepted:
        return Finding(
            WRONG, f"{found}; expected the best as it is", f"write the files with {best}, or convert again"
        )
    return Finding(FINE, f"{found} (the best of {len(others)} others)")


def _otherwise(case: Case, subject: Subject) -> Iterator[tuple[str, Subject]]:
    """The drafter with each convention changed alone, by what has changed."""
    for step, name in ((-1, "taps one layer lower"), (1, "taps one layer higher")):
        moved = tuple(tap + step for tap in subject.taps)
        if case.held.has(moved):
            yield name, subject._replace(taps=moved)
    config, target = subject.drafter.config, case.experiment.target.config
    for order, name in ((unpermute, "GGUF's order of query and key rows undone"),
                        (permute, "query and key rows in GGUF's order")):  # fmt: skip
        attention, heads = dict(subject.weights.params["attention"]), (config.heads, config.kv_heads)
        for part, count in zip(("query", "key"), heads, strict=True):
            rows = np.asarray(attention[part]["weight"])
            attention[part] = attention[part] | {"weight": jnp.asarray(order(rows, count))}
        params = subject.weights.params | {"attention": attention}
        yield name, subject._replace(weights=subject.weights._replace(params=params))
    there = Rotary(target.rope_theta, target.rope_divisors, target.rope_scale)
    plain = dataclasses.replace(config, rope_theta=target.rope_theta, rope_scaling=(), rope_context=0)
    if not alike(wavelengths(config), there) and not alike(wavelengths(config), wavelengths(plain)):
        name = f"the target's rotary base {target.rope_theta:g} and no scaling"
        yield name, subject._replace(drafter=type(subject.drafter)(plain))


def decoding(case: Case) -> Finding:
    """Real decoding of the held-out prompts has the rounds of the simulation, and writes the responses."""
    subject, sample, made = case.examined, case.held, case.experiment
    most = int((sample.end - sample.start).max())
    target = Target(dataclasses.replace(made.target.config, taps=subject.taps))
    how = (DecodeConfig(most, made.tokenizer.stop_ids), Eagle(subject.drafter, chain(_DRAFTED)))
    session = Session(target, made.target_params, *how, subject.weights)
    out = processes.host(session([t[:s] for t, s in zip(sample.tokens, sample.start, strict=True)]))
    on = Texts(sample.taps(subject.taps), jnp.asarray(sample.tokens), sample.start, sample.end)
    same = tokens = there = here = parted = 0
    for row, simulated in enumerate(_rounds(subject, on, _DRAFTED)):
        text = sample.tokens[row, sample.start[row] : sample.end[row]]
        written = out.tokens[row, : min(out.emitted[row], len(text))]
        differs = np.flatnonzero(written != text[: len(written)])
        common = int(differs[0]) if len(differs) else len(written)
        same, tokens = same + common, tokens + len(text)
        real, expected = (
            {int(end) for end in 1 + np.cumsum(emitted) if end < common}
            for emitted in (out.emitted_by_round[row][out.emitted_by_round[row] > 0], simulated.emitted)
        )
        there, here, parted = there + len(expected), here + len(real), parted + (real != expected)
    if same < tokens / 2:
        return Finding(
            WRONG,
            f"the target writes {same / tokens:.0%} of the responses again, expected nearly all",
            "they are another target's, or of another template or temperature: answer and train again",
        )
    found = f"{here} rounds decoded for real, {there} by simulation of the same {same} tokens"
    if abs(here - there) > max(_ROUNDS, (1 - _A_LITTLE) * there):
        return Finding(WRONG, f"{found}; expected the same", "report this: decoder and simulation must agree")
    if parted:
        return Finding(
            NOTE,
            f"{found}; {parted} of {len(sample.end)} texts have other rounds, as rounding alone can do",
            "config.target.dtype=float32 or config.decode.exact=True shows whether it is rounding",
        )
    return Finding(FINE, found)


@functools.lru_cache(maxsize=1)
def _by_position(case: Case) -> dict[str, Counted]:
    """The run's drafter on `holdout` and on as many `train` texts, measured as training does."""
    case.require_own_texts()
    corpus, depth = case.corpus, case.experiment.settings.evaluate.window
    kept = len(corpus.held) > 0 and "taps" in corpus.held[0]
    count = min(len(corpus.held), _MEASURED if kept else _MEASURED_ANEW)
    if not count:
        raise UserError("config.data.holdout is 0: no text was held out")
    found = {}
    for name, of in (("holdout", corpus.held), ("train", corpus.train)):
        items = [of[i] for i in texts.spread(len(of), count)]
        found[name] = _counted(_rounds(case.trained, curves.texts_of(case.experiment, items), depth), depth)
    return found


def positions(case: Case) -> Finding:
    """Acceptance by position on held-out texts, against what training has measured at its end."""
    counted = _by_position(case)["holdout"]
    rows = [row for row in metrics.read(case.experiment.workdir) if row["stage"] == case.run]
    reported = next((row["holdout_tau"] for row in reversed(rows) if "holdout_tau" in row), None)
    rates = " ".join(f"{rate:.0%}" for rate in counted.rates)
    if reported is None:
        found = f"tau {counted.tau:.2f}, by position {rates}; metrics.jsonl has nothing of the run's end"
        return Finding(NOTE, found)
    found = f"tau {counted.tau:.2f}, by position {rates}; training has measured {reported:.2f} at its end"
    # all held-out texts give the very number; some of them one that is near
    all_of_them = len(case.corpus.held) <= _MEASURED and "taps" in case.corpus.held[0]
    if counted.accepted < (_A_LITTLE if all_of_them else _LESS) * (reported - 1) - _CHANCE:
        return Finding(
            WRONG,
            f"{found}, expected the same",
            "the checkpoint, the responses or the target are not those of training: see the other checks",
        )
    return Finding(FINE, found)


def overfitting(case: Case) -> Finding:
    """What is accepted on held-out texts, as a share of what is on training texts."""
    found = {name: counted.accepted for name, counted in _by_position(case).items()}
    if found["train"] < _CHANCE:
        return Finding(
            WRONG,
            f"accepted a round: {found['train']:.2f} on training texts; expected more than {_CHANCE}",
            "it has learnt nothing: train for more steps, and see the other checks",
        )
    share = found["holdout"] / found["train"]
    said = (
        f"accepted a round: {found['holdout']:.2f} on held-out texts, {found['train']:.2f} on training texts"
    )
    remedy = "train on more prompts (config.respond.prompts) or for fewer steps"
    if share >= _OVERFIT:
        return Finding(FINE, said)
    verdict = NOTE if share >= _OVERFIT_MUCH else WRONG
    return Finding(verdict, f"{said}; expected {_OVERFIT:.0%} of that or more", remedy)
