"""Training text that a server writes (`config.respond.endpoint`), in place of our own decoder.

Prompts are asked several at a time, in threads. Each shard is written when all of its prompts are answered; a
run that goes on asks for those of the missing shards.
"""

import collections
import contextlib
import dataclasses
import itertools
import pathlib
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ppow_jax.data import records
from ppow_jax.data.conversations import Conversation, dialogue, spans
from ppow_jax.data.prompt import Prompt
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import preemption, processes, progress
from ppow_jax.parallel.console import log
from ppow_jax.serving import servers
from ppow_jax.serving.connection import ServerError
from ppow_jax.serving.servers import Answer, Asked, Server
from ppow_jax.settings import RespondSettings

SHARD = 16  # prompts of a shard
_KEY = "config.respond.endpoint"
_ATTEMPTS = 5  # of each request
_COMPARED = 32  # tokens of each text that is compared with our own decoder's
_ALIKE = 0.5  # share of them that must come before the texts part; quantised models have about 0.9


class _Work(NamedTuple):
    """A prompt, and the shard that it belongs to."""

    shard: str
    prompt: Prompt


Shards = Mapping[str, Sequence[Prompt]]
Answers = Iterator[tuple[_Work, Conversation | None]]  # None: the prompt is left out
Decoder = Callable[[list[Prompt], int], list[Conversation]]  # prompts and tokens to greedy answers


def check(settings: RespondSettings) -> None:
    """A server that answers, before a target is loaded.

    Raises:
      UserError: it is not there, or is none.
    """
    server = _connect(settings, attempts=1)
    log.info("respond: %s at %s, model %s", server.kind, server.connection.url, server.model)


def _connect(settings: RespondSettings, attempts: int) -> Server:
    return servers.connect(settings.endpoint, _KEY, settings.timeout, attempts)


def write(experiment: Experiment, shards: Shards, directory: pathlib.Path, own: Decoder) -> dict[str, int]:
    """Has the prompts of those shards answered that are not in the directory yet.

    Args:
      experiment: whose settings name the server.
      shards: prompts by the name of the shard for their conversations.
      directory: for the shards.
      own: our decoder, for the comparison of the first texts.

    Returns:
      `other_ids`: prompts left out, as the ids of the server's text are not known for sure;
      `turns_not_asked`: later turns of the others that did not fit into the target's context.

    Raises:
      UserError: the server serves another model, fails, or writes no text whose ids are known.
    """
    done = set(processes.agreed(records.shards(directory)))
    todo = {name: prompts for name, prompts in shards.items() if name not in done}
    if todo:
        server = _connect(experiment.settings.respond, _ATTEMPTS)
        asking = _Asking(experiment, server)
        try:
            _require_target(asking, list(itertools.chain.from_iterable(todo.values())), own)
            _write(asking, todo, directory, already=len(shards) - len(todo))
        except ServerError as e:
            raise UserError(f"{e}; what is finished is kept: mend that and run the same command again") from e
    processes.together("the server's texts are written")
    return _left_out(shards, directory)


@dataclasses.dataclass(frozen=True)
class _Asking:
    """How prompts become conversations; called from several threads."""

    experiment: Experiment
    server: Server
    _rendering: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # templates have a state

    def __call__(self, prompt: Prompt, tokens: int, temperature: float) -> Conversation | None:
        """A conversation with at most so many tokens a turn; None: its ids are not known for sure.

        Raises:
          UserError: naming the prompt.
        """
        made, tokenizer = self.experiment, self.experiment.tokenizer
        conversation, said = Conversation(prompt), list[str]()
        for turn in range(len(prompt.turns)):
            with self._rendering:
                question = conversation.question(tokenizer, turn)
            if question.length + tokens > made.target.config.context:
                break
            conversation.ask(question)
            seed = zlib.crc32(f"{made.settings.seed}/{turn}/{prompt.id}".encode())
            messages, known = dialogue(prompt, said), conversation.tokens
            try:
                answer = self.server.answer(
                    Asked(messages, known, tokens, temperature, seed, tokenizer.stop_ids)
                )
                ids = self._ids(answer, known)
            except ServerError as e:
                raise ServerError(f"prompt {prompt.id!r}: {e}", e.passing) from e
            if ids is None:
                return None
            conversation.answer(ids[:tokens])
            said.append(answer.text)
        return conversation

    def _ids(self, answer: Answer, before: list[int]) -> list[int] | None:
        """An answer's ids as our own decoder would have written them; None: not known for sure."""
        tokenizer, rows = self.experiment.tokenizer, self.experiment.target.config.vocab_size
        ids = answer.ids
        if ids is None:
            ids = tokenizer.encode_after(answer.text)
            if tokenizer.added(before, ids) != answer.text:
                return None
        wrong = next((i for i in ids if not 0 <= i < rows), None)
        if wrong is not None:
            raise ServerError(
                f"{self.server.connection.url}: found the token id {wrong}, expected ids below {rows}; it "
                "serves another model than config.target.path"
            )
        stop = next((at for at, i in enumerate(ids) if i in tokenizer.stop_ids), None)
        if stop is not None:
            return ids[: stop + 1]
        return ids + [tokenizer.stop_ids[0]] * answer.finished


def _require_target(asking: _Asking, prompts: list[Prompt], own: Decoder) -> None:
    """Compares greedy texts of the first prompts with our own decoder's.

    Raises:
      UserError: they part early.
    """
    made, server = asking.experiment, asking.server
    settings = made.settings.respond
    first = [dataclasses.replace(p, turns=p.turns[:1], answers=()) for p in prompts[: settings.compared]]
    if not first:
        return
    tokens = min(_COMPARED, settings.max_new_tokens)
    theirs: list[list[int]] = []
    with progress.during(f"comparing {len(first)} texts of the server with our own"):
        if processes.first():
            found = (asking(prompt, tokens, 0.0) for prompt in first)
            theirs = [_written(conversation) if conversation else [] for conversation in found]
        theirs = processes.agreed(theirs)
        ours = [_written(conversation) for conversation in own(first, tokens)]
    alike = sum(_same(a, b) for a, b in zip(ours, theirs, strict=True))
    total = sum(map(len, ours))
    log.info("respond: %d of %d tokens of the server's first texts are ours", alike, total)
    if alike < _ALIKE * total:
        raise UserError(
            f"{_KEY}: {alike} of {total} tokens of the first {len(first)} greedy texts are as "
            f"config.target.path writes them before they part, expected {_ALIKE:.0%} or more; serve the "
            f"model of {made.settings.target.path!r} in place of {server.model!r}, with the same chat "
            "template, or name what is served in config.target.path (respond.compared=0: no comparison)"
        )


def _written(conversation: Conversation) -> list[int]:
    """What was written of a conversation of one turn."""
    return [i for i, own in zip(conversation.tokens, conversation.assistant, strict=True) if own]


def _same(one: list[int], other: list[int]) -> int:
    """Tokens before two texts part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _write(asking: _Asking, todo: Shards, directory: pathlib.Path, already: int) -> None:
    """Asks, and writes the shards in the order in which they become whole; of several processes, the first.

    A shard of which all is left out is not written: shards are never empty.
    """
    settings = asking.experiment.settings.respond
    work = [_Work(name, prompt) for name, prompts in todo.items() for prompt in prompts]

    def ask(one: _Work) -> Conversation | None:
        return asking(one.prompt, settings.max_new_tokens, settings.temperature)

    loop = progress.Loop("respond", len(work), "prompts")
    with _answering(ask, work, settings.concurrency) as answers:
        whole = _whole(todo, answers, loop)
        for number in range(already + 1, already + len(todo) + 1):
            name, conversations = next(whole) if processes.first() else ("", [])
            if conversations:
                records.write_shard(directory, name, (r for c in conversations for r in c.records()))
            preemption.leave(f"respond is written up to shard {number} of {already + len(todo)}")


def _whole(shards: Shards, answers: Answers, loop: progress.Loop) -> Iterator[tuple[str, list[Conversation]]]:
    """The shards as they become whole, each in the order of its prompts, without what is left out."""
    found: dict[str, dict[str, Conversation | None]] = collections.defaultdict(dict)
    for work, conversation in answers:
        loop.add(1)
        found[work.shard][work.prompt.id] = conversation
        if len(found[work.shard]) == len(shards[work.shard]):
            of = found.pop(work.shard)
            ordered = [of[prompt.id] for prompt in shards[work.shard]]
            yield work.shard, [c for c in ordered if c is not None]


@contextlib.contextmanager
def _answering(
    ask: Callable[[_Work], Conversation | None], work: Sequence[_Work], threads: int
) -> Iterator[Answers]:
    """The results in the order in which they come; the first error ends all.

    Of several processes the first one asks. The threads are daemons: a run that is asked to end does not wait
    for a server.
    """
    waiting: queue.SimpleQueue[_Work] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[_Work, Conversation | None, Exception | None]] = queue.SimpleQueue()
    for one in work:
        waiting.put(one)
    ended = threading.Event()

    def worker() -> None:
        while not ended.is_set():
            try:
                one = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((one, ask(one), None))
            except Exception as e:  # raised below, where it ends the run
                done.put((one, None, e))

    def results() -> Answers:
        for _ in work:
            one, result, error = done.get()
            if error is not None:
                raise error
            yield one, result

    for _ in range(min(threads, len(work)) if processes.first() else 0):
        threading.Thread(target=worker, daemon=True).start()
    try:
        yield results()
    finally:
        ended.set()


def _left_out(shards: Shards, directory: pathlib.Path) -> dict[str, int]:
    """By what was written, so that a run that goes on counts what was before.

    Raises:
      UserError: nothing was written.
    """
    names = [name for name in records.shards(directory) if name in shards]
    prompts = [prompt for of in shards.values() for prompt in of]
    if not names and prompts:
        raise UserError(
            f"{_KEY}: none of the {len(prompts)} texts of the server decodes to itself when it is encoded; "
            "use llama.cpp, vLLM or SGLang, which tell token ids"
        )
    answered: collections.Counter[str] = collections.Counter()
    for row in records.Records(directory, names) if names else ():
        answered[row["id"]] += len(spans(row["assistant"]))
    missing = sum(prompt.id not in answered for prompt in prompts)
    if missing:
        log.warning("respond: %d prompts are left out: encoded, the server's text is another", missing)
    turns = sum(len(p.turns) - answered[p.id] for p in prompts if p.id in answered)
    if turns:
        log.info("respond: %d later turns were not asked: they exceed the target's context", turns)
    return {"other_ids": missing, "turns_not_asked": turns}
