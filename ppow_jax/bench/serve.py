"""A running server measured from outside: tokens a second, texts, and the acceptance that it reports."""

import time
from typing import NamedTuple

from ppow_jax.bench.machine import show
from ppow_jax.data import prompts
from ppow_jax.parallel import progress
from ppow_jax.serving import servers
from ppow_jax.serving.servers import Answer, Drafts, Server
from ppow_jax.targets.tokenizer import first_messages

_FIRST = ("Hello.", 8)  # what is asked first and not counted, and its tokens: a server may have to warm up


class Timed(NamedTuple):
    """An answer, and the seconds from the question to its end."""

    answer: Answer
    seconds: float


class Measured(NamedTuple):
    """The answers of a benchmark.

    Attributes:
      drafted: the server's, prompt by prompt.
      plain: those of the same server without drafter; empty: none was given.
      drafts: what the first server says of its drafts; None: nothing.
    """

    drafted: list[Timed]
    plain: list[Timed]
    drafts: Drafts | None


def serve(url: str, plain_url: str, sources: str, count: int, tokens: int, timeout: float) -> None:
    """Asks the first turns of `count` prompts of each source, greedily, one after the other; prints tables.

    Args:
      url: of the server.
      plain_url: of the same server without drafter; empty: there is none.
      sources: of prompts, as `config.evaluate.prompts`.
      count: prompts of each source.
      tokens: to write at most.
      timeout: seconds that a server may be silent.

    Raises:
      UserError: malformed prompts, or a server that is not there or does not answer as one.
    """
    asked = {name: of[:count] for name, of in prompts.load(sources, "prompts").items()}
    server = servers.connect(url, "--url", timeout)
    plain = servers.connect(plain_url, "--plain_url", timeout) if plain_url else None
    for each in (server, plain):
        if each:
            each.chat(first_messages(_FIRST[0]), _FIRST[1])
    loop = progress.Loop("serve", sum(map(len, asked.values())), "prompts")
    found = {name: _measure(server, plain, of, tokens, loop) for name, of in asked.items()}
    total = Measured(
        [timed for one in found.values() for timed in one.drafted],
        [timed for one in found.values() for timed in one.plain],
        _sum([one.drafts for one in found.values()]),
    )
    rows = [_row(name, one) for name, one in (*found.items(), ("all", total))]
    columns = ["benchmark", "prompts", "tokens", "tokens/s", "plain", "ratio", "texts alike"]
    columns += ["acceptance length", "acceptance rate"]
    show(f"{server.kind}, {server.model}, at most {tokens} tokens", columns, rows)
    _tell_of_drafts(server, total.drafts)


def _measure(
    server: Server, plain: Server | None, of: list[prompts.Prompt], tokens: int, loop: progress.Loop
) -> Measured:
    """Both servers in turn, prompt by prompt: a slow moment hits them alike."""
    drafted, without, before = [], [], server.counted()
    for prompt in of:
        messages = first_messages(prompt.turns[0], prompt.system)
        drafted.append(_timed(server, messages, tokens))
        if plain:
            without.append(_timed(plain, messages, tokens))
        loop.add(1)
    after = server.counted()
    drafts = _sum([timed.answer.drafts for timed in drafted])
    if before and after:
        drafts = after.changed(before, -1)
    return Measured(drafted, without, drafts if drafts and drafts.drafted and drafts.passes else None)


def _timed(server: Server, messages: list, tokens: int) -> Timed:
    began = time.perf_counter()
    answer = server.chat(messages, tokens)
    return Timed(answer, time.perf_counter() - began)


def _sum(found: list[Drafts | None]) -> Drafts | None:
    """All together; None: there are none."""
    total = Drafts()
    for drafts in found:
        total = total.changed(drafts, 1) if drafts else total
    return total if total.passes else None


def _row(name: str, found: Measured) -> list[str]:
    tokens, speed = sum(t.answer.tokens for t in found.drafted), _rate(found.drafted)
    row = [name, str(len(found.drafted)), str(tokens), f"{speed:.1f}"]
    if found.plain:
        alike = sum(a.answer.text == b.answer.text for a, b in zip(found.drafted, found.plain, strict=True))
        base = _rate(found.plain)
        row += [f"{base:.1f}", f"{speed / base:.2f}x" if base else "", f"{alike}/{len(found.plain)}"]
    else:
        row += [""] * 3
    drafts = found.drafts
    return row + ([f"{drafts.length:.3f}", f"{drafts.rate:.3f}"] if drafts else ["not reported"] * 2)


def _rate(timed: list[Timed]) -> float:
    """Tokens a second, reading the prompts included."""
    return sum(t.answer.tokens for t in timed) / sum(t.seconds for t in timed)


def _tell_of_drafts(server: Server, drafts: Drafts | None) -> None:
    """What the table has no room for: acceptance by position, or why there is none."""
    if drafts is None:
        average = server.average()
        if average is not None:
            print(f"{server.kind} reports an average acceptance length since its start only: {average:.3f}")
        else:
            print(f"{server.kind} reports no acceptance: {server.missing}")
    elif drafts.by_position:
        shares = [f"{accepted / drafts.passes:.3f}" for accepted in drafts.by_position]
        show("accepted by position in the draft", [str(at) for at in range(1, len(shares) + 1)], [shares])
