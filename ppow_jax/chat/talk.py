"""The conversation: questions in, answers on the screen, and afterwards in files."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from rich.console import Console

from ppow_jax import api, experiment
from ppow_jax.chat import page, picture, screen, trace
from ppow_jax.chat.exchange import Exchange
from ppow_jax.decode import shapes
from ppow_jax.decode.rounds import Round
from ppow_jax.errors import ConfigError
from ppow_jax.parallel import files
from ppow_jax.report.samples import round_as_text
from ppow_jax.settings import Settings
from ppow_jax.stages import evaluate
from ppow_jax.targets.chat import Message
from ppow_jax.targets.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of the command say; empty texts: not given."""

    workdir: str
    run: str = ""
    shape: str = ""
    tokens: int = 256
    temperature: float = 0.0
    prompt: str = ""
    compare: bool = True
    trace: str = ""
    html: str = ""
    svg: str = ""


def talk(options: Options, console: Console | None = None) -> list[Exchange]:
    """Answers what is asked, until nothing more is; then writes the files that are wanted.

    Raises:
      ConfigError: no workdir, no such run or shape, or a file that cannot be written.
      UserError: whatever else can be mended.
    """
    console = console or Console(highlight=False)
    settings = check(options)
    target = api.load_target(options.workdir)
    drafter = api.load_drafter(target, options.workdir, options.run)
    shape = options.shape or settings.decode.shape
    if shape == "auto":
        with jax.set_mesh(target.mesh):
            shape = shapes.name(evaluate.choose_shape(target, drafter)[0])
    ask = functools.partial(api.generate, target, max_new_tokens=options.tokens)
    ask = functools.partial(ask, temperature=options.temperature)
    draft = functools.partial(ask, drafter=drafter, shape=shape, scores=bool(options.trace))
    if options.compare:  # what runs for the first time is compiled, and slower: no figures for the screen
        with console.status("running both ways of decoding once"):
            for decode in (draft, ask):
                decode(options.prompt or "Hello")
    found: list[Exchange] = []
    try:
        for question in screen.questions(console, options.prompt):
            messages = _messages(found, question)
            watch = _shown(console, target.tokenizer)
            answer = draft(messages, seed=len(found), watch=watch)
            plain = ask(messages, seed=len(found)) if options.compare else None
            drafts = f"drafts {shape} by {drafter.run}"
            found.append(Exchange(question, answer, plain, drafts, options.temperature == 0))
            screen.finish(console, found[-1])
    finally:
        if options.trace:
            trace.write(files.path_of(options.trace), [exchange.answer for exchange in found])
        if options.html:
            with files.replacing(files.path_of(options.html)) as scratch:
                scratch.write_text(page.page(settings.target.path, found), encoding="utf-8")
        if options.svg:
            with files.replacing(files.path_of(options.svg)) as scratch:
                scratch.write_text(picture.picture(found), encoding="utf-8")
    return found


def check(options: Options) -> Settings:
    """The workdir's settings, when all that can be known before the target is loaded has been looked at.

    Raises:
      ConfigError: see `talk`.
    """
    workdir = files.path_of(options.workdir)
    settings = experiment.read_settings(workdir)
    if options.run:
        evaluate.check_run(settings, workdir, options.run, "--run")
    if options.shape not in ("", "auto"):
        shapes.parse(options.shape, "--shape")
    if options.trace:
        trace.check(files.path_of(options.trace))
    for flag, file in (("--html", options.html), ("--svg", options.svg)):
        if file and not files.path_of(file).absolute().parent.is_dir():
            folder = str(files.path_of(file).parent)
            raise ConfigError(f"{flag}: found no directory {folder!r}; make it, or name another file")
    return settings


def _messages(before: list[Exchange], question: str) -> list[Message]:
    """The conversation so far, and a question."""
    messages: list[Message] = []
    for exchange in before:
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer.text})
    return [*messages, {"role": "user", "content": question}]


def _shown(console: Console, tokenizer: Tokenizer) -> Callable[[Round], None]:
    """Shows each round as it comes."""
    known: list[int] = []

    def watch(of: Round) -> None:
        screen.show(console, round_as_text(tokenizer, known, of, special=False))
        known.extend(of.tokens)

    return watch
