"""Stage `evaluate`: acceptance length and speedup of every drafter that the workdir holds.

The target writes the texts of the benchmarks, autoregressively. tau comes from the exact simulation on all of
them. Speedup and identity come from decoding some of them for real, each drafter and autoregressive decoding
of the same prompt in turn, so that a slow moment of the machine hits both. All drafters are compared with
`evaluate.control`, prompt by prompt. What is known of a drafter is not measured again.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from ppow_jax.data import prompts, texts
from ppow_jax.decode import cost, shapes
from ppow_jax.decode.profile import Texts
from ppow_jax.decode.sampling import GREEDY
from ppow_jax.drafters.eagle3 import weights_of
from ppow_jax.errors import ConfigError, UnfinishedError, UserError
from ppow_jax.experiment import Experiment, exact
from ppow_jax.parallel import files, preemption, processes
from ppow_jax.parallel.console import log
from ppow_jax.report import contents, render, samples, statistics
from ppow_jax.report import measure as measuring
from ppow_jax.report.measure import Benchmark, Candidate, params_sha256
from ppow_jax.settings import IMPORTED, Settings
from ppow_jax.stages import features, respond
from ppow_jax.training import curves, drafters

_PROFILED = 12  # held-out texts that acceptance is profiled on
_SAMPLES, _SAMPLE_TOKENS = 5, 40  # prompts whose windows the report shows, and how much of their answers


def check(settings: Settings) -> None:
    """Benchmarks whose files can be read, and shapes of drafts that there are.

    Raises:
      UserError: naming the key.
    """
    if not prompts.parse(settings.evaluate.prompts, "evaluate.prompts"):
        found = settings.evaluate.prompts
        raise ConfigError(f"config.evaluate.prompts: found {found!r}, expected NAME=SOURCE pairs")
    prompts.load(settings.evaluate.prompts, "evaluate.prompts")  # a missing file shows before training
    if settings.evaluate.tree:
        shapes.parse(settings.evaluate.tree, "config.evaluate.tree")
        if (temperature := settings.decode.sampling.temperature) > 0:
            raise ConfigError(
                f"config.evaluate.tree: found {settings.evaluate.tree!r}, expected '' with "
                f"decode.sampling.temperature {temperature}: trees are simulated on greedy texts alone"
            )
    if settings.decode.shape != "auto":
        shapes.parse(settings.decode.shape, "config.decode.shape")
    elif not settings.data.holdout:
        raise ConfigError("config.data.holdout: found 0, expected 1 or more for decode.shape 'auto'")
    elif settings.respond.temperature > 0:
        raise ConfigError(
            f"config.respond.temperature: found {settings.respond.temperature}, expected 0 for decode.shape "
            "'auto', which measures acceptance on greedy texts"
        )
    elif settings.respond.keep_answers:
        raise ConfigError(
            "config.respond.keep_answers: found True, expected False for decode.shape 'auto', which measures "
            "acceptance on the target's own texts; give a shape"
        )


def check_target(experiment: Experiment) -> None:
    """Prompts that the target's context has room for; shapes of drafts that ask for no more tokens than the
    drafters have.

    Raises:
      UserError: naming the key.
    """
    settings = experiment.settings
    benchmarks = prompts.load(settings.evaluate.prompts, "evaluate.prompts", warn=False)
    for name, asked in benchmarks.items():
        selection = respond.select(experiment, asked, settings.evaluate.max_new_tokens)
        if not selection.prompts:
            raise selection.refusal(f"evaluate.prompts: {name}")
        if said := selection.said():
            log.warning("evaluate.prompts: %s: prompts left out: %s", name, said)
    shapes_by_key = {"evaluate.tree": settings.evaluate.tree, "decode.shape": settings.decode.shape}
    for name in settings.chosen():
        has = drafters.shape_of(experiment, name).vocab_size
        for key, text in shapes_by_key.items():
            if text not in ("", "auto") and (ranks := shapes.parse(text).ranks) > has:
                raise ConfigError(
                    f"config.{key}: found {ranks} candidates after a token in {text}, expected at most "
                    f"{has}, the draft vocabulary of {name}"
                )


def run(experiment: Experiment) -> None:
    """Writes report.json, report.md, report.html and plots."""
    if experiment.settings.decode.exact:
        experiment = exact(experiment)
    settings = experiment.settings
    candidates = find_candidates(experiment)
    first, last = candidates[0], candidates[-1]
    if settings.decode.shape == "auto":
        shape, prediction = choose_shape(experiment, last)
    else:
        shape, prediction = shapes.parse(settings.decode.shape), None
    gamma = cost.measure_gamma(experiment.target, experiment.target_params, first.drafter, first.weights)
    benchmarks = []
    measured: dict[str, dict[str, statistics.Measured]] = {c.run: {} for c in candidates}
    for name, asked in prompts.load(settings.evaluate.prompts, "evaluate.prompts", warn=False).items():
        benchmarks.append(write_texts(experiment, name, asked))
        for run, found in measuring.measure(experiment, candidates, shape, benchmarks[-1]).items():
            measured[run][name] = found
            log.info("evaluate: %s %s %s", name, run, render.one_line(statistics.result(found)))
        preemption.leave(f"evaluate is done with {name}")
    control = _control(settings, candidates)
    results = contents.results(measured, control)
    groups = contents.groups(settings, list(results))
    report = {
        "schema": 2,
        "target": {
            "path": settings.target.path,
            "fingerprint": experiment.fingerprint,
            "dtype": experiment.target.config.dtype,
        },
        "device": contents.device(),
        "window": settings.evaluate.window,
        "tree": settings.evaluate.tree or None,
        "decode_shape": shapes.name(shape),
        "prediction": prediction,
        "decode_sampling": dataclasses.asdict(settings.decode.sampling),
        "gamma_measured": processes.agreed(gamma),
        "control": control,
        "drafters": {c.run: _about(settings, c) | results[c.run] for c in candidates},
        "runs": contents.repetitions(results, measured, groups, control),
        "left_out": {
            "respond": processes.agreed(files.read_json(experiment.workdir / respond.LEFT_OUT)),
            "evaluate": {b.name: b.left_out for b in benchmarks},
        },
        "stages": contents.stages(experiment.workdir),
    }
    best = max(candidates, key=lambda c: results[c.run]["mean"]["tau"])
    render.write(
        experiment.workdir, report, {"drafter": best.run, "samples": _samples(experiment, best, benchmarks)}
    )


def _control(settings: Settings, candidates: list[Candidate]) -> str | None:
    """The drafter that the others are compared with, if it is there."""
    name = settings.evaluate.control
    if name and name not in [c.run for c in candidates]:
        log.info("evaluate: no comparison, since the control %s is not among the drafters", name)
        return None
    return name or None


def _about(settings: Settings, candidate: Candidate) -> dict[str, Any]:
    """Where a drafter comes from."""
    about = {
        "params_sha256": candidate.sha256,
        "steps": candidate.steps,
        "seconds": round(candidate.seconds, 1),
    }
    if candidate.run in settings.train:
        run = settings.train[candidate.run]
        about |= {"objective": run.objective, "start": run.start, "seed": run.seed}
        about |= {"batch_size": run.batch_size, "lineage": settings.lineage(candidate.run)}
    return about


def _samples(
    experiment: Experiment, candidate: Candidate, benchmarks: list[Benchmark]
) -> list[dict[str, Any]]:
    """A drafter's windows as text, kept on disk too."""
    if experiment.sampling != GREEDY:
        return []  # windows along a text that was sampled say little without their draws
    about = [_SAMPLES, _SAMPLE_TOKENS, experiment.settings.evaluate.window]
    identity = [candidate.identity, [b.directory.name for b in benchmarks], about]
    mark = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path = experiment.workdir / "evaluate" / "windows.json"
    known = processes.agreed(files.read_json(path))
    if not known or known["mark"] != mark:
        found = samples.samples(experiment, candidate, benchmarks, _SAMPLES, _SAMPLE_TOKENS)
        known = {"mark": mark, "samples": found}
        files.write_json(path, known)
    return known["samples"]


def choose_shape(experiment: Experiment, candidate: Candidate) -> tuple[shapes.Shape, dict[str, Any]]:
    """The shape of drafts that `auto` finds for a drafter, and what it predicts of it on held-out texts.

    The finding is kept in the workdir, so that a stopped evaluation goes on with it.
    """
    path = experiment.workdir / "evaluate" / "shape.json"
    mark = [candidate.sha256, contents.device()]
    known = files.read_json(path)
    if not known or known["mark"] != mark:
        log.info("decode.shape auto: measuring costs and acceptance, a few minutes")
        costs = cost.measure(
            experiment.target, experiment.target_params, candidate.drafter, candidate.weights
        )
        best = cost.choices(costs, candidate.drafter, candidate.weights, held_out(experiment))[0]
        known = {"mark": mark, "shape": shapes.name(best.shape)}
        known["prediction"] = {"tau": best.tau, "speedup": best.speedup, "drafter": candidate.run}
        known = processes.agreed(known)
        files.write_json(path, known)
    shape, predicted = shapes.parse(known["shape"]), known["prediction"]
    log.info("decode.shape auto: %s, predicted speedup %.2fx", shapes.name(shape), predicted["speedup"])
    return shape, predicted


def held_out(experiment: Experiment) -> Texts:
    """Some of the responses that no drafter was trained on."""
    kept = features.opened(experiment)
    held = texts.corpus(experiment.responses, kept, experiment.settings.data).held
    return curves.texts_of(experiment, [held[i] for i in texts.spread(len(held), _PROFILED)])


def find_candidates(experiment: Experiment) -> list[Candidate]:
    """The drafter that was read from files, if any, and those of the runs that have been trained.

    Raises:
      UserError: there is none that is finished.
    """
    found = []
    for name in begun(experiment.settings, experiment.workdir):
        try:
            found.append(_candidate(experiment, name))
        except UnfinishedError as e:
            log.warning("evaluate: %s is left out: %s", name, e)
    if not found:
        raise _nothing_trained(experiment)
    return found


def find_candidate(experiment: Experiment, run: str = "", where: str = "--run") -> Candidate:
    """The drafter of a training run, or `imported`, the one that was read from files.

    Args:
      experiment: whose workdir has it.
      run: its name; empty: of the last one that is finished.
      where: the flag or argument that has the name, for the error.

    Raises:
      ConfigError: there is no such run.
      UserError: it is not finished, or none is.
    """
    if run:
        check_run(experiment.settings, experiment.workdir, run, where)
        return _candidate(experiment, run)
    for name in reversed(begun(experiment.settings, experiment.workdir)):
        with contextlib.suppress(UnfinishedError):
            return _candidate(experiment, name)
    raise _nothing_trained(experiment)


def check_run(settings: Settings, workdir: pathlib.Path, run: str, where: str) -> None:
    """Raises `ConfigError` if a workdir has no drafter of that name; the message begins with `where`."""
    names = begun(settings, workdir)
    if run not in names:
        raise ConfigError(f"{where}: found {run!r}, expected one of {', '.join(names) or 'none yet'}")


def begun(settings: Settings, workdir: pathlib.Path) -> list[str]:
    """The drafter that is read from files, if any, and the training runs that have left something."""
    names = [IMPORTED] if settings.drafter.path else []
    return names + [name for name in settings.chosen() if drafters.directory(workdir, name).exists()]


def _candidate(experiment: Experiment, name: str) -> Candidate:
    trained = drafters.load(experiment, name)
    weights = weights_of(trained.params, experiment.target_params, trained.vocab)
    sha = params_sha256(trained.params)
    return Candidate(name, trained.drafter, weights, trained.steps, trained.seconds, sha)


def _nothing_trained(experiment: Experiment) -> UserError:
    return UserError(f"{experiment.workdir}: no training run is finished yet; add 'train' to config.stages")


def write_texts(experiment: Experiment, name: str, benchmark: list[prompts.Prompt]) -> Benchmark:
    """Lets the target answer a benchmark's prompts, turn by turn, unless it has before.

    It answers as `decode.sampling` says.
    """
    settings, found = experiment.settings.evaluate, benchmark_of(experiment, name, benchmark)
    about = (found.directory, settings.max_new_tokens, experiment.sampling, settings.batch_size)
    selection = respond.select(experiment, benchmark, settings.max_new_tokens)
    left_out = respond.write(experiment, selection, *about, label=f"evaluate {name}", kept=found.features)
    return dataclasses.replace(found, left_out=left_out)


def benchmark_of(experiment: Experiment, name: str, benchmark: list[prompts.Prompt]) -> Benchmark:
    """A benchmark, whether its answers lie in its directory or not."""
    settings, target = experiment.settings.evaluate, experiment.target.config
    asked = [(p.id, p.turns, *filter(None, [p.system])) for p in benchmark]
    identity = [settings.max_new_tokens, target.dtype, target.taps, asked]
    identity += filter(None, [experiment.settings.target.template_variables])
    if experiment.sampling != GREEDY:
        identity += [dataclasses.asdict(experiment.sampling), experiment.settings.seed]
    mark = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return Benchmark(name, benchmark, experiment.workdir / "evaluate" / f"{name}-{mark}")
