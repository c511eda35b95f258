"""What a script or a notebook needs: load a target and a drafter, decode, train, read a report.

`import ppow_jax` offers these names. docs/decoding.md and the notebooks in colabs/ show them at work.
"""

import dataclasses
import pathlib
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ppow_jax import experiment, run
from ppow_jax.config import from_config, to_dict
from ppow_jax.config import training_run as training_run
from ppow_jax.data import dialogue
from ppow_jax.decode import shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.rounds import Round, seen
from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.session import Session
from ppow_jax.decode.watching import Watched
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import console, files
from ppow_jax.report import html, render, samples
from ppow_jax.report.measure import Candidate
from ppow_jax.settings import IMPORTED, Settings
from ppow_jax.stages import evaluate
from ppow_jax.targets.tokenizer import first_messages

Messages = Sequence[Mapping[str, Any]]  # objects of `role` (system, user or assistant) and `content`


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the target wrote. A notebook shows it with the drafted tokens coloured.

    Attributes:
      text: without special tokens.
      ids: all tokens, the one that ended the text included.
      finished: whether a stop token ended it, and not `max_new_tokens` or the target's context.
      rounds: how it was written; their `tokens` in a row are `ids`. The first one is the reading of the
        prompt, which drafts nothing and writes one token; every other one is a verification pass.
      texts: the same rounds as text: of each `accepted`, `refused` (the first token that was), `dropped`
        (what was drafted behind it) and `own`; and how many tokens were `drafted` and accepted (`count`).
      prompt_seconds: from the call to the first token. The first prompt of each length compiles, too.
      seconds: of all rounds after the first one, without what those who watch them take.
    """

    text: str
    ids: list[int]
    finished: bool
    rounds: list[Round]
    texts: list[dict[str, Any]]
    prompt_seconds: float
    seconds: float

    @property
    def tau(self) -> float:
        """Tokens a verification pass; NaN if there was none."""
        passes = self.rounds[1:]
        return sum(len(r.tokens) for r in passes) / len(passes) if passes else float("nan")

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first one; NaN if that was the last."""
        return (len(self.ids) - 1) / self.seconds if len(self.ids) > 1 else float("nan")

    def figures(self) -> list[str]:
        """Speed, tau and the accepted tokens of each round, as text; without drafts the speed alone."""
        passes = self.rounds[1:]
        if not passes:
            return ["a single token, which the pass over the prompt wrote"]
        speed = f"{self.tokens_per_s:.1f} tokens/s"
        if not any(r.drafted for r in passes):
            return [speed]
        tau = f"tau {self.tau:.2f} ({len(self.ids) - 1} tokens in {len(passes)} passes)"
        return [speed, tau, f"accepted by round: {' '.join(str(r.accepted) for r in passes)}"]

    def _repr_html_(self) -> str:
        first, *rounds = self.texts
        if not any(of["drafted"] for of in rounds):
            return html.fragment([html.answer(self.text, []), html.figures(self.figures())])
        shown = html.answer(first["own"], rounds)
        return html.fragment([f"<p>{html.LEGEND}</p>", shown, html.figures(self.figures())])


class Report(dict[str, Any]):
    """report.json, whose form docs/reports.md describes. A notebook shows its table and its plots.

    Attributes:
      workdir: where it was written.
    """

    def __init__(self, values: Mapping[str, Any], workdir: pathlib.Path) -> None:
        super().__init__(values)
        self.workdir = workdir

    def _repr_html_(self) -> str:
        return render.fragment(self.workdir, self)


def load_target(path: str | pathlib.Path, **changes: Any) -> Experiment:
    """Loads a target onto all devices.

    Args:
      path: the workdir of a run, whose target, mesh and `decode.exact` it takes; or all that
        `config.target.path` takes: a directory, a GGUF file, a name of the hub, `package:NAME`.
      changes: other keys of `config.target`, such as `dtype="bfloat16"` or `taps=(2, 16, 29)`.

    Raises:
      UserError: what is named is not there or cannot be read; ConfigError: a key that there is not.
    """
    place = files.path_of(str(path))
    if _is_workdir(place):
        settings = _with_target(experiment.read_settings(place), changes)
        made = experiment.build(settings, place)
    else:
        settings = _with_target(Settings(), {"path": str(path)} | changes)
        made = experiment.load_target(settings, place)
    return experiment.exact(made) if settings.decode.exact else made


def load_drafter(target: Experiment, source: str | pathlib.Path, run: str = "") -> Candidate:
    """Loads a drafter.

    Args:
      target: that it drafts for.
      source: the workdir of a run; a directory of EAGLE-3 files, such as WORKDIR/export/sglang; a GGUF file;
        or a name of the hub (ORGANISATION/MODEL).
      run: of a workdir, the training run's name; empty: the last one that is finished.

    Raises:
      ConfigError: there is no such run; the drafter reads other layers than the target gives.
      UserError: it cannot be read, or belongs to another target.
    """
    place = files.path_of(str(source))
    if _is_workdir(place):
        _check_taps(target, place)
        own = dataclasses.replace(target, settings=experiment.read_settings(place), workdir=place)
        with jax.set_mesh(own.mesh):
            return evaluate.find_candidate(own, run, "run")
    if run:
        raise ConfigError(f"run: found {run!r}, but {str(source)!r} is no workdir; leave it out, or name one")
    drafter = dataclasses.replace(target.settings.drafter, path=str(source))
    settings = dataclasses.replace(target.settings, drafter=drafter)
    with jax.set_mesh(target.mesh):
        return evaluate.find_candidate(dataclasses.replace(target, settings=settings), IMPORTED)


def generate(
    target: Experiment,
    asked: str | Messages,
    drafter: Candidate | None = None,
    *,
    shape: str = "",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    scores: bool = False,
    watch: Callable[[Round], None] | None = None,
) -> Answer:
    """Decodes the answer to a question. The drafter makes it faster and does not change it.

    Args:
      target: as `load_target` gives it.
      asked: a question, or a conversation that ends with one, as OpenAI's API takes it.
      drafter: as `load_drafter` gives it; None: plain autoregressive decoding.
      shape: of the drafts: `chain:3`, `tree:16x4x4`, ... (`shapes.parse`). Empty: the target's
        `config.decode.shape`, which is `chain:3` unless a workdir has another.
      max_new_tokens: longest answer.
      temperature, top_k, top_p: as of `sampling.Sampling`; temperature 0 is greedy.
      seed: of what is random above temperature 0.
      scores: whether the rounds' nodes have log-probabilities.
      watch: called with every round as it comes.

    Raises:
      ConfigError: an impossible shape, number of tokens or way of sampling.
      UserError: the template refuses the conversation, or the target has no room for it.
    """
    if shape and drafter is None:
        raise ConfigError(f"shape: found {shape!r} without a drafter, expected one; load_drafter loads it")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: found {max_new_tokens}, expected 1 or more")
    try:
        how = Sampling(temperature, top_k, top_p)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    said = first_messages(asked) if isinstance(asked, str) else dialogue.spoken(asked, "messages")
    prompt = target.tokenizer.encode(target.tokenizer.render(said))
    config = DecodeConfig(max_new_tokens, target.tokenizer.stop_ids, how)
    session = Session(target.target, target.target_params, config)
    if drafter:
        eagle = Eagle(drafter.drafter, shapes.parse(shape or target.settings.decode.shape, "shape"))
        session = dataclasses.replace(session, drafting=eagle, weights=drafter.weights)
    rounds: list[Round] = []
    seconds: list[float] = []
    began = time.perf_counter()

    def look(watched: Watched) -> None:
        nonlocal began
        seconds.append(time.perf_counter() - began)
        rounds.append(seen(watched, 0))
        if watch:
            watch(rounds[-1])
        began = time.perf_counter()  # on a CPU the next round waits for this

    with jax.set_mesh(target.mesh):
        out = session([prompt], jax.random.split(jax.random.key(seed), 1), look, scores)
    ids, finished = [i for r in rounds for i in r.tokens], bool(np.asarray(out.finished)[0])
    text = target.tokenizer.added(prompt, ids[:-1] if finished else ids, special=False)
    texts = samples.rounds_as_text(target.tokenizer, [], rounds, special=False)
    return Answer(text, ids, finished, rounds, texts, seconds[0], sum(seconds[1:]))


def load_config(name: str | pathlib.Path) -> ConfigDict:
    """A config, to be changed and given to `train`.

    Args:
      name: of a ready-made config (`quickstart`), or a file with `get_config()`.

    Raises:
      ConfigError: there is none, or it cannot be loaded.
    """
    path = console.config_file(str(name), "config")
    console.let_configs_import(path)
    try:
        return runpy.run_path(path)["get_config"]()
    except Exception as e:  # a config file is code: it can fail in any way
        raise ConfigError(f"config: {path} cannot be loaded ({type(e).__name__}: {e})") from e


def train(
    config: str | pathlib.Path | ConfigDict,
    workdir: str | pathlib.Path,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Runs the stages of a config that are not finished in a workdir, as `python -m ppow_jax.main` does.

    `show_log` shows how far it is.

    Args:
      config: a ConfigDict, or what `load_config` takes.
      workdir: where everything is written; resumed if it exists.
      changes: values by key, such as `{"train.supervise.steps": 800}`.

    Raises:
      ConfigError: a key that there is not, a wrong type, or an impossible combination.
      UserError: anything else that can be mended.
    """
    values = _plain(config if isinstance(config, ConfigDict) else load_config(config))
    for key, value in (changes or {}).items():
        _put(values, key, value)
    run.run(from_config(values), pathlib.Path(workdir))


def show_log() -> None:
    """Shows on standard output what is being done, how far it is, and how long it still takes.

    The log is Python's, of the name `ppow_jax`; a program with a log of its own has no need of this.
    """
    console.setup(sys.stdout)


def read_report(workdir: str | pathlib.Path) -> Report:
    """The report that the stage `evaluate` wrote.

    Raises:
      UserError: there is none yet, or it is damaged.
    """
    place = files.path_of(str(workdir))
    found = files.read_json(place / "report.json")
    if found is None:
        raise UserError(f"{workdir}: found no report.json, expected one; the stage evaluate writes it")
    return Report(found, place)


def _is_workdir(place: pathlib.Path) -> bool:
    """Whether a path means a workdir, and no directory of Hugging Face files: both have a config.json."""
    found = files.read_json(place / "config.json") if place.is_dir() else None
    return isinstance(found, dict) and "stages" in found


def _with_target(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    values = to_dict(settings)
    return from_config(values | {"target": values["target"] | changes})


def _check_taps(target: Experiment, workdir: pathlib.Path) -> None:
    """Raises `ConfigError` where the drafters of a workdir read other layers."""
    about = files.read_json(workdir / "target.json") or {}
    known = tuple(about.get("shape", {}).get("taps", target.target.config.taps))
    if known != target.target.config.taps:
        raise ConfigError(
            f"taps: found {target.target.config.taps}, expected {known}, which the drafters in "
            f"{str(workdir)!r} read; give them to load_target"
        )


def _plain(config: ConfigDict) -> dict[str, Any]:
    """A copy as nested dicts, in the same order, which `copy.deepcopy` would not keep."""
    return {name: _plain(v) if isinstance(v, ConfigDict) else v for name, v in config.items()}


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Changes a value in nested dicts.

    Raises:
      ConfigError: there is no such key.
    """
    *path, last = key.split(".")
    section: Any = values
    for name in path:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        raise ConfigError(
            f"changes: unknown key {key!r}, expected one of `python -m ppow_jax.config_help`, without its "
            "'config.'"
        )
    section[last] = value
