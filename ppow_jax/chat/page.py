"""A conversation as a page that stands alone, with all text escaped."""

from collections.abc import Iterable
from html import escape

from ppow_jax.chat.exchange import Exchange
from ppow_jax.report import html


def page(target: str, exchanges: Iterable[Exchange]) -> str:
    """The page; `target` names who answers."""
    parts = [f"<h1>{escape(target)}</h1>", f"<p>{html.LEGEND}</p>"]
    for exchange in exchanges:
        first, *rounds = exchange.answer.texts
        parts.append(
            f'<div class="sample"><div class="asked">{escape(exchange.question)}</div>\n'
            f"{html.answer(first['own'], rounds)}\n{html.figures(exchange.figures())}</div>"
        )
    return html.document(target, parts)
