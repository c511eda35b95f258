"""Checks of the texts: the template around the prompts, the masks, the vocabulary, lengths, stale files."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ppow_jax import experiment
from ppow_jax.data import prompts
from ppow_jax.data.conversations import Conversation, read_responses, spans
from ppow_jax.data.prompt import Prompt
from ppow_jax.data.records import Records
from ppow_jax.data.texts import spread
from ppow_jax.doctor.case import Case
from ppow_jax.doctor.findings import FINE, NOTE, WRONG, Finding
from ppow_jax.errors import UserError
from ppow_jax.parallel import files
from ppow_jax.report.measure import params_sha256
from ppow_jax.stages import inputs

_PROMPTS, _RECORDS = 64, 512  # that are looked at, evenly spread
_COVERED, _COVERED_WELL = 0.7, 0.95  # of the tokens, by the draft vocabulary
_CUT, _CUT_LITTLE = 0.3, 0.05  # of the tokens, by data.length
_FEATURES = 0.05  # the most by which stored features may differ from the target's, as a share of their norm


def _some(records: Records, count: int = _RECORDS) -> Iterator[dict[str, Any]]:
    return (records[i] for i in spread(len(records), count))


def _openings(case: Case) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Some responses, each with the ids that the template now makes of its first question.

    Raises:
      UserError: the prompts cannot be read any more, or none of them has a response.
    """
    settings = case.experiment.settings.respond
    loaded = prompts.load(settings.prompts, "respond.prompts", warn=False)
    asked = {prompt.id: prompt for source in loaded.values() for prompt in source}
    if settings.responses:
        asked |= {
            row.prompt.id: row.prompt
            for row in read_responses(settings.responses, "respond.responses", warn=False)
        }
    seen: set[str] = set()
    for record in _some(case.experiment.responses):
        if record["id"] in asked and record["id"] not in seen and len(seen) < _PROMPTS:
            seen.add(record["id"])
            yield record, _opening(case, asked[record["id"]])
    if not seen:
        raise UserError("no response is to a prompt of config.respond.prompts")


def _opening(case: Case, prompt: Prompt) -> list[int]:
    """The ids up to the first answer."""
    conversation, tokenizer = Conversation(prompt), case.experiment.tokenizer
    if case.experiment.settings.respond.keep_answers and prompt.answers:
        conversation.take(tokenizer, case.experiment.target.config.context)
        text = conversation.texts[0]
        return text.tokens[: next(iter(spans(np.asarray(text.assistant))), (0, 0))[0]]
    return conversation.question(tokenizer, 0).ids


def template(case: Case) -> Finding:
    """The chat template puts around the prompts what the responses begin with."""
    changed = "tokenizer" in experiment.changed(case.experiment)
    remedy = "serve with the template (and system message) of training, or answer and train again"
    total, different, example = 0, 0, ""
    try:
        openings = list(_openings(case))
    except UserError as e:
        if not changed:
            raise
        found = f"the workdir was made with another tokenizer or chat template; texts not compared: {e}"
        return Finding(WRONG, found, remedy)
    for record, ids in openings:
        total += 1
        if record["tokens"][: len(ids)].tolist() != ids:
            different += 1
            example = example or _difference(case, record["tokens"].tolist(), ids)
    if different:
        return Finding(
            WRONG, f"{different} of {total} responses begin with something else: {example}", remedy
        )
    if changed:
        found = "the tokenizer or chat template is another one, yet renders these prompts as before"
        return Finding(NOTE, found, "see whether system messages or later turns are rendered as before")
    return Finding(FINE, f"{total} of {total} responses begin as the template has it")


def _difference(case: Case, found: list[int], expected: list[int]) -> str:
    """Where two texts part, as text."""
    pairs = zip(found, expected, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    then, now = (case.experiment.tokenizer.decode(ids[at : at + 6]) for ids in (found, expected))
    return f"at token {at} found {then!r}, the template now gives {now!r}"


def masks(case: Case) -> Finding:
    """The loss mask covers the answers and nothing else."""
    stops, length = set(case.experiment.tokenizer.stop_ids), case.experiment.settings.respond.max_new_tokens
    kept = bool(case.experiment.settings.respond.responses or case.experiment.settings.respond.keep_answers)
    wrong = {"empty": 0, "beginning elsewhere": 0, "ending elsewhere": 0}
    total = 0
    for record in _some(case.experiment.responses):
        total += 1
        tokens, found = record["tokens"], spans(record["assistant"])
        wrong["empty"] += not found
        wrong["ending elsewhere"] += any(
            not (end == len(tokens) or tokens[end - 1] in stops or (end - start == length or kept))
            or any(token in stops for token in tokens[start : end - 1].tolist())
            for start, end in found
        )
    openings = () if any(wrong.values()) else _openings(case)
    for record, ids in openings:
        found, same = spans(record["assistant"]), record["tokens"][: len(ids)].tolist() == ids
        wrong["beginning elsewhere"] += bool(found) and same and found[0][0] != len(ids)
    if any(wrong.values()):
        said = ", ".join(f"{count} {what}" for what, count in wrong.items() if count)
        return Finding(
            WRONG,
            f"of {total} masks of responses {said}; expected from the first token of an answer to its end",
            "make responses/ again: in a new workdir, or with the stages respond and train",
        )
    return Finding(FINE, f"{total} masks cover the answers, from the first token to the end of the turn")


def coverage(case: Case) -> Finding:
    """The share of written tokens that the drafter can propose at all."""
    vocab = np.asarray(case.examined.weights.vocab)
    shares = {"responses": _share(case.experiment.responses, vocab)}
    shares |= {b.name: _share(Records(b.directory), vocab) for b in case.benchmarks}
    said = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    found, least = f"the draft vocabulary of {len(vocab)} covers of the tokens: {said}", min(shares.values())
    remedy = "raise config.drafter.vocab_size, or answer prompts that are more like those to be served"
    if least < _COVERED:
        return Finding(WRONG, f"{found}; expected {_COVERED_WELL:.0%} or more", remedy)
    if least < _COVERED_WELL:
        return Finding(NOTE, f"{found}; expected {_COVERED_WELL:.0%} or more", remedy)
    return Finding(FINE, found)


def _share(records: Records, vocab_N: np.ndarray) -> float:
    """Of the written tokens, those in the vocabulary."""
    written = [record["tokens"][record["assistant"] > 0] for record in _some(records)]
    tokens = np.concatenate(written)
    if not len(tokens):
        raise UserError("no token of the texts is marked as written (see masks)")
    return float(np.isin(tokens, vocab_N).mean())


def lengths(case: Case) -> Finding:
    """The written tokens that lie beyond `data.length`: training has seen none there."""
    length = case.experiment.settings.data.length
    texts = {"responses": case.experiment.responses}
    texts |= {b.name: Records(b.directory) for b in case.benchmarks}
    beyond = {name: _beyond(records, length) for name, records in texts.items()}
    said = ", ".join(f"{name} {share:.0%}" for name, (share, _) in beyond.items())
    longest = max(most for _, most in beyond.values())
    found = f"beyond data.length {length} lie of the written tokens: {said} (longest text: {longest})"
    remedy = f"raise config.data.length towards {longest} and train in a new workdir"
    if beyond["responses"][0] > _CUT:
        return Finding(WRONG, f"{found}; expected {_CUT_LITTLE:.0%} or less", remedy)
    if max(share for share, _ in beyond.values()) > _CUT_LITTLE:
        return Finding(NOTE, f"{found}; expected {_CUT_LITTLE:.0%} or less", remedy)
    return Finding(FINE, found)


def _beyond(records: Records, length: int) -> tuple[float, int]:
    """The share of written tokens beyond a length, and the longest text."""
    beyond = written = longest = 0
    for record in _some(records):
        written += int(record["assistant"].sum())
        beyond += int(record["assistant"][length:].sum())
        longest = max(longest, len(record["tokens"]))
    return beyond / max(1, written), longest


def stale(case: Case) -> Finding:
    """What the stages have read from files, and the report, against what lies there now."""
    workdir, settings = case.experiment.workdir, case.experiment.settings
    changed: set[str] = set()
    gone: set[str] = set()
    stages = files.read_json(workdir / "stages.json") or {}
    for unit, record in stages.items():
        if unit.removeprefix("train/") not in (*settings.train, "respond", "evaluate", "export"):
            continue
        before, now = record.get("read", {}), inputs.read(settings, unit, workdir)
        for key in before.keys() & now.keys():
            if before[key] and before[key] != now[key]:
                (changed if now[key] else gone).add(f"config.{key}")
    if changed:
        return Finding(
            WRONG,
            f"what {', '.join(sorted(changed))} names has changed since the stages have read it",
            "put the old files back, or run in a new workdir",
        )
    if gone:
        return Finding(NOTE, f"what {', '.join(sorted(gone))} names is not there any more", "put it back")
    report = (files.read_json(workdir / "report.json") or {}).get("drafters", {}).get(case.run)
    if report and report["params_sha256"] != params_sha256(case.checkpoint.params):
        return Finding(
            NOTE,
            f"report.json is of other parameters of the run {case.run} than its checkpoint holds",
            "evaluate again: --config.stages=\"('evaluate',)\"",
        )
    return Finding(FINE, "the files that the stages have read are as they were")


def features(case: Case) -> Finding:
    """The features that training read, against what the target computes of the same texts."""
    sample, worst = case.held, 0.0
    taps = np.asarray(sample.taps(case.experiment.target.config.taps), np.float32)
    for row, item in enumerate(case.held_items()):
        if "taps" not in item:
            return Finding(FINE, "none are kept: the target reads the texts anew")
        end = sample.end[row] - 1  # of the last token the target has read nothing while it wrote
        kept, now = item["taps"][:end].astype(np.float32), taps[row, :end]
        worst = max(worst, float(np.linalg.norm(kept - now) / np.linalg.norm(now)))
    if worst > _FEATURES:
        return Finding(
            WRONG,
            f"the features in features/ are up to {worst:.0%} off what the target computes, expected "
            f"{_FEATURES:.0%} or less",
            "delete features/ and train again; are they of another target, or of other taps?",
        )
    return Finding(FINE, f"those in features/ are the target's (at most {worst:.2%} off)")
