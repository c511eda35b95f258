"""Stage `respond`: the target writes the training text.

Work is cut into batches that depend on the prompts alone; each becomes one shard. A killed run loses
the batch in flight and repeats exactly that batch.
"""

import pathlib
import time

import jax
import numpy as np

from ppow_jax.config import Settings
from ppow_jax.data import records
from ppow_jax.data.conversations import Conversation, import_responses
from ppow_jax.data.prompt import Prompt
from ppow_jax.data.prompts import load, parse
from ppow_jax.decode.batch import decode_batch, rows_for
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.sampling import Sampling
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import partition, preemption, processes
from ppow_jax.parallel.console import log
from ppow_jax.stages import features
from ppow_jax.training.metrics import duration

_IMPORT_ROWS = 128  # a shard
# Tokens of a text, the prompt's first turn and an answer, that the batch size is meant for.
_TEXT = {"cpu": 256, "default": 2048}
_BUCKET = 8  # prompts are padded to a multiple of this, so that few shapes are compiled


def check(settings: Settings) -> None:
    """Something to answer or to take over.

    Raises:
      ConfigError: there is nothing.
    """
    found = settings.respond.prompts
    if not parse(found, "respond.prompts") and not settings.respond.responses:
        raise ConfigError(f"config.respond.prompts: found {found!r}, expected NAME=SOURCE pairs")


def run(experiment: Experiment) -> None:
    """Writes `responses/`: imported conversations first, then answers to the prompts."""
    settings, data = experiment.settings.respond, experiment.settings.data
    directory = experiment.workdir / "responses"
    imported = []
    if settings.responses:
        vocab = experiment.target.config.vocab_size
        imported = import_responses(settings.responses, experiment.tokenizer, vocab)
    answered = {c.prompt.id for c in imported}
    loaded = load(settings.prompts, "respond.prompts")
    unanswered = [p for source in loaded.values() for p in source if p.id not in answered]
    if not imported and not unanswered:
        raise UserError("respond: neither respond.prompts nor respond.responses gives any text")
    chunks = [imported[i : i + _IMPORT_ROWS] for i in range(0, len(imported), _IMPORT_ROWS)]
    done = set(records.shards(directory))
    for i, chunk in enumerate(chunks):
        if f"import-{i:05}" not in done:
            records.write_shard(directory, f"import-{i:05}", (c.record() for c in chunk))
    if imported:
        log.info("respond: %d conversations taken from %s", len(imported), settings.responses)
    write(
        experiment,
        unanswered,
        directory,
        settings.max_new_tokens,
        settings.temperature,
        settings.batch_size,
        longest=data.length - 2,  # a text without two written tokens teaches nothing
        kept=features.directory(experiment) if data.cache_features else None,
        feature_dtype=data.feature_dtype,
    )


def write(
    experiment: Experiment,
    prompts: list[Prompt],
    directory: pathlib.Path,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    label: str = "respond",
    longest: int | None = None,
    kept: pathlib.Path | None = None,
    feature_dtype: str = "float32",
) -> None:
    """Answers prompts, one shard a batch; batches that are there already are left alone.

    Prompts of more than `longest` tokens are left out. They would also set the size of a whole batch:
    reading 64 prompts of 4,400 tokens takes 45 GB of attention scores.

    Features are written in `feature_dtype` to the directory `kept`, a shard of the same name for each; None:
    they are not kept.

    Raises:
      UserError: a prompt that does not fit into the target's context.
    """
    lengths = lengths_of(experiment, prompts, max_new_tokens)
    fitting = [p for p in prompts if longest is None or lengths[p.id] <= longest]
    if len(fitting) < len(prompts):
        log.info("%s: %d prompts of more than %d tokens left out: config.data.length", label,
                 len(prompts) - len(fitting), longest)  # fmt: skip
    batches = batches_of(fitting, lengths, batch_size, max_new_tokens)
    done = set(processes.agreed(records.shards(directory)))
    todo = [(i, batch) for i, batch in enumerate(batches) if f"write-{i:05}" not in done]
    began, tokens = time.monotonic(), 0
    for n, (i, batch) in enumerate(todo, 1):
        seed = jax.random.fold_in(experiment.key("respond"), i)
        dtype = feature_dtype if kept else ""
        conversations = converse(experiment, batch, batch_size, max_new_tokens, temperature, seed, dtype)
        if kept:
            features.write(kept, f"write-{i:05}", [c.features for c in conversations], dtype)
        records.write_shard(directory, f"write-{i:05}", (c.record() for c in conversations))
        tokens += sum(sum(c.assistant) for c in conversations)
        seconds = time.monotonic() - began
        log.info(
            "%s: batch %d/%d, %d tokens, %.0f tokens/s | %s left",
            label,
            len(batches) - len(todo) + n,
            len(batches),
            tokens,
            tokens / seconds,
            duration(seconds / n * (len(todo) - n)),
        )
        preemption.leave(f"{label} is written up to batch {len(batches) - len(todo) + n} of {len(batches)}")
    processes.together(f"{label} is written")


def lengths_of(experiment: Experiment, prompts: list[Prompt], max_new_tokens: int) -> dict[str, int]:
    """Tokens of every prompt's first turn, by id."""
    context = experiment.target.config.context
    lengths = {p.id: len(experiment.tokenizer.first_turn(p.turns[0])) for p in prompts}
    for name, length in lengths.items():
        if length + max_new_tokens > context:
            raise UserError(
                f"prompt {name!r} has {length} tokens; with {max_new_tokens} new ones that is more "
                f"than the target's context of {context}: shorten or drop it"
            )
    return lengths


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
    temperature: float,
    key: jax.Array,
    feature_dtype: str = "",
) -> list[Conversation]:
    """Holds the conversations turn by turn; one whose context is full ends early.

    With a dtype for them, features are kept.
    """
    stops = experiment.tokenizer.stop_ids
    config = DecodeConfig(max_new_tokens, stops, Sampling(temperature))
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
                conversation.features = {k: v[row, :known].copy() for k, v in kept._asdict().items()}
    return conversations


def _asked(
    experiment: Experiment, conversations: list[Conversation], turn: int, max_new_tokens: int
) -> list[Conversation]:
    """Asks the next question of those that have room for it and its answer, and returns those."""
    context, open_ = experiment.target.config.context, []
    for conversation in conversations:
        ids = conversation.question(experiment.tokenizer, turn)
        if len(conversation.tokens) + len(ids) + max_new_tokens <= context:
            conversation.ask(ids)
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
