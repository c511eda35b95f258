"""`bench serve` on servers whose counts are known."""

import itertools
import re

import pytest
import runs
from fakes import ACCEPTED, DRAFTED, PASSES, Fake
from written import greedy

from ppow_jax.bench import serve
from ppow_jax.errors import UserError


@pytest.fixture
def sources(tmp_path) -> str:
    one = runs.write_jsonl(
        tmp_path / "one.jsonl", [{"turns": ["a", "b"]}, {"turns": ["b"]}, {"turns": ["c"]}]
    )
    two = runs.write_jsonl(tmp_path / "two.jsonl", [{"turns": ["d"]}])
    return f"one={one},two={two}"


def five(prompt, tokens):
    return greedy(prompt[-1], min(tokens, 5)), False


def measured(capsys, *about) -> tuple[list[list[str]], str]:
    """The cells of the first table by row, and all that was printed."""
    serve.serve(*about, timeout=5.0)
    out = capsys.readouterr().out
    table = out.split("└")[0]
    return [
        [c.strip() for c in line.strip("│").split("│")] for line in table.splitlines() if "│" in line
    ], out


@pytest.mark.parametrize(
    ("kind", "name"), [("llamacpp", "llama.cpp"), ("vllm", "vLLM"), ("sglang", "SGLang")]
)
def test_acceptance_is_as_the_server_reports_it(capsys, sources, kind, name):
    with Fake(kind, five) as fake, Fake(kind, five, drafts=False) as plain:
        rows, out = measured(capsys, fake.url, plain.url, sources, 2, 5)
    passes = 5 - 1 - ACCEPTED if kind == "llamacpp" else PASSES
    known = [f"{1 + ACCEPTED / passes:.3f}", f"{ACCEPTED / DRAFTED:.3f}"]
    assert f"{name}, markov, at most 5 tokens" in out
    assert [[*row[:3], *row[-3:]] for row in rows] == [
        ["one", "2", "10", "2/2", *known],
        ["two", "1", "5", "1/1", *known],
        ["all", "3", "15", "3/3", *known],
    ]
    assert all(float(row[3]) > 0 and float(row[4]) > 0 and row[5].endswith("x") for row in rows)
    if kind == "vllm":
        assert re.search(r"│ 1.000 │ 0.500 │ 0.000 │", out)  # 2, 1 and 0 of 2 drafts
    bodies = fake.asked()
    assert [b["messages"][-1]["content"] for b in bodies] == ["Hello.", "a", "b", "d"]
    assert {b["temperature"] for b in bodies} == {0} and {b["top_p"] for b in bodies} == {1}
    assert [b["max_tokens"] for b in bodies] == [8, 5, 5, 5]


def test_speed_is_measured_at_the_client_and_texts_are_compared(capsys, sources, monkeypatch):
    """The clock moves by a second a look; the plain server's second text is another."""
    monkeypatch.setattr(serve.time, "perf_counter", itertools.count().__next__)
    other = Fake("llamacpp", lambda prompt, tokens: (greedy(prompt[-1], 4), False), drafts=False)
    with Fake("llamacpp", five) as fake, other as plain:
        rows, _ = measured(capsys, fake.url, plain.url, sources, 1, 5)
    assert [row[3:7] for row in rows] == [["5.0", "4.0", "1.25x", f"0/{n}"] for n in (1, 1, 2)]


def test_without_a_plain_server_there_is_no_ratio(capsys, sources):
    with Fake("vllm", five) as fake:
        rows, _ = measured(capsys, fake.url, "", sources, 1, 5)
    assert [row[4:7] for row in rows] == [["", "", ""]] * 3


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("llamacpp", r"llama.cpp reports no acceptance: answers count no drafts \(`timings.draft_n`\)"),
        ("vllm", "vLLM reports no acceptance: /metrics has no vllm:spec_decode_"),
        ("sglang", "SGLang reports an average acceptance length since its start only: 2.250"),
        ("openai", "an OpenAI-compatible server reports no acceptance: servers of other kinds"),
    ],
)
def test_a_server_that_reports_nothing_is_measured_all_the_same(capsys, sources, kind, said):
    with Fake(kind, five, drafts=False) as fake:
        rows, out = measured(capsys, fake.url, "", sources, 1, 5)
    assert re.search(said, out)
    assert [row[7:] for row in rows] == [["not reported", "not reported"]] * 3
    assert all(float(row[3]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {"error": {"message": "out of memory"}}), "/v1/chat/completions: 500 .*: out of memory$"),
        ((200, {"choices": []}), "/v1/chat/completions: found .*IndexError.*, expected an answer of vLLM$"),
        ((200, {"error": "odd"}), "/v1/chat/completions: found .*KeyError.*, expected an answer of vLLM$"),
        ((200, b"{"), "/v1/chat/completions: found '{', expected JSON"),
        (
            (
                200,
                {
                    "choices": [{"message": {"content": "a"}, "finish_reason": "abort"}],
                    "usage": {"completion_tokens": 1},
                },
            ),
            "/v1/chat/completions: the answer ended with 'abort', expected 'stop' or 'length'$",
        ),
    ],
)
def test_an_answer_that_is_none_ends_it_in_one_line(sources, answer, message):
    fake = Fake("vllm", five, before=lambda path, body: answer if body else None)
    with fake, pytest.raises(UserError, match=message):
        serve.serve(fake.url, "", sources, 1, 5, 5.0)
