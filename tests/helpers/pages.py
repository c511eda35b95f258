"""The documentation's blocks of code and its commands."""

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_COMMENTS = re.compile(r"(?:<!--((?:(?!-->).)*)-->\s*)*\Z", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      page: the file's path from the root.
      line: of its fence.
      language: what stands behind the fence.
      text: what it holds.
      comments: the HTML comments directly above it.
    """

    page: str
    line: int
    language: str
    text: str
    comments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def about(self, word: str) -> str | None:
        """What stands behind `word: ` in a comment above; None: there is no such comment."""
        found = [c.removeprefix(word)[1:].strip() for c in self.comments if c.split(":")[0] == word]
        return found[0] if found else None


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order; `text` stands for what it holds."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found = []
    for fence in _FENCE.finditer(text):
        above = _COMMENTS.search(text, 0, fence.start())
        comments = tuple(c.strip() for c in re.findall(r"<!--(.*?)-->", above[0], re.DOTALL))
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page, line, fence[3].strip(), fence[4], comments))
    return found


def prose(page: str) -> str:
    """A page without its blocks, whose lines are empty."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)


def spans(page: str) -> list[tuple[str, str]]:
    """Where code stands in the prose of a page, and what."""
    text = prose(page)
    return [
        (f"{page}:{text.count(chr(10), 0, found.start()) + 1}", " ".join(found[1].split()))
        for found in re.finditer(r"`([^`]+)`", text)
    ]


def commands(shell: str) -> list[list[str]]:
    """The words of each command, without comments, continuations and variables that are set before it."""
    found: list[list[str]] = []
    for line in shell.replace("\\\n", " ").splitlines():
        found.append([])
        for word in shlex.split(line, comments=True):
            if word in ("&&", "|", ";"):
                found.append([])
            elif found[-1] or not re.match(r"[A-Z_]+=", word):
                found[-1].append(word)
    return [words for words in found if words]


def own(words: list[str]) -> bool:
    """Whether a command is one of the package's."""
    return words[:2] == ["python", "-m"] and words[2].startswith("ppow_jax")
