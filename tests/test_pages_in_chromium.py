"""The chat's page and the report in headless Chromium: what a reader sees, whatever a model writes."""

import html.parser
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest
import reports

from ppow_jax.api import Answer, Round
from ppow_jax.chat import page as chat
from ppow_jax.chat.exchange import Exchange
from ppow_jax.report import html as report
from ppow_jax.report import plots

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]
LOOKS = {"light": (1100, 1), "dark": (1100, 0), "narrow": (500, 1)}  # width, Chromium's number of a scheme
SCRIPT = "<script>console.error('ran');document.title='ran'</script>"
EVIL = f"{SCRIPT}<img src=x onerror=\"console.error('ran')\"></span></div>"
EVIL += "\U0001f469\u200d\U0001f52c שלום مرحبا &amp;"
PARTS = {"kept": "accepted", "refused": "refused", "dropped": "dropped", "own": "own"}
TEXT = {part: f"{part} {EVIL} " for part in PARTS.values()} | {"count": 1, "drafted": 3}
PROBE = """<script>
const rgb = (e, name) => getComputedStyle(e)[name].match(/[\\d.]+/g).map(Number);
const seen = Object.fromEntries([...document.querySelectorAll('.answer span, .faint, .question, td, th')].map(
  e => [e.className || e.tagName, {ink: rgb(e, 'color'), page: rgb(e, 'backgroundColor'),
        line: getComputedStyle(e).textDecorationLine}]));
document.body.dataset.probe = JSON.stringify({seen, page: rgb(document.body, 'backgroundColor'),
  wide: document.documentElement.scrollWidth - innerWidth, scripts: document.scripts.length});
</script></body>"""


class Reader(html.parser.HTMLParser):
    """Keeps what the probe found, the title, and the text of every span by its class."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.open, self.title, self.spans = [], "", {}
        self.feed(dom)

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        if tag == "body":
            self.probe = json.loads(about["data-probe"])
        if tag in ("span", "title"):
            self.open.append(about.get("class", tag))

    def handle_endtag(self, tag):
        if tag in ("span", "title"):
            self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] == ["title"]:
            self.title += data
        elif self.open:
            self.spans.setdefault(self.open[-1], []).append(data)


def opened(text: str, directory: pathlib.Path, look: str) -> tuple[Reader, list[str], pathlib.Path]:
    """What a page has become, the messages on its console, and a picture of it."""
    width, scheme = LOOKS[look]
    directory.mkdir(exist_ok=True)
    file, picture = directory / "page.html", directory / f"{look}.png"
    file.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    how = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    how += [
        f"--user-data-dir={directory}/profile",
        f"--window-size={width},1200",
        f"--blink-settings=preferredColorScheme={scheme}",
    ]
    env = os.environ | {"HOME": str(directory)}
    command = [BROWSER, *how, "--dump-dom", f"--screenshot={picture}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Reader(done.stdout), console, picture


def chat_page() -> str:
    rounds = [Round([], 0, [5]), Round([6, 9], 1, [7])]
    answer = Answer("ab", [5, 6, 7], True, rounds, [TEXT, TEXT, TEXT], 0.5, 2.0)
    return chat.page(EVIL, [Exchange(EVIL, answer, None, "chain:2", True)])


def report_page() -> str:
    made = reports.report("supervise", target={"path": EVIL, "fingerprint": "", "dtype": "float32"})
    rounds = [TEXT, TEXT]
    figures = {name: plots.svg(figure, name) for name, figure in plots.figures(made, []).items()}
    return report.page(made, reports.windows(1, rounds=rounds, question=EVIL, first=EVIL), figures)


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG's ratio of two colours."""

    def light(colour: list[float]) -> float:
        parts = [c / 255 for c in colour[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("make", "look"), itertools.product((chat_page, report_page), LOOKS))
def test_a_page_shows_all_text_and_runs_none(make, look, tmp_path):
    found, console, picture = opened(make(), tmp_path, look)
    assert not console and found.title.endswith(EVIL)
    assert found.probe["scripts"] == 1  # the probe
    for name, part in PARTS.items():
        assert [text for text in found.spans[name] if text == TEXT[part]] == [TEXT[part]] * 2
    seen, page = found.probe["seen"], found.probe["page"]
    lines = {name: about["line"] for name, about in seen.items() if name in PARTS}
    struck = "line-through"
    assert lines == {"kept": "none", "refused": struck, "dropped": struck, "own": "underline"}
    assert (sum(page[:3]) > 600) == (look != "dark")
    for name, about in seen.items():
        behind = about["page"] if about["page"][3:] != [0] else page
        assert contrast(about["ink"], behind) >= 4.5, name
    assert found.probe["wide"] <= 0  # nothing stands beyond the window
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_a_script_that_runs_is_seen(tmp_path):
    made = chat_page().replace("<h1>", SCRIPT + "<h1>")
    found, console, _ = opened(made, tmp_path, "light")
    assert found.title == "ran" and found.probe["scripts"] == 2
    assert any(re.search(r"\"ran\"", line) for line in console)
