"""The page: well formed, alone, escaped, and with everything in it."""

import html.parser
import re

import pytest
import reports

from ppow_jax.report import html as report_html
from ppow_jax.report import plots

VOID = {"meta", "br", "img", "link", "hr"}


class Reader(html.parser.HTMLParser):
    """Checks that elements close in order; keeps all tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


ROWS = [
    {"stage": s, "step": n, "seconds": n, "loss": 1.0, "reward": n, "holdout_tau": n, "holdout_sampled": 1}
    for s in ("supervise", "ppow")
    for n in (1, 2)
]


@pytest.fixture(scope="module")
def page() -> str:
    made = reports.report("supervise")
    figures = {name: plots.svg(figure, name) for name, figure in plots.figures(made, ROWS).items()}
    return report_html.page(made, reports.windows(), figures)


def test_it_is_well_formed_and_holds_everything(page):
    found = read(page)
    assert page.startswith("<!DOCTYPE html>") and found.tags.count("h1") == 1
    assert found.tags.count("svg") == 3
    assert found.tags.count("table") == 2
    text = " ".join(found.text)
    for name in ("supervise", "ppow", "chat", "maths", "mean", "markov:0", "0123456789ab"):
        assert name in text
    assert "+0.125 [+0.025, +0.250]" in text
    assert page.count('class="sample"') == 5
    assert page.count('<td class="above">') == 2  # chat and the mean; maths cannot be told apart
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    for name, value in found.attributes:
        if name.endswith("href"):
            assert value.removeprefix("#") in ids


def test_it_asks_for_nothing_from_elsewhere(page):
    found = read(page)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(found.tags)
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not links
    assert not re.search(r"@import|url\((?!#)", page)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]


def test_it_has_the_readers_colours(page):
    assert "prefers-color-scheme: dark" in page and "currentColor" in page
    assert plots._INK not in page


def test_whatever_a_model_writes_is_escaped():
    evil = "<script>alert('&amp;')</script>\"></div>"
    rounds = [{"drafted": 3, "count": 1, "accepted": evil, "refused": evil, "dropped": evil, "own": evil}]
    windows = reports.windows(1, rounds=rounds, first=evil, question=evil, benchmark=evil)
    made = reports.report(target={"path": evil, "fingerprint": "", "dtype": "float32"})
    made["drafters"][evil] = made["drafters"].pop("ppow")
    windows["drafter"] = evil
    page = report_html.page(made, windows, {})
    found = read(page)
    assert "script" not in found.tags
    text = "".join(found.text)
    # the target twice, the drafter's table, rows and windows, and seven times in the sample
    assert text.count(evil) == 3 + 3 + 1 + 1 + 7


def spans(page: str) -> list[tuple[str, str]]:
    answer = page[page.index('<div class="answer">') :]
    return re.findall(r'<span class="(\w+)">([^<]*)</span>', answer[: answer.index("</div>")])


def test_windows_show_each_round():
    page = report_html.page(reports.report(), reports.windows(1), {})
    assert spans(page) == [
        ("seam", "1"), ("kept", "one"), ("refused", " two"), ("dropped", " three"), ("own", " 2"),
        ("seam", "2"), ("kept", " four five"),
    ]  # fmt: skip
    assert '<div class="answer">So<span' in page and " …</div>" in page
    assert "why not? · 4 tokens in 2 rounds" in page
    whole = report_html.page(reports.report(), reports.windows(1, cut=False), {})
    assert " …</div>" not in whole


def test_line_breaks_are_seen_and_those_refused_break_no_line():
    rounds = [{"drafted": 3, "count": 1, "accepted": "a\n", "refused": "b\n", "dropped": "\n", "own": "\n"}]
    page = report_html.page(reports.report(), reports.windows(1, rounds=rounds), {})
    assert spans(page) == [
        ("seam", "1"),
        ("kept", "a⏎\n"),
        ("refused", "b⏎"),
        ("dropped", "⏎"),
        ("own", "⏎\n"),
    ]


def test_sections_that_there_is_nothing_for_are_left_out(page):
    bare = report_html.page(reports.report(), reports.windows(), {})
    read(bare)
    assert "<svg" not in bare and "Repetitions" not in bare and "Time and memory" not in bare
    assert "Acceptance during training" in page and "Acceptance during training" not in bare
