"""The kinds of servers: how each is asked, what each tells of its drafts.

All speak OpenAI's protocol. llama.cpp, vLLM and SGLang also take a prompt as token ids and tell the ids that
they wrote; any other server gets messages and gives text.
"""

import contextlib
import dataclasses
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from ppow_jax.serving.connection import Connection, ServerError, connection
from ppow_jax.targets.chat import Message

_SEEDS = 2**31  # seeds are below it


class Drafts(NamedTuple):
    """What became of drafts.

    Attributes:
      passes: of the target, with a draft to verify.
      drafted, accepted: tokens of the drafter.
      by_position: accepted tokens by their place in the draft; empty: not told.
    """

    passes: float = 0
    drafted: float = 0
    accepted: float = 0
    by_position: tuple[float, ...] = ()

    @property
    def length(self) -> float:
        """Mean acceptance length: tokens that a pass gives, its own one included."""
        return 1 + self.accepted / self.passes

    @property
    def rate(self) -> float:
        """Share of the drafted tokens that are accepted."""
        return self.accepted / self.drafted

    def changed(self, other: "Drafts", sign: int) -> "Drafts":
        """The sum with another one, or, with a sign of -1, the difference."""
        size = max(len(self.by_position), len(other.by_position))
        mine, its = ([*x.by_position, *[0.0] * size][:size] for x in (self, other))
        return Drafts(
            self.passes + sign * other.passes,
            self.drafted + sign * other.drafted,
            self.accepted + sign * other.accepted,
            tuple(a + sign * b for a, b in zip(mine, its, strict=True)),
        )


class Answer(NamedTuple):
    """What a server wrote.

    Attributes:
      text: without the token that ends it.
      ids: its tokens, with or without that one; None: not told.
      finished: whether the model ended it; if not, it was cut.
      tokens: how many were written.
      drafts: what became of drafts; None: not told in the answer.
    """

    text: str
    ids: list[int] | None
    finished: bool
    tokens: int
    drafts: Drafts | None = None


class Asked(NamedTuple):
    """A request for training text.

    Attributes:
      messages: the conversation up to the question.
      ids: the same as the target's template renders it.
      tokens: to write at most.
      temperature: 0: greedy.
      seed: of the random choice, where the server takes one.
      stops: ids that end a text.
    """

    messages: Sequence[Message]
    ids: Sequence[int]
    tokens: int
    temperature: float
    seed: int
    stops: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that speaks OpenAI's protocol, of no kind that is known here.

    Attributes:
      connection: to it.
      model: the name of what it serves.
    """

    connection: Connection
    model: str
    kind: ClassVar[str] = "an OpenAI-compatible server"
    missing: ClassVar[str] = "servers of other kinds than llama.cpp, vLLM and SGLang are not asked for drafts"
    # What switches off a server's own defaults, which may be top-k, top-p or a penalty.
    plainly: ClassVar[dict[str, Any]] = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}

    def chat(self, messages: Sequence[Message], tokens: int, temperature: float = 0.0) -> Answer:
        """Answers a conversation, with the server's own chat template around it.

        Raises:
          ServerError: no answer, or none of OpenAI's form.
        """
        body: dict[str, Any] = {"messages": list(messages), "max_tokens": tokens, "temperature": temperature}
        return self._chat(body | self.plainly)

    def answer(self, asked: Asked) -> Answer:
        """Answers a request for training text.

        Raises:
          ServerError: no answer, or none of the server's form.
        """
        body: dict[str, Any] = {"messages": list(asked.messages), "max_tokens": asked.tokens}
        body |= {"temperature": asked.temperature, "seed": asked.seed % _SEEDS}
        return self._chat(body | self.plainly)

    def counted(self) -> Drafts | None:
        """What the server has counted since its start; None: nothing."""
        return None

    def average(self) -> float | None:
        """The mean acceptance length since the server's start; None: not told."""
        return None

    def _chat(self, body: dict[str, Any]) -> Answer:
        path = "/v1/chat/completions"
        found = self.connection.json(path, {"model": self.model} | body)
        with self._reading(path, found):
            choice, count = found["choices"][0], found["usage"]["completion_tokens"]
            said = choice["message"]
            text = (said.get("reasoning_content") or "") + (said.get("content") or "")
            drafts = self._drafts(found, choice)
            return Answer(text, None, self._finished(choice["finish_reason"], path), _whole(count), drafts)

    def _drafts(self, found: Any, choice: Any) -> Drafts | None:
        """What an answer tells of its drafts."""
        return None

    def _finished(self, reason: Any, path: str) -> bool:
        if reason not in ("stop", "length"):
            raise ServerError(
                f"{self.connection.url}{path}: the answer ended with {reason!r}, expected 'stop' or 'length'"
            )
        return reason == "stop"

    @contextlib.contextmanager
    def _reading(self, path: str, found: Any) -> Iterator[None]:
        """Names the address if the answer has another form than expected."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            raise ServerError(
                f"{self.connection.url}{path}: found {reprlib.repr(found)} ({type(e).__name__}: {e}), "
                f"expected an answer of {self.kind}"
            ) from e


class LlamaCpp(Server):
    """llama.cpp's `llama-server`; its answers count their drafts."""

    kind = "llama.cpp"
    missing = "answers count no drafts (`timings.draft_n`): is it started with a drafter (-md)?"
    plainly: ClassVar[dict[str, Any]] = {
        **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "xtc_probability": 0.0},
        **{"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "dry_multiplier": 0.0},
    }

    def answer(self, asked: Asked) -> Answer:
        body: dict[str, Any] = {"prompt": list(asked.ids), "n_predict": asked.tokens}
        body |= {"temperature": asked.temperature, "seed": asked.seed % _SEEDS, "return_tokens": True}
        found = self.connection.json("/completion", body | self.plainly)
        with self._reading("/completion", found):
            reasons = {"eos": "stop", "word": "stop", "limit": "length"}
            finished = self._finished(reasons.get(found["stop_type"], found["stop_type"]), "/completion")
            return Answer(
                found["content"], _ids(found["tokens"]), finished, _whole(found["tokens_predicted"])
            )

    def _drafts(self, found: Any, choice: Any) -> Drafts | None:
        timings = found.get("timings") or {}
        accepted = timings.get("draft_n_accepted", 0)
        # The first token comes from the pass that reads the prompt.
        passes = max(found["usage"]["completion_tokens"] - 1 - accepted, 0)
        return Drafts(passes, timings.get("draft_n", 0), accepted)


class VLLM(Server):
    """vLLM; its counters are in `/metrics`."""

    kind = "vLLM"
    missing = "/metrics has no vllm:spec_decode_* counters: is it started with --speculative-config?"
    plainly: ClassVar[dict[str, Any]] = {
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
    }

    def answer(self, asked: Asked) -> Answer:
        path = "/v1/completions"
        body: dict[str, Any] = {"model": self.model, "prompt": list(asked.ids), "max_tokens": asked.tokens}
        body |= {"temperature": asked.temperature, "seed": asked.seed % _SEEDS}
        body |= {"stop_token_ids": list(asked.stops), "return_token_ids": True}
        found = self.connection.json(path, body | self.plainly)
        with self._reading(path, found):
            choice = found["choices"][0]
            ids = choice.get("token_ids")  # older versions do not tell them
            finished, count = (
                self._finished(choice["finish_reason"], path),
                found["usage"]["completion_tokens"],
            )
            return Answer(choice["text"], None if ids is None else _ids(ids), finished, _whole(count))

    def counted(self) -> Drafts | None:
        name = "vllm:spec_decode_num_"
        try:
            found = _metrics(self.connection.text("/metrics"), name)
        except ServerError:  # it may be switched off; all else can be measured
            return None
        if f"{name}drafts_total" not in found:
            return None
        passes, drafted, accepted = (
            sum(found.get(f"{name}{what}_total", {}).values())
            for what in ("drafts", "draft_tokens", "accepted_tokens")
        )
        places = found.get(f"{name}accepted_tokens_per_pos_total", {})
        return Drafts(
            passes, drafted, accepted, tuple(places[at] for at in sorted(filter(None, places), key=int))
        )


class SGLang(Server):
    """SGLang; its answers count their drafts, older versions tell an average of all since their start."""

    kind = "SGLang"
    missing = "answers count no drafts (`meta_info.spec_verify_ct`): has it a --speculative-algorithm?"
    plainly: ClassVar[dict[str, Any]] = {
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
    }

    def answer(self, asked: Asked) -> Answer:
        sampling: dict[str, Any] = {"max_new_tokens": asked.tokens, "temperature": asked.temperature}
        sampling |= {"stop_token_ids": list(asked.stops)} | self.plainly
        body = {"input_ids": list(asked.ids), "sampling_params": sampling}
        found = self.connection.json("/generate", body)
        with self._reading("/generate", found):
            about = found["meta_info"]
            finished = self._finished(about["finish_reason"]["type"], "/generate")
            return Answer(
                found["text"], _ids(found["output_ids"]), finished, _whole(about["completion_tokens"])
            )

    def average(self) -> float | None:
        for path in ("/server_info", "/get_server_info"):  # the second is the older name
            try:
                states = self.connection.json(path)["internal_states"]
                return float(states[0]["avg_spec_accept_length"])
            except (ServerError, LookupError, TypeError, ValueError):
                continue
        return None

    def _chat(self, body: dict[str, Any]) -> Answer:
        return super()._chat(body | {"return_meta_info": True})

    def _drafts(self, found: Any, choice: Any) -> Drafts | None:
        about = choice.get("meta_info") or {}
        if "spec_verify_ct" not in about or "spec_num_correct_drafts" not in about:
            return None
        drafted, accepted = about["spec_num_proposed_drafts"], about["spec_num_correct_drafts"]
        return Drafts(about["spec_verify_ct"], drafted, accepted)


_KINDS = {"llamacpp": LlamaCpp, "vllm": VLLM, "sglang": SGLang}  # as servers call themselves


def connect(url: str, where: str, timeout: float, attempts: int = 1) -> Server:
    """The server at a URL, of the kind that its list of models tells.

    Args:
      url: `http://HOST:PORT`.
      where: the flag or key that has it, for errors.
      timeout: seconds that it may be silent.
      attempts: how often each request is sent, if what goes wrong may be over in a moment.

    Raises:
      ConfigError: it is no URL.
      ServerError: nothing answers there, something else than such a server, or one of several models.
    """
    made = connection(url, where, timeout, attempts)
    try:
        found = made.json("/v1/models")
    except ServerError as e:
        raise ServerError(f"{where}: {e}", e.passing) from e
    cards = found.get("data") if isinstance(found, dict) else None
    if not (isinstance(cards, list) and cards and all(isinstance(c, dict) and "id" in c for c in cards)):
        raise ServerError(
            f"{where}: {made.url}/v1/models: found {reprlib.repr(found)}, expected OpenAI's list of models; "
            "name an OpenAI-compatible server"
        )
    kind = _KINDS.get(cards[0].get("owned_by"), Server)
    if kind is Server and len(cards) > 1:
        raise ServerError(
            f"{where}: {made.url} serves {len(cards)} models, expected one; name a server of the target alone"
        )
    return kind(made, str(cards[0]["id"]))


def _ids(values: Any) -> list[int]:
    if not (isinstance(values, list) and all(type(i) is int for i in values)):
        raise ValueError("expected token ids")
    return values


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("expected a number of tokens")
    return value


def _metrics(text: str, prefix: str) -> dict[str, dict[str, float]]:
    """Of Prometheus' text, the values whose names begin so, by name and by their label `position`.

    Values that other labels tell apart, such as the engine, are added; without that label it is empty.
    """
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in re.findall(r"^([\w:]+)(\{.*\})?[ \t]+([\d.eE+-]+)", text, re.MULTILINE):
        if name.startswith(prefix):
            place = re.search(r'\bposition="(\d+)"', labels)
            of, at = found.setdefault(name, {}), place[1] if place else ""
            of[at] = of.get(at, 0.0) + float(value)
    return found
