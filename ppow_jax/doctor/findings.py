"""What a check finds, and how it is shown."""

from collections.abc import Mapping
from typing import NamedTuple

WRONG, NOTE, NOT_CHECKED, FINE = "wrong", "note", "not checked", "fine"
_ORDER = (WRONG, NOTE, NOT_CHECKED, FINE)


class Finding(NamedTuple):
    """What one check found.

    Attributes:
      verdict: `WRONG`, `NOTE` (worth a look), `NOT_CHECKED` or `FINE`.
      found: what was found and what was expected; or why it could not be checked. One line.
      remedy: what to do, one line; empty: nothing.
    """

    verdict: str
    found: str
    remedy: str = ""


def shown(findings: Mapping[str, Finding]) -> str:
    """The findings by check as lines of text, the most severe first, and how many there are of each kind."""
    lines, wide = [], max(map(len, _ORDER))
    by_severity = sorted(findings.items(), key=lambda item: _ORDER.index(item[1].verdict))
    for check, finding in by_severity:
        lines.append(f"{finding.verdict:{wide}}  {check}: {finding.found}")
        if finding.remedy:
            lines.append(f"{'':{wide}}  -> {finding.remedy}")
    verdicts = [finding.verdict for finding in findings.values()]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in _ORDER)
    return "\n".join([*lines, "", counts])


def status(findings: Mapping[str, Finding]) -> int:
    """The exit status: 1 if something is wrong, else 0."""
    return int(any(finding.verdict == WRONG for finding in findings.values()))
