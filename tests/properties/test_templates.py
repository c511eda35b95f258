"""Chat templates that strangers make: each renders, or is refused in one line."""

import re

import strange
from chats import CHATML, NO_SYSTEM, TAGGED, THINKING, tokenizer
from dice import Dice

from ppow_jax.data.conversations import Conversation
from ppow_jax.data.prompt import Prompt
from ppow_jax.targets import sandbox
from ppow_jax.targets.tokenizer import Tokenizer, with_stops

PARTS = [
    *["{{", "}}", "{%", "%}", "{#", "#}", "-%}", "{{-", "(", ")", "[", "]", ",", ".", ":", "+", "*", "**",
    "~", "%", "//", "/", "-", "==", "<", "in", "not", "is", "and", "or", "if", "else"],
    "{% for m in messages %}", "{% for i in range(9) recursive %}", "{% endfor %}", "{% if x %}",
    "{% else %}",
    "{% endif %}", "{% set x = ", "{% set x %}", "{% endset %}", "{% macro f(a, b=1) %}", "{% endmacro %}",
    "{% break %}",
    "{% continue %}", "{% generation %}", "{% endgeneration %}", "{% filter upper %}", "{% endfilter %}",
    "{% raw %}",
    "{% call f() %}", "{% endcall %}", "{% include 'a' %}", "{% import '/etc/hostname' as x %}",
    "{% extends x %}",
    "{% block a %}", "{% endblock %}", "{% with %}", "{% do x %}", "{% trans %}", "{% autoescape true %}",
    "{{ m.content }}", "{{ m }}", "{{ messages }}", "{{ messages[0]['content'] }}", "{{ x }}", "{{ self }}",
    "{{ f() }}",
    "{{ loop.index }}", "{{ loop(messages) }}", "{{ cycler }}", "{{ namespace(a=1) }}", "{{ lipsum(9) }}",
    "{{ raise_exception('no\nmore') }}", "{{ raise_exception() }}", "{{ strftime_now('%Y %\ud800') }}",
    "{{ strftime_now(1) }}", "{{ messages|tojson(indent=4) }}", "{{ x|tojson }}", "{{ messages.append(1) }}",
    "{{ ().__class__.__mro__ }}", "{{ x.__init__.__globals__ }}", "{{ ''.join }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ 'a' * 10 ** 9 }}", "{{ 9 ** 9 ** 9 }}", "{{ range(10 ** 9)|list }}",
    "{{ ([0] * 10 ** 4)|batch(2)|list }}",
    "{{ 'a'|center(10 ** 9) }}", "{{ '%999999999d' % 1 }}", "{{ '{:999999999}'.format(1) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a'.zfill(10 ** 9) }}", "{{ 'ab'.replace('', 'a' * 10 ** 6) }}", "{{ ('a' * 10 ** 4)|wordwrap(1) }}",
    "{{ 'a'|indent(10 ** 8) }}", "{{ ('a\n' * 10 ** 5)|indent(10 ** 5) }}", "{{ 1 / 0 }}",
    "{{ 'a'|int(base=99) }}",
    "{{ 'a' | unknown }}", "{{ x is unknown }}", "{{ 10 ** 5000 }}", "{{ (10 ** 5000)|string }}",
    "{{ 1e999|int }}",
    "{{ messages|map(attribute='content')|join }}", "{{ messages|groupby('role') }}", "{{ messages|sort }}",
    "{{ messages|sum }}", "{{ 'x' in messages }}", "{{ [1, 'a']|sort }}", "{{ [1, 2]|slice(10 ** 9)|list }}",
    "{{ 'a'.encode('x') }}", "{{ 'a'|urlize }}", "{{ 'a'|xmlattr }}", "{{ {}|xmlattr }}",
    "{{ 1|round(400) }}",
    "{{ 'a'.join(['b'] * 10 ** 9) }}", "{{ ['a' * 10 ** 6] * 10 ** 6 }}", "{{ 'a'.expandtabs(10 ** 9) }}",
    "{{ '\t'.expandtabs(10 ** 9) }}", "{{ 'a'|truncate(-5) }}", "{{ 'a'|random }}", "{{ []|random }}",
    "{{ []|first }}",
    "<s>", "<e>", "\ud800", "\0", "\ufdd0", "\ufdd1", "\ufffe0\ufffe", "\n", "x" * 2000, "((((" * 100,
    "[" * 300,
    "{% if x %}" * 150, "{{ " + "-" * 3000 + "1 }}", "{{ x" + ".a" * 3000 + " }}",
    "{{ 1" + " + 1" * 3000 + " }}",
    "{{ x" + "|upper" * 1000 + " }}", "{{ " + "not " * 2000 + "x }}",
]  # fmt: skip
KINDS = (CHATML, THINKING, TAGGED, NO_SYSTEM)
PROMPT = Prompt("p", "", ("a", "b"), "Be brief.", ("c", "d"))


def template(dice: Dice) -> str:
    """One with some pieces in it, in place of others, or nothing but pieces."""
    text = dice.of((*KINDS, ""))
    for _ in range(dice.between(1, 4)):
        between = [0, *(match.end() for match in re.finditer(r"[%}]}", text))]
        at, size = dice.of(between), 0
        if dice.below(4) == 0:
            at, size = dice.between(0, len(text)), dice.of((0, 1, 5, 40))
        piece = dice.text(5) if dice.below(3) == 0 else dice.of(PARTS)
        text = text[:at] + piece + text[at + size :]
    return text


@strange.counts(3)
def test_templates(count, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_SECONDS", 0.1)
    place, core = strange.Place(tmp_path, {}), tokenizer().core

    def read(text: str) -> None:
        tokens = with_stops(Tokenizer(core, text, (258, 257), {"eos_token": "<eot>"}))
        conversation = Conversation(PROMPT)
        conversation.check(tokens)
        conversation.take(tokens, 10_000)

    read(CHATML)
    strange.examples(
        count,
        template,
        lambda made: place.hold([], lambda _: read(made), "chat template", "tokenizer:"),
    )
