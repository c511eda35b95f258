"""A conversation as a picture of the terminal: an SVG that stands alone."""

import io
import re
from collections.abc import Iterable

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from ppow_jax.chat import screen
from ppow_jax.chat.exchange import Exchange

_COLUMNS = 100
_FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)  # its fonts lie elsewhere
_INK, _PAGE, _RED, _GREEN = (228, 230, 233), (21, 24, 28), (255, 154, 143), (127, 220, 157)
# Those of a dark report: the dim red of most terminals can hardly be read. The chat uses no other colours.
_THEME = TerminalTheme(_PAGE, _INK, [_PAGE, _RED, _GREEN, *[_INK] * 5])


def picture(exchanges: Iterable[Exchange]) -> str:
    """What a terminal of a hundred columns shows at the end, whatever this one is."""
    how = dict(width=_COLUMNS, force_terminal=True, color_system="standard", legacy_windows=False)
    console = Console(file=io.StringIO(), record=True, highlight=False, **how)  # type: ignore[arg-type]
    for exchange in exchanges:
        console.print(screen.question(exchange))
        console.print(Text.assemble(*(screen.line(text) for text in exchange.answer.texts), "\n"))
        console.print(screen.figures(exchange))
    return console.export_svg(title="ppow_jax.chat", theme=_THEME, code_format=_FORMAT)
