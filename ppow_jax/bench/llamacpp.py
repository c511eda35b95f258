"""A drafter in llama.cpp beside the same drafter here: accepted tokens, texts, tokens a second.

llama.cpp runs in this process (`xllamacpp`); the drafter, and the target in the dtype asked for, are written
for it. Its servers answer the same prompts in turn, with and without the drafter.
"""

import importlib
import importlib.util
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ppow_jax.bench import parting
from ppow_jax.bench.machine import show
from ppow_jax.data import prompts
from ppow_jax.data.conversations import Conversation
from ppow_jax.decode import shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.session import Session
from ppow_jax.drafters.files import llamacpp
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import processes
from ppow_jax.parallel.console import log
from ppow_jax.report.measure import Candidate
from ppow_jax.targets import gguf_files, tokenizer_gguf

_ROOM = 64  # slots of llama.cpp's context beyond prompt and answer


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


class Server:
    """llama.cpp with a target and perhaps a drafter; greedy, one text at a time.

    Args:
      target: GGUF file.
      drafter: GGUF file; None: it decodes plainly.
      depth: tokens drafted a round.
      context: slots.
      threads: of computation.

    Raises:
      UserError: `xllamacpp` is not installed, or it cannot load a file.
    """

    def __init__(
        self, target: pathlib.Path, drafter: pathlib.Path | None, depth: int, context: int, threads: int
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise UserError("llama.cpp is not installed: `pip install 'ppow_jax[llamacpp]'` brings it")
        library = importlib.import_module("xllamacpp")
        about = library.CommonParams()
        about.model.path, about.n_ctx, about.n_parallel = str(target), context, 1
        about.n_gpu_layers, about.warmup, about.verbosity, about.port = 0, False, -1, 0
        processors = [about.cpuparams, about.cpuparams_batch]
        if drafter:
            kind = library.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3
            about.speculative.types = [kind]
            draft = about.speculative.draft
            draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = str(drafter), depth, 0, 0.0
            processors += [draft.cpuparams, draft.cpuparams_batch]
        for processor in processors:
            processor.n_threads = threads
        try:
            self._server = library.Server(about)
        except Exception as e:  # its bindings raise whatever the library says
            raise UserError(f"llama.cpp cannot load {target} with {drafter} ({e})") from e

    def __call__(self, ids: Sequence[int], tokens: int) -> Answer:
        """Answers a prompt with at most so many tokens."""
        asked = {"prompt": list(ids), "n_predict": tokens, "temperature": 0, "cache_prompt": False}
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


def write_drafter(experiment: Experiment, candidate: Candidate, file: pathlib.Path, dtype: str) -> None:
    """Writes a drafter of a run for llama.cpp."""
    target, config = experiment.target.config, candidate.drafter.config
    params = processes.host(candidate.weights.params)
    vocab = processes.host(candidate.weights.vocab)
    tokenizer = tokenizer_gguf.metadata(experiment.tokenizer, target.vocab_size)
    llamacpp.write(file, config, params, vocab, target, tokenizer, dtype, experiment.fingerprint)


def compare(
    experiment: Experiment,
    candidate: Candidate,
    directory: pathlib.Path,
    sources: str,
    count: int,
    tokens: int,
    depths: Sequence[int],
    dtypes: tuple[str, str],
    threads: int,
) -> None:
    """Decodes `count` prompts of each source here and there; prints two tables.

    Args:
      experiment: whose target is a GGUF file.
      candidate: the drafter.
      directory: for the files.
      sources: as `config.evaluate.prompts`.
      count: prompts of each.
      tokens: to write at most.
      depths: tokens drafted a round; each is tried.
      dtypes: of target and drafter in llama.cpp.
      threads: of llama.cpp.
    """
    tokenizer, stops = experiment.tokenizer, experiment.tokenizer.stop_ids
    questions = {
        f"{name}/{prompt.id}": Conversation(prompt).question(tokenizer, 0).ids
        for name, of in prompts.load(sources, "prompts").items()
        for prompt in of[:count]
    }
    context = max(map(len, questions.values())) + tokens + _ROOM
    target, drafter = directory / "target.gguf", directory / "drafter.gguf"
    gguf_files.write_as(gguf_files.find(experiment.settings.target.path), target, dtypes[0])
    write_drafter(experiment, candidate, drafter, dtypes[1])
    plain = Server(target, None, 0, context, threads)
    servers = {depth: Server(target, drafter, depth, context, threads) for depth in depths}
    config = DecodeConfig(tokens, stops)
    ours = {
        depth: Session(
            experiment.target,
            experiment.target_params,
            config,
            Eagle(candidate.drafter, shapes.parse(f"chain:{depth}")),
            candidate.weights,
        )
        for depth in depths
    }
    alone: list[Answer] = []
    there: dict[int, list[Answer]] = {depth: [] for depth in depths}
    here: dict[int, list[Answer]] = {depth: [] for depth in depths}
    parted = []
    for number, (name, ids) in enumerate(questions.items(), 1):
        alone.append(plain(ids, tokens))
        for depth in depths:
            there[depth].append(servers[depth](ids, tokens))
        for depth in depths:
            answer, written = _ours(ours[depth], ids, tokenizer)
            here[depth].append(answer)
            theirs = tokenizer.encode_after(there[depth][-1].text)
            if any(a != b for a, b in zip(written, theirs, strict=False)):
                at = parting.parting(experiment.target, experiment.target_params, ids, written, theirs)
                parted.append([name, str(depth), str(at.position), f"{at.gap:.2g}"])
        log.info("llamacpp: %d/%d prompts", number, len(questions))
    rows = []
    for depth in depths:
        rates = [sum(a.tokens for a in of) / sum(a.seconds for a in of) for of in (there[depth], alone)]
        accepted = [sum(a.accepted for a in of) for of in (there[depth], here[depth])]
        equal = sum(a.accepted == b.accepted for a, b in zip(there[depth], here[depth], strict=True))
        alike = sum(a.text == b.text for a, b in zip(there[depth], here[depth], strict=True))
        lossless = sum(a.text == b.text for a, b in zip(there[depth], alone, strict=True))
        rows.append(
            [
                f"chain:{depth}",
                *map(str, accepted),
                f"{equal}/{len(alone)}",
                f"{alike}/{len(alone)}",
                f"{lossless}/{len(alone)}",
                f"{rates[0]:.1f}",
                f"{rates[1]:.1f}",
                f"{rates[0] / rates[1]:.2f}x",
            ]
        )
    columns = ["draft", "accepted there", "accepted here", "equal", "texts alike", "as its plain text"]
    columns += ["tokens/s", "plain", "speedup"]
    title = f"llama.cpp, target {dtypes[0]}, drafter {dtypes[1]}, {threads} threads, {len(alone)} prompts"
    show(title, columns, rows)
    if parted:
        show("texts that part from ours", ["prompt", "chain", "after tokens", "gap of logits"], parted)


def _ours(session: Session, ids: list[int], tokenizer: Any) -> tuple[Answer, list[int]]:
    """What we write, and its ids without the one that ends the text."""
    began = time.perf_counter()
    out = session([ids])
    written = np.asarray(out.tokens[0, : int(out.emitted[0])]).tolist()
    seconds = time.perf_counter() - began
    rounds = np.asarray(out.emitted_by_round[0])
    rounds = rounds[rounds > 0]
    kept = written[:-1] if written and written[-1] in tokenizer.stop_ids else written
    accepted = int(rounds.sum() - len(rounds))
    return Answer(tokenizer.decode(kept, special=False), len(written), 0, accepted, seconds), kept
