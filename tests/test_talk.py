"""The chat: what it shows, what it writes, and what it says of mistakes."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import small
from rich.console import Console

from ppow_jax.api import Answer, Round
from ppow_jax.chat import page, picture, screen, talk, trace
from ppow_jax.chat.exchange import Exchange
from ppow_jax.chat.talk import Options
from ppow_jax.decode.rounds import Node
from ppow_jax.errors import ConfigError

TEXT = {"accepted": "ab", "refused": "x\n", "dropped": "y", "own": "c"}
ROUNDS = [Round([], 0, [5]), Round([6, 9], 1, [7], (Node(6, -1),))]
GIVEN = Answer("abc", [5, 6, 7], True, ROUNDS, [TEXT, TEXT], 0.5, 2.0)


def console(**how) -> Console:
    return Console(file=io.StringIO(), highlight=False, width=80, **how)


@pytest.fixture(scope="module")
def asked(finished, tmp_path_factory):
    """A prompt that was answered: the exchange, what was printed, and the directory with the files."""
    directory, out = tmp_path_factory.mktemp("chat"), console()
    options = Options(
        str(finished.workdir), "supervise", "tree:6x3x2", 12, prompt="ab",
        trace=str(directory / "t.jsonl"), html=str(directory / "t.html"),
        svg=str(directory / "t.svg"),
    )  # fmt: skip
    (exchange,) = talk.talk(options, out)
    return exchange, out.file.getvalue(), directory


def test_without_a_terminal_the_text_stands_alone(asked):
    exchange, printed, _ = asked
    assert exchange.answer.ids == small.walk(2, 12)
    assert printed.startswith(exchange.answer.text + "\n") and "\x1b" not in printed
    assert "drafts tree:6x3x2 by supervise" in printed
    assert "the same text" in printed
    passes = exchange.answer.rounds[1:]
    assert f"tau {11 / len(passes):.2f} (11 tokens in {len(passes)} passes)" in printed
    assert "accepted by round: " + " ".join(str(r.accepted) for r in passes) in printed


def test_a_trace_has_a_row_for_each_round(asked):
    exchange, _, directory = asked
    rows = [json.loads(line) for line in (directory / "t.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(len(exchange.answer.rounds)))
    assert [token for row in rows for token in row["emitted"]] == exchange.answer.ids
    probs, last = small.markov_chain().probs, rows[0]["emitted"][0]
    for row, of in zip(rows[1:], exchange.answer.rounds[1:], strict=True):
        assert (row["accepted"], len(row["drafted"])) == (of.accepted, 5)
        about = zip(row["drafted"], row["parents"], row["drafter_log_probs"], row["target_log_probs"])  # noqa: B905
        for token, parent, drafter, target in about:
            above = last if parent < 0 else row["drafted"][parent]
            if probs[above, token]:
                assert target == pytest.approx(np.log(probs[above, token]), abs=1e-3)
            assert drafter <= 0
        last = row["emitted"][-1]


def test_parquet_has_the_same_rows(asked, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    exchange, _, directory = asked
    file = tmp_path / "t.parquet"
    trace.check(file)
    trace.write(file, [exchange.answer])
    lines = [json.loads(line) for line in (directory / "t.jsonl").read_text().splitlines()]
    for found, known in zip(parquet.read_table(file).to_pylist(), lines, strict=True):
        for key in ("drafter_log_probs", "target_log_probs"):
            assert found.pop(key) == pytest.approx(known.pop(key), rel=1e-6)
        assert found == known


def test_parquet_without_pyarrow_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="written by pyarrow, which is missing; `pip install pyarrow`"):
        trace.check(tmp_path / "t.parquet")
    trace.check(tmp_path / "t.jsonl")


def test_the_page_escapes_all_text():
    evil = "<script>alert('&')</script>"
    text = dict.fromkeys(("accepted", "refused", "dropped", "own"), evil) | {"count": 1, "drafted": 3}
    given = dataclasses.replace(GIVEN, texts=[text, text])
    made = page.page(evil, [Exchange(evil, given, GIVEN, evil, True)])
    assert "<script" not in made
    assert made.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") == 2 + 1 + 5 + 1
    assert "1.0 tokens/s, plain decoding 1.0 (1.00x, the same text)" in made


def test_the_page_shows_the_rounds(asked):
    exchange, _, directory = asked
    made = (directory / "t.html").read_text()
    assert made.count('<span class="seam">') == len(exchange.answer.rounds)  # one is the legend's
    assert exchange.figures()[1] in made and "http" not in made


def drawn(svg: str) -> list[tuple[str, str]]:
    """The texts of a picture, each with its style."""
    root = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    (style,) = root.iter(f"{name}style")
    rules = dict(re.findall(r"^ *\.(\S+-r\d+) \{ (.*) \}$", style.text, re.MULTILINE))
    return [
        (e.text.replace("\xa0", " ").strip("\n"), rules[e.get("class")])
        for e in root.iter(f"{name}text")
        if e.get("class") in rules
    ]


def test_a_picture_shows_the_conversation(asked):
    exchange, _, directory = asked
    found = drawn((directory / "t.svg").read_text())
    assert found[0][0].strip() == "> ab"
    passes = exchange.answer.rounds[1:]
    refused = [text for text, style in found if "line-through" in style]
    assert bool(refused) == any(r.accepted < len(r.drafted) for r in passes)
    kept = [(text, style) for text, style in found[1:] if "line-through" not in style]
    assert "".join(text for text, _ in kept).startswith(exchange.answer.text)
    own = [text for text, style in kept if "underline" in style]
    assert "".join(own) and any("fill: #7fdc9d" in style for _, style in kept)  # green
    assert exchange.figures()[1] in "".join(text for text, _ in found)


def test_a_picture_holds_any_text_and_asks_for_nothing_from_elsewhere():
    evil = "</text><script>alert('&')</script>\x1b[2J\u202e\ufffe"
    text = dict.fromkeys(("accepted", "refused", "dropped", "own"), evil + " word" * 40)
    given = dataclasses.replace(GIVEN, texts=[text])
    made = picture.picture([Exchange(evil, given, None, "chain:2", True)] * 2)
    assert "<script" not in made and not re.search(r"url\((?!#)|@import|href", made)
    words = "".join(text for text, _ in drawn(made))
    assert words.count("</text><script>alert('&')</script>\ufffd[2J\ufffd\ufffd") == 2 * 5
    assert words.count("word") == 2 * 4 * 40  # long lines are broken, not cut


def test_a_terminal_shows_what_was_accepted_refused_and_the_targets_own():
    out = console(force_terminal=True, color_system="standard", legacy_windows=False)
    screen.show(out, TEXT)
    assert out.file.getvalue() == "\x1b[32mab\x1b[0m\x1b[2;9;31mx⏎y\x1b[0m\x1b[4mc\x1b[0m"
    plain = console()
    screen.show(plain, TEXT | {"own": "c\n"})
    screen.show(plain, TEXT)
    assert plain.file.getvalue() == "abc\nabc"


def test_a_text_cannot_steer_the_terminal():
    out = console()
    screen.show(out, TEXT | {"accepted": "\x1b[2Ja\r\x07\tb", "own": "é\n"})
    assert out.file.getvalue().replace(" ", "") == "\ufffd[2Ja\ufffd\ufffd\tbé\n".replace("\t", "")


def test_a_second_question_comes_with_what_was_said(finished, monkeypatch):
    said, lines = [], iter(["ab", "c", ""])
    generate = talk.api.generate

    def listening(target, messages, **how):
        said.append(([m["content"] for m in messages], how.get("shape")))
        return generate(target, messages, **how)

    monkeypatch.setattr(talk.api, "generate", listening)
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    options = Options(str(finished.workdir), tokens=4, compare=False)
    found = talk.talk(options, console())
    first = found[0].answer.text
    assert said == [(["ab"], "chain:2"), (["ab", first, "c"], "chain:2")]
    assert found[1].plain is None and "plain" not in found[1].figures()[0]


def test_what_is_compared_has_run_before(finished, monkeypatch):
    calls, programs = [], []
    generate = talk.api.generate

    def listening(target, messages, **how):
        same = {key: value for key, value in how.items() if key not in ("watch", "seed", "drafter")}
        calls.append((messages if isinstance(messages, str) else "asked", "drafter" in how, "watch" in how))
        programs.append(same)
        return generate(target, messages, **how)

    monkeypatch.setattr(talk.api, "generate", listening)
    talk.talk(Options(str(finished.workdir), tokens=4, prompt="ab"), console())
    assert calls == [
        ("ab", True, False),
        ("ab", False, False),
        ("asked", True, True),
        ("asked", False, False),
    ]
    assert programs[:2] == programs[2:]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"workdir": "."}, "--workdir: found no run in '.', expected a workdir"),
        ({"run": "ppow"}, "--run: found 'ppow', expected one of supervise, cst"),
        ({"shape": "bush"}, "--shape: found 'bush', expected chain:K"),
        ({"trace": "t.csv"}, "--trace: found 't.csv', expected a name that ends in .parquet or .jsonl"),
        ({"trace": "none/t.jsonl"}, "--trace: found no directory 'none'"),
        ({"html": "none/t.html"}, "--html: found no directory 'none'"),
        ({"svg": "none/t.svg"}, "--svg: found no directory 'none'"),
    ],
)
def test_mistakes_are_named_before_the_target_is_loaded(finished, changes, says):
    with pytest.raises(ConfigError, match=says):
        talk.check(Options(**{"workdir": str(finished.workdir)} | changes))


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ppow_jax.chat", f"--workdir={tmp_path}", "--prompt=x"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("ppow_jax: --workdir: found no run in ") and done.stderr.count("\n") == 1
