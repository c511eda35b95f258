"""Reports and answers as HTML, with all text escaped, no script, and nothing from elsewhere: pages that stand
alone (report.html), and fragments that a notebook shows below a cell."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ppow_jax.report import tables
from ppow_jax.report.tables import Report, Row

_LIGHT = """--ink: #1c1e21; --page: #ffffff; --faint: #6a7078; --line: #d4d8dd;
  --good: #0a6b2d; --good-page: #d9f2e0; --bad: #a3261b; --bad-page: #fbe3e0; --own: #1f5fbf;"""
_DARK = """--ink: #e4e6e9; --page: #15181c; --faint: #9aa2ac; --line: #363c44;
  --good: #7fdc9d; --good-page: #14391f; --bad: #ff9a8f; --bad-page: #43201c; --own: #8fbcff;"""
_PAPER = "background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;"
_PAGE_CSS = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem 1.2rem 3rem; max-width: 66rem; {_PAPER} }}
"""
_CSS = """
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h1, p, ul { overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
p, ul { margin: .4rem 0; max-width: 52rem; }
ul { padding-left: 1.2rem; }
.faint { color: var(--faint); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .2rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; }
tr.mean td { font-weight: 650; border-bottom: 2px solid var(--line); }
.above { color: var(--good); } .below { color: var(--bad); }
figure { margin: .8rem 0; } figcaption { color: var(--faint); font-size: .85rem; }
figure svg { max-width: 100%; height: auto; color: var(--ink); }
.sample { margin: .9rem 0; break-inside: avoid; }
.asked { font-weight: 600; margin: 1.6rem 0 .4rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.question { color: var(--faint); font-size: .85rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.9 ui-monospace, monospace; border-left: 3px solid var(--line); padding-left: .8rem; }
.kept { color: var(--good); background: var(--good-page); }
.refused { color: var(--bad); background: var(--bad-page); text-decoration: line-through; }
.dropped { color: var(--faint); text-decoration: line-through; font-size: .85em; }
.own { color: var(--own); text-decoration: underline; text-underline-offset: 3px; }
.seam { color: var(--faint); font-size: .7em; padding: 0 .15em; border-left: 2px solid var(--faint);
  margin-left: .2em; user-select: none; vertical-align: .25em; line-height: 1; }
"""
_PRINT_CSS = """
@media print {
  h2 { margin: .9rem 0 .3rem; break-after: avoid; }
  p, ul { margin: .2rem 0; max-width: none; } figure {
  margin: .3rem 0; } .sample { margin: .5rem 0; } .answer { line-height: 1.5; }
  :root { --ink: #000; --page: #fff; --faint: #555; --line: #ccc; --good: #0a6b2d; --good-page: #d9f2e0;
    --bad: #a3261b; --bad-page: #fbe3e0; --own: #1f5fbf; }
  @page { margin: 12mm; }
  html { font-size: 10.2px; }
  body { font-size: 1rem; line-height: 1.4; max-width: none; padding: 0; print-color-adjust: exact; }
  figure, tr { break-inside: avoid; } .wide { overflow: visible; }
  th, td { padding: .12rem .35rem; }
}
"""

_LEFT_OUT = ("tree 95% interval", "rounds", "decoded tau", "tokens/s", "autoregressive")  # report.md has them
_TEXT = ("drafter", "benchmark", "run", "objective", "start", "stage", "parameters")  # columns of words
FIGURES = ("differences", "training_curves", "acceptance_by_position")
LEGEND = (  # of an answer, as HTML
    'In every round the drafter proposes a window: <span class="kept">accepted tokens</span>, '
    'up to <span class="refused">the first refused one</span>; <span class="dropped">what was drafted '
    'behind that</span> is dropped, and <span class="own">the target\'s own token</span> stands instead. '
    'A bar <span class="seam">3</span> begins a round and says how many drafted tokens were accepted.'
)
_CAPTIONS = {
    "differences": "",
    "training_curves": "Held-out texts (solid) and as many training texts (dotted). A run that starts from "
    "another is drawn after it.",
    "acceptance_by_position": "Of the rounds that offered a draft at a position of the window, those that "
    "accepted it.",
}


def page(report: Report, windows: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """The whole page.

    Args:
      report: what stands in report.json.
      windows: `drafter`, whose windows these are, and `samples`, see `report.measure.samples`.
      figures: those of `FIGURES` as SVG elements; what is missing is left out.
    """
    target = report["target"]["path"]
    parts = [f"<h1>Acceptance report: {escape(target)}</h1>", *overview(report, figures)]
    parts += ["<h2>Windows</h2>", *_windows(windows)]
    parts += ["<h2>Runs</h2>", _table(tables.run_cells(report))]
    if report["stages"]:
        parts += ["<h2>Time and memory</h2>", _table(tables.stage_cells(report))]
    return document(f"Acceptance report: {target}", parts)


def overview(report: Report, figures: Mapping[str, str]) -> list[str]:
    """What was measured, as parts of a page; arguments as of `page`."""
    parts = _paragraphs(tables.introduction(report))
    if verdicts := tables.verdicts(report):
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in verdicts) + "</ul>")
    rows = [{c: v for c, v in row.items() if c not in _LEFT_OUT} for row in tables.cells(report)]
    parts += ["<h2>Benchmarks</h2>", _table(rows, _signs(report))]
    parts += _figure(figures, "differences")
    if report["runs"]:
        parts += ["<h2>Repetitions</h2>", *_paragraphs([tables.REPETITIONS])]
        parts.append(_table(tables.repetition_cells(report)))
    for name, title in (
        ("training_curves", "Acceptance during training"),
        ("acceptance_by_position", "Acceptance by position"),
    ):
        if name in figures:
            parts += [f"<h2>{title}</h2>", *_figure(figures, name)]
    return parts


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page of parts, which are HTML; the title is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_PAGE_CSS}{_CSS}{_PRINT_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def fragment(parts: Iterable[str]) -> str:
    """The same parts to stand within somebody else's page, whose look they neither take nor change.

    They are light on any page: what a notebook's colours are, its browser does not tell.
    """
    theirs = "table { color: inherit; } tr { background: none !important; }"  # what notebooks give tables
    look = f".ppow_jax {{ color-scheme: light; {_LIGHT} {_PAPER} padding: .6rem .8rem; {_CSS} {theirs} }}"
    return f'<div class="ppow_jax"><style>{look}</style>\n' + "\n".join(parts) + "\n</div>\n"


def _paragraphs(lines: Iterable[str]) -> list[str]:
    return [f"<p>{escape(line.replace('`', ''))}</p>" for line in lines]


def _figure(figures: Mapping[str, str], name: str) -> list[str]:
    if name not in figures:
        return []
    caption = f"<figcaption>{_CAPTIONS[name]}</figcaption>" if _CAPTIONS[name] else ""
    return [f"<figure>{figures[name]}{caption}</figure>"]


def _signs(report: Report) -> list[str]:
    """A class for the difference in each row of `tables.cells`: above or below the control, or neither."""
    found = []
    for drafter in report["drafters"].values():
        for result in (*drafter["benchmarks"].values(), drafter["mean"]):
            low, high = result["difference"]["ci95"] if "difference" in result else (0, 0)
            found.append("above" if low > 0 else "below" if high < 0 else "")
    return found


def _table(rows: Sequence[Row], signs: Sequence[str] = ()) -> str:
    """Rows of text; `signs` has a class for the column `difference` of each."""
    headings = "".join(f"<th{_class(text=c in _TEXT)}>{escape(c)}</th>" for c in rows[0])
    lines = []
    for row, sign in zip(rows, signs or [""] * len(rows), strict=True):
        cells = "".join(
            f"<td{_class(sign if column == 'difference' else '', text=column in _TEXT)}>{escape(value)}</td>"
            for column, value in row.items()
        )
        lines.append(f"<tr{_class(mean=row.get('benchmark') == 'mean')}>{cells}</tr>")
    body = "\n".join(lines)
    head = f"<thead><tr>{headings}</tr></thead>"
    return f'<div class="wide"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'


def _class(*names: str, **if_true: bool) -> str:
    """The attribute `class`, or nothing."""
    every = [*filter(None, names), *(name for name, there in if_true.items() if there)]
    return f' class="{" ".join(every)}"' if every else ""


def _windows(windows: Mapping[str, Any]) -> list[str]:
    """Answers with the windows that were drafted on the way."""
    parts = [f"<p>Decoding with {escape(windows['drafter'])}, a chain at temperature 0. {LEGEND}</p>"]
    for sample in windows["samples"]:
        question = " ".join(sample["question"].split())
        cut = question[:200] + " …" if len(question) > 200 else question
        more = " …" if sample["cut"] else ""
        passes, emitted = len(sample["rounds"]), sum(r["count"] + bool(r["own"]) for r in sample["rounds"])
        parts.append(
            f'<div class="sample"><div class="question">{escape(sample["benchmark"])} · '
            f"{escape(cut)} · {emitted} tokens in {passes} rounds</div>\n"
            f"{answer(sample['first'], sample['rounds'], more)}</div>"
        )
    return parts


def answer(first: str, rounds: Iterable[Mapping[str, Any]], more: str = "") -> str:
    """An answer as HTML: its first token's text, its rounds as `report.samples` has them, what ends it."""
    return f'<div class="answer">{_visible(first)}{"".join(map(_round, rounds))}{more}</div>'


def figures(lines: Iterable[str]) -> str:
    """The figures below an answer."""
    return '<ul class="faint">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _round(of: Mapping[str, Any]) -> str:
    spans = "".join(
        f'<span class="{name}">{_visible(of[key], breaks)}</span>'
        for name, key, breaks in (
            ("kept", "accepted", True),
            ("refused", "refused", False),
            ("dropped", "dropped", False),
            ("own", "own", True),
        )
        if of[key]
    )
    return f'<span class="seam">{of["count"]}</span>{spans}'


def _visible(text: str, breaks: bool = True) -> str:
    """Escaped text whose line breaks can be seen; without `breaks` they do not break the line."""
    return escape(text).replace("\n", "⏎\n" if breaks else "⏎")
