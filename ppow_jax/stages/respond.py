"""Stage `respond`: the target writes the training text.

Work is cut into batches that depend on the prompts alone; each becomes one shard. A killed run loses
the batch in flight and repeats exactly that batch.
"""

import pathlib
import time
from typing import NamedTuple

import jax
import numpy as np

from ppow_jax.data import records
from ppow_jax.data.conversations import Conversation, cut, import_responses, read_responses, spans
from ppow_jax.data.prompt import Prompt
from ppow_jax.data.prompts import load, parse
from ppow_jax.decode.batch import decode_batch, rows_for
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.sampling import GREEDY, Sampling
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import files, memory, partition, preemption, processes, progress
from ppow_jax.parallel.console import log
from ppow_jax.settings import Settings
from ppow_jax.stages import endpoint, features, room

_IMPORT_ROWS = 128  # a shard
# Tokens of a text, the prompt's first turn and an answer, that the batch size is meant for.
_TEXT = {"cpu": 256, "default": 2048}
_BUCKET = 8  # prompts are padded to a multiple of this, so that few shapes are compiled
LEFT_OUT, SETTLED = "responses.json", "respond.json"  # in the workdir: what was left out or cut; batch_size


class Selection(NamedTuple):
    """Which prompts there is room for.

    Attributes:
      prompts: those.
      lengths: tokens of every prompt's first turn, by id.
      left_out: how many there is no room for, by what they exceed: `beyond_context`, `beyond_data_length`.
      limits: what each of these names is, as text.
    """

    prompts: list[Prompt]
    lengths: dict[str, int]
    left_out: dict[str, int]
    limits: dict[str, str]

    def said(self) -> str:
        """What is left out, for the log."""
        return ", ".join(f"{n} {self.limits[what]}" for what, n in self.left_out.items() if n)

    def refusal(self, key: str) -> UserError:
        """The error that nothing is left."""
        return UserError(f"{key}: all {len(self.lengths)} prompts are left out: {self.said()}")


def check(settings: Settings) -> None:
    """Something to answer or to take over, in files that can be read.

    Raises:
      UserError: there is nothing, or a file is malformed.
    """
    prompts, responses = settings.respond.prompts, settings.respond.responses
    if not parse(prompts, "respond.prompts") and not responses:
        raise ConfigError(f"config.respond.prompts: found {prompts!r}, expected NAME=SOURCE pairs")
    sources = load(prompts, "respond.prompts").values()
    if responses:
        read_responses(responses, "respond.responses")
    if settings.respond.keep_answers and not any(prompt.answers for source in sources for prompt in source):
        raise ConfigError(
            "config.respond.keep_answers: found True, but no prompt of config.respond.prompts has an "
            "answer; set it to False, or name files with the assistant's messages"
        )
    if settings.respond.endpoint:
        endpoint.check(settings.respond)


def check_target(experiment: Experiment) -> None:
    """Responses of this target, prompts that it has room for, and more of both than are kept out of training.

    Raises:
      UserError: responses of another target, no prompt that is short enough, or too few.
    """
    imported, kept, selection = _inputs(experiment)
    prompts = [*(c.prompt for c in (*imported, *kept)), *selection.prompts]
    most = sum(len(prompt.turns) for prompt in prompts)  # texts, if the template needs one a turn
    held = experiment.settings.data.holdout
    if "train" in experiment.settings.stages and most <= held:
        raise ConfigError(
            f"config.data.holdout: found {held}, expected fewer than the {most} turns of all prompts and "
            "responses; lower it, or give more of them"
        )


class _Inputs(NamedTuple):
    """Conversations that were written elsewhere; those whose answers the prompts have; prompts to answer."""

    imported: list[Conversation]
    kept: list[Conversation]
    selection: Selection


def _inputs(experiment: Experiment) -> _Inputs:
    """What is taken over, and what is left to answer."""
    settings, imported, kept = experiment.settings.respond, [], []
    if settings.responses:
        vocab = experiment.target.config.vocab_size
        imported = import_responses(settings.responses, experiment.tokenizer, vocab)
    answered = {c.prompt.id for c in imported}
    loaded = load(settings.prompts, "respond.prompts", warn=False)
    unanswered = [p for source in loaded.values() for p in source if p.id not in answered]
    if settings.keep_answers:
        kept = [Conversation(p) for p in unanswered if p.answers]
        unanswered = [p for p in unanswered if not p.answers]
        for conversation in kept:
            conversation.take(experiment.tokenizer, experiment.target.config.context)
    longest = experiment.settings.data.length - 2  # a text without two written tokens teaches nothing
    selection = select(experiment, unanswered, settings.max_new_tokens, longest)
    if not imported and not any(c.answered for c in kept) and not selection.prompts:
        raise selection.refusal("respond.prompts")
    return _Inputs(imported, kept, selection)


def run(experiment: Experiment) -> None:
    """Writes `responses/`: conversations that are there already first, then answers to the prompts.

    `responses.json` says what was left out or cut.
    """
    settings, data = experiment.settings.respond, experiment.settings.data
    directory, target = experiment.workdir / "responses", experiment.target.config
    imported, kept, selection = _inputs(experiment)
    if imported:
        log.info("respond: %d conversations taken from %s", len(imported), settings.responses)
    shortened = cut(imported, target.context)
    if shortened:
        log.info("respond: %d texts of %s are cut to the %d tokens of the target's context",
                 shortened, settings.responses, target.context)  # fmt: skip
    if kept:
        answers, taken = sum(len(c.prompt.answers) for c in kept), sum(c.answered for c in kept)
        log.info("respond: %d of %d answers taken as the prompts have them; others exceed the context "
                 "of %d", taken, answers, target.context)  # fmt: skip
    there = [*imported, *(c for c in kept if c.answered)]
    chunks = [there[i : i + _IMPORT_ROWS] for i in range(0, len(there), _IMPORT_ROWS)]
    done = set(records.shards(directory))
    for i, chunk in enumerate(chunks):
        if f"import-{i:05}" not in done:
            records.write_shard(directory, f"import-{i:05}", (r for c in chunk for r in c.records()))
    if settings.endpoint:
        left_out = _ask_server(experiment, selection, directory)
    else:
        left_out = write(
            experiment,
            selection,
            directory,
            settings.max_new_tokens,
            Sampling(settings.temperature),
            _batch_size(experiment),
            kept=features.directory(experiment) if data.cache_features else None,
            feature_dtype=data.feature_dtype,
        )
    files.write_json(experiment.workdir / LEFT_OUT, left_out | {"imported_cut": shortened})


def _ask_server(experiment: Experiment, selection: Selection, directory: pathlib.Path) -> dict[str, int]:
    """As `write`, by the server of `respond.endpoint`; features are computed later, as of imported texts."""
    if said := selection.said():
        log.info("respond: prompts left out: %s", said)
    most = experiment.settings.respond.max_new_tokens
    batches = batches_of(selection.prompts, selection.lengths, endpoint.SHARD, most)
    shards = {f"write-{i:05}": batch for i, batch in enumerate(batches)}

    def own(prompts: list[Prompt], tokens: int) -> list[Conversation]:
        return converse(experiment, prompts, len(prompts), tokens, GREEDY, experiment.key("respond"))

    return selection.left_out | endpoint.write(experiment, shards, directory, own)


def _batch_size(experiment: Experiment) -> int:
    """That of the settings, or as many as there is memory for; settled once, as batches are known by their
    number."""
    workdir, settings = experiment.workdir, experiment.settings.respond
    known = files.read_json(workdir / SETTLED)
    if known is None:
        begun = any(name.startswith("write-") for name in records.shards(workdir / "responses"))
        dtype = experiment.settings.data.feature_dtype if experiment.settings.data.cache_features else ""
        fitting = room.texts_that_fit(experiment, partition.suited(_TEXT), dtype)
        size = settings.batch_size if begun else min(settings.batch_size, fitting)
        known = processes.agreed({"batch_size": size})
        files.write_json(workdir / SETTLED, known)
    if known["batch_size"] < settings.batch_size:
        log.info("respond: %d prompts at a time instead of %d, for which memory was short when it began",
                 known["batch_size"], settings.batch_size)  # fmt: skip
    return known["batch_size"]


def select(
    experiment: Experiment, prompts: list[Prompt], max_new_tokens: int, longest: int | None = None
) -> Selection:
    """Leaves out the prompts whose first turn, with an answer, does not fit into the target's context.

    Those of more than `longest` tokens too. They would also set the size of a whole batch: reading 64 prompts
    of 4,400 tokens takes 45 GB of attention scores.

    Raises:
      UserError: the target's chat template refuses a prompt.
    """
    context = experiment.target.config.context
    lengths = {}
    for prompt in prompts:
        conversation = Conversation(prompt)
        if len(prompt.turns) > 1:
            conversation.check(experiment.tokenizer)
        lengths[prompt.id] = conversation.question(experiment.tokenizer, 0).length
    limits = {
        "beyond_context": f"of more than {max(0, context - max_new_tokens)} tokens, which with "
        f"max_new_tokens {max_new_tokens} exceed the target's context of {context} (lower it, or use shorter "
        "prompts)",
        "beyond_data_length": f"of more than {longest} tokens, which with two of an answer exceed "
        "config.data.length (raise it, or use shorter prompts)",
    }
    kept, left_out = [], dict.fromkeys(limits, 0)
    for prompt in prompts:
        if longest is not None and lengths[prompt.id] > longest:
            left_out["beyond_data_length"] += 1
        elif lengths[prompt.id] + max_new_tokens > context:
            left_out["beyond_context"] += 1
        else:
            kept.append(prompt)
    return Selection(kept, lengths, left_out, limits)


def write(
    experiment: Experiment,
    selection: Selection,
    directory: pathlib.Path,
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int,
    label: str = "respond",
    kept: pathlib.Path | None = None,
    feature_dtype: str = "float32",
) -> dict[str, int]:
    """Answers the prompts that there is room for, one shard a batch; batches that are there are left alone.

    Features are written in `feature_dtype` to the directory `kept`, a shard of the same name for each; None:
    they are not kept.

    Returns:
      `selection.left_out`, and `turns_not_asked`: how many later turns did not fit into the target's context.
    """
    if said := selection.said():
        log.info("%s: prompts left out: %s", label, said)
    batches = batches_of(selection.prompts, selection.lengths, batch_size, max_new_tokens)
    done = set(processes.agreed(records.shards(directory)))
    todo = [(i, batch) for i, batch in enumerate(batches) if f"write-{i:05}" not in done]
    if todo:
        _require_room(experiment, label, todo, selection.lengths, max_new_tokens, kept, feature_dtype)
    began, tokens = time.monotonic(), 0
    for n, (i, batch) in enumerate(todo, 1):
        seed = jax.random.fold_in(experiment.key("respond"), i)
        dtype = feature_dtype if kept else ""
        with progress.during(f"{label}: batch {len(batches) - len(todo) + n}/{len(batches)}"):
            conversations = converse(experiment, batch, batch_size, max_new_tokens, sampling, seed, dtype)
        if kept:
            features.write(kept, f"write-{i:05}", [t.features for c in conversations for t in c.texts], dtype)
        records.write_shard(directory, f"write-{i:05}", (r for c in conversations for r in c.records()))
        tokens += sum(sum(t.assistant) for c in conversations for t in c.texts)
        del conversations
        memory.give_back()
        seconds = time.monotonic() - began
        log.info(
            "%s: batch %d/%d, %d tokens, %.0f tokens/s | %s left",
            label,
            len(batches) - len(todo) + n,
            len(batches),
            tokens,
            tokens / seconds,
            progress.duration(seconds / n * (len(todo) - n)),
        )
        preemption.leave(f"{label} is written up to batch {len(batches) - len(todo) + n} of {len(batches)}")
    processes.together(f"{label} is written")
    not_asked = _turns_not_asked(directory, len(batches), selection.prompts)
    if not_asked:
        log.info("%s: %d later turns were not asked: with an answer they exceed the target's context of %d",
                 label, not_asked, experiment.target.config.context)  # fmt: skip
    return selection.left_out | {"turns_not_asked": not_asked}


def _turns_not_asked(directory: pathlib.Path, batches: int, prompts: list[Prompt]) -> int:
    """By what was written, so that a run that goes on counts what was before."""
    turns = sum(len(p.turns) for p in prompts)
    if turns == len(prompts):
        return 0
    written = records.Records(directory, [f"write-{i:05}" for i in range(batches)])
    return turns - sum(len(spans(written[i]["assistant"])) for i in range(len(written)))


def _require_room(
    experiment: Experiment,
    label: str,
    todo: list[tuple[int, list[Prompt]]],
    lengths: dict[str, int],
    max_new_tokens: int,
    kept: pathlib.Path | None,
    feature_dtype: str,
) -> None:
    """Asks for memory for the largest batch, and for disk for all features."""
    batches = [[lengths[p.id] for p in batch] for _, batch in todo]
    largest = max(len(batch) * (max(batch) + max_new_tokens) for batch in batches)
    room.warn_of_writing(experiment, label, largest, feature_dtype if kept else "")
    if kept:
        answers = max_new_tokens * sum(map(len, batches))
        room.require_for_features(experiment, kept, feature_dtype, sum(map(sum, batches)), answers)


def batches_of(
    prompts: list[Prompt], lengths: dict[str, int], batch_size: int, max_new_tokens: int
) -> list[list[Prompt]]:
    """Prompts in batches of like length (and like number of turns), to pad and to wait little.

    Texts of more than `_TEXT` tokens come in batches of half, a third, ... of the size: the cache of 192
    texts of 416 tokens, with all that is made on the way, takes 18 GB.
    """
    ordered = sorted(prompts, key=lambda p: (len(p.turns), lengths[p.id], p.id))
    text, batches = partition.suited(_TEXT), []
    while ordered:
        rows = min(len(ordered), batch_size)
        while rows > max(1, batch_size // -(-(lengths[ordered[rows - 1].id] + max_new_tokens) // text)):
            rows -= 1
        batches.append(ordered[:rows])
        ordered = ordered[rows:]
    return batches


def converse(
    experiment: Experiment,
    prompts: list[Prompt],
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array,
    feature_dtype: str = "",
) -> list[Conversation]:
    """Holds the conversations turn by turn; one whose context is full ends early.

    With a dtype for them, features are kept.
    """
    stops = experiment.tokenizer.stop_ids
    config = DecodeConfig(max_new_tokens, stops, sampling)
    conversations = active = [Conversation(p) for p in prompts]
    for turn in range(max(len(p.turns) for p in prompts)):
        active = _asked(experiment, [c for c in active if turn < len(c.prompt.turns)], turn, max_new_tokens)
        if not active:
            break
        rows = rows_for(len(active), batch_size, experiment.mesh)
        prompt_BxP, length_B = pad([c.tokens for c in active], rows)
        keys_B = jax.random.split(jax.random.fold_in(key, turn), batch_size)[:rows]
        put = lambda x: partition.shard_batch(x, experiment.mesh)  # noqa: E731
        out, kept = decode_batch(
            experiment.target,
            experiment.target_params,
            put(prompt_BxP),
            put(length_B),
            put(keys_B),
            config,
            experiment.mesh,
            feature_dtype,
        )
        for row, conversation in enumerate(active):
            conversation.answer(out.tokens[row, : out.emitted[row]].tolist())
            if kept:
                known = len(conversation.tokens)
                of_row = {k: v[row, :known].copy() for k, v in kept._asdict().items()}
                conversation.texts[-1].features = of_row
    return conversations


def _asked(
    experiment: Experiment, conversations: list[Conversation], turn: int, max_new_tokens: int
) -> list[Conversation]:
    """Asks the next question of those that have room for it and its answer, and returns those."""
    context, open_ = experiment.target.config.context, []
    for conversation in conversations:
        question = conversation.question(experiment.tokenizer, turn)
        if question.length + max_new_tokens <= context:
            conversation.ask(question)
            open_.append(conversation)
    return open_


def pad(rows: list[list[int]], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[B, P]` right-padded prompts and `[B]` lengths; missing rows repeat the shortest one."""
    rows = rows + [min(rows, key=len)] * (batch_size - len(rows))
    longest = max(len(r) for r in rows)
    padded = np.zeros((len(rows), -(-longest // _BUCKET) * _BUCKET), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded, np.asarray([len(r) for r in rows], np.int32)
