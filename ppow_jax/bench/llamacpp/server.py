"""llama.cpp in this process (`xllamacpp`), with a target and a drafter that are written for it."""

import importlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ppow_jax.data import prompts
from ppow_jax.data.conversations import Conversation
from ppow_jax.drafters.files import llamacpp
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import processes
from ppow_jax.report.measure import Candidate
from ppow_jax.targets import gguf_files, tokenizer_gguf

STORED = "stored"  # in place of a dtype: the target's file as it is
_ROOM = 64  # slots of its context beyond prompt and answer
_KEY = 4  # tokens that are looked up where no drafter is, at most


class Answer(NamedTuple):
    """What a decoder wrote.

    Attributes:
      text: without special tokens.
      tokens: how many it wrote, the one that ends the text included.
      drafted, accepted: tokens of the drafter, in all rounds.
      seconds: from the first token to the last.
    """

    text: str
    tokens: int
    drafted: int
    accepted: int
    seconds: float

    @property
    def rounds(self) -> int:
        """Passes of the target after the one that read the prompt and gave the first token."""
        return self.tokens - 1 - self.accepted


def require_installed() -> None:
    """Raises `UserError` where there is no llama.cpp."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("llama.cpp is not installed: `pip install 'ppow_jax[llamacpp]'` brings it")


class Server:
    """llama.cpp with a target; greedy.

    Attributes:
      address: where it also answers over HTTP, as long as this object lives.

    Args:
      target: GGUF file.
      context: slots.
      threads: of computation.
      drafter: GGUF file.
      depth: tokens drafted a round, 0 for none. Without a drafter they are looked up in the text so far.
      texts: that it writes at a time; they share the context.

    Raises:
      UserError: `xllamacpp` is not installed, or it cannot load a file.
    """

    def __init__(
        self,
        target: pathlib.Path,
        context: int,
        threads: int,
        drafter: pathlib.Path | None = None,
        depth: int = 0,
        texts: int = 1,
    ) -> None:
        require_installed()
        library = importlib.import_module("xllamacpp")
        about = library.CommonParams()
        about.model.path, about.n_ctx, about.n_parallel = str(target), context, texts
        about.n_gpu_layers, about.warmup, about.verbosity, about.port = 0, False, -1, 0
        processors = [about.cpuparams, about.cpuparams_batch]
        kinds, draft = library.common_speculative_type, about.speculative.draft
        if drafter:
            about.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
            draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = str(drafter), depth, 0, 0.0
            processors += [draft.cpuparams, draft.cpuparams_batch]
        elif depth:
            about.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
            lookup = about.speculative.ngram_simple
            lookup.size_n, lookup.size_m = min(_KEY, depth), depth  # it drafts nothing shorter than its key
            draft.n_max, draft.n_min = depth, 0
        for processor in processors:
            processor.n_threads = threads
        try:
            self._server = library.Server(about)
        except Exception as e:  # its bindings raise whatever the library says
            raise UserError(f"llama.cpp cannot load {target} with {drafter} ({e})") from e
        self.address: str = self._server.listening_address

    def __call__(self, ids: Sequence[int], tokens: int, to_the_end: bool = False) -> Answer:
        """Answers a prompt with at most so many tokens; `to_the_end`: beyond those that end a text."""
        asked = {"prompt": list(ids), "n_predict": tokens, "temperature": 0, "cache_prompt": False}
        asked["ignore_eos"] = to_the_end
        found: dict[str, Any] = self._server.handle_completions(asked)
        if "choices" not in found:
            raise UserError(f"llama.cpp does not answer: {found}")
        timings = found["timings"]
        return Answer(
            found["choices"][0]["text"],
            found["usage"]["completion_tokens"],
            timings.get("draft_n", 0),
            timings.get("draft_n_accepted", 0),
            timings["predicted_ms"] / 1e3,
        )


class Engine(NamedTuple):
    """How llama.cpp is run.

    Attributes:
      target, drafter: GGUF files.
      threads: of computation.
      name: for the titles of tables.
    """

    target: pathlib.Path
    drafter: pathlib.Path
    threads: int
    name: str

    def server(self, depth: int, context: int) -> Server:
        """One that drafts so many tokens a round; 0: it decodes plainly."""
        return Server(self.target, context, self.threads, self.drafter if depth else None, depth)


def prepare(
    experiment: Experiment,
    candidate: Candidate,
    directory: pathlib.Path,
    dtypes: tuple[str, str],
    threads: int,
) -> Engine:
    """Writes the files that are not in `directory` yet.

    Args:
      experiment: whose target is a GGUF file.
      candidate: the drafter.
      directory: for the files.
      dtypes: of the target's matrices (or `STORED`) and of the drafter's.
      threads: of llama.cpp.

    Raises:
      UserError: llama.cpp cannot run the drafter.
    """
    llamacpp.check(candidate.drafter.config, experiment.target.config)
    target = gguf_files.find(experiment.settings.target.path)
    if dtypes[0] != STORED:
        source, target = target, directory / f"target-{dtypes[0]}.gguf"
        if not target.exists():
            gguf_files.write_as(source, target, dtypes[0])
    drafter = directory / f"{candidate.run}-{dtypes[1]}.gguf"
    if not drafter.exists():
        write_drafter(experiment, candidate, drafter, dtypes[1])
    name = f"{candidate.run}: target {dtypes[0]}, drafter {dtypes[1]}, {threads} threads"
    return Engine(target, drafter, threads, name)


def write_drafter(experiment: Experiment, candidate: Candidate, file: pathlib.Path, dtype: str) -> None:
    """Writes a drafter of a run for llama.cpp."""
    target, config = experiment.target.config, candidate.drafter.config
    params = processes.host(candidate.weights.params)
    vocab = processes.host(candidate.weights.vocab)
    path = experiment.settings.target.path
    tokenizer = tokenizer_gguf.of_target(path, experiment.tokenizer, target.vocab_size)
    llamacpp.write(file, config, params, vocab, target, tokenizer, dtype, experiment.fingerprint)


def questions(experiment: Experiment, sources: str, count: int) -> dict[str, list[int]]:
    """Ids of the first turn of `count` prompts of each source, by name."""
    return {
        f"{name}/{prompt.id}": Conversation(prompt).question(experiment.tokenizer, 0).ids
        for name, of in prompts.load(sources, "prompts").items()
        for prompt in of[:count]
    }


def room(asked: dict[str, list[int]], tokens: int) -> int:
    """Slots of a context for prompts and answers of so many tokens."""
    return max(map(len, asked.values())) + tokens + _ROOM
