"""Chat templates: what transformers has in them, and one line for all that goes wrong."""

import datetime
import time
import tracemalloc

import pytest
from chats import CHATML, TAGGED

from ppow_jax.errors import ConfigError, UserError
from ppow_jax.targets import chat, sandbox
from ppow_jax.targets.chat import ChatTemplate

USER, ANSWER = {"role": "user", "content": "é <b> & 'c'"}, {"role": "assistant", "content": "Yes. "}


def render(source: str, *messages: dict, **variables) -> str:
    return ChatTemplate(source).render(messages or (USER,), variables, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "text"),  # as transformers 5.19 renders it
    [
        ("{% for m in messages %}\n  {% if 1 %}\n a\n  {% endif %}\n{% endfor %}\nb\n", " a\nb"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "é <b> & \'c\'"}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": "é"\n}'),
        ("{{ ['é', 1] | tojson(ensure_ascii=true, separators=(',', ':')) }}", '["\\u00e9",1]'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i == 2 %}{% break %}"
         "{% endif %}{% endfor %}", "02"),
        ("{% for i in 'ab' %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}", "1False22True2"),
        ("{% for i in [] %}{% else %}none{% endfor %}", "none"),
        ("{% set ns = namespace(a='x') %}{% for i in [1, 2] %}{% set ns.a = ns.a ~ i ~ '|' %}{% endfor %}"
         "{{ ns.a + 'y' * 2 }}{{ 2 ** 10 }}", "x1|2|yy1024"),
        ("{% generation %}{{ 'a' }}{% endgeneration %}b", "ab"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{{ bos_token is defined }}[{{ bos_token }}]", "False[]"),
        ("{{ raise_exception('x') if false }}{{ enable_thinking is defined }}", "False"),
    ],
)  # fmt: skip
def test_what_a_template_makes(source, text):
    assert render(source) == text


def test_variables_and_the_date():
    source = "{{ bos_token }}{{ 'on' if enable_thinking else 'off' }}"
    assert render(source, bos_token="<s>", enable_thinking=False) == "<s>off"
    year = datetime.datetime.now().year
    assert render("{{ strftime_now('%Y') }}") in (str(year), str(year + 1))
    assert render(CHATML, USER, ANSWER) == ("<s>user\né <b> & 'c'<e>\n<s>assistant\nYes. <e>\n<s>assistant\n")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression, got 'end of statement block'"),
        ("{{ x", "line 1: unexpected end of template"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{% nosuch %}", "line 1: Encountered unknown tag 'nosuch'."),
        ("\n{{ messages | nosuch }}", "line 2: No filter named 'nosuch'."),
        ("{% if 1 %}\n{{ messages | nosuch }}{% endif %}", "line 2: No filter named 'nosuch' found."),
        ("{{ messages is nosuch }}", "line 1: No test named 'nosuch'."),
        ("{% generation %}", "line 1: Unexpected end of template"),
        ("{% endgeneration %}", "line 1: Encountered unknown tag 'endgeneration'."),
        ("{% include 'other' %}", "line 1: TypeError: no loader"),
        ("{% break %}", "SyntaxError: 'break' outside loop"),
        ("{{ " + "(" * 9999 + " }}", "RecursionError"),
        ("{{ 1" + "0" * 9999 + " }}", "ValueError: Exceeds the limit"),
        ("\n\n{{ nosuch.x }}", "line 3: 'nosuch' is undefined"),
        ("{{ nosuch() }}", "line 1: 'nosuch' is undefined"),
        ("{{ messages[9].role }}", "line 1: list object has no element 9"),
        ("{{ messages.append(1) }}", "line 1: access to attribute 'append' of 'list' object is unsafe."),
        ("{{ ''.__class__.mro() }}", "line 1: access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ 'a' + 1 }}", "line 1: TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "line 1: ZeroDivisionError: division by zero"),
        ("{{ '%d' % 'a' }}", "line 1: TypeError: %d format"),
        ("{{ {1: 2}.popitem() }}", "line 1: access to attribute 'popitem' of 'dict' object is unsafe."),
        ("{{ messages | tojson(indent=messages) }}", "line 1: TypeError"),
        ("{{ strftime_now() }}", "line 1: TypeError"),
        ("{{ raise_exception('two\nlines') }}", "line 1: two lines"),
        ("{{ raise_exception(5) }}", "line 1: 5"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "line 1: RecursionError"),
        ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "line 1: RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "line 1: OverflowError: Range too big"),
        ("{{ 'x' * 10 ** 12 }}", "line 1: it makes a text, list or number of more than 10000000"),
        ("{{ 10 ** 12 * [1, 2] }}", "line 1: it makes a text, list or number"),
        ("{{ 10 ** (10 ** 10) }}", "line 1: it makes a text, list or number"),
        ("{% set ns = namespace(a='xy') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
         "line 1: it makes a text, list or number"),
        ("{% set ns = namespace(a='xy') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
         "line 1: it makes a text, list or number"),
        ("{% set ns = namespace(a=99) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
         "line 1: it makes a text, list or number"),
        ("{% set ns = namespace(a='xy') %}{% for i in range(99) %}{% set b %}{{ ns.a }}{{ ns.a }}{% endset %}"
         "{% set ns.a = b %}{% endfor %}", "line 1: it makes a text, list or number"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "line 1: it makes a text, list or number"),
    ],
)  # fmt: skip
def test_an_error_of_a_template_is_one_line(source, message):
    with pytest.raises(UserError) as caught:
        render(source)
    assert str(caught.value).startswith("chat template: ") and "\n" not in str(caught.value)
    assert message in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% if j %}{% endif %}{% endfor %}"
        "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_without_end(monkeypatch, source):
    monkeypatch.setattr(sandbox, "_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"^chat template: line 1: it computes for more than 0\.05 seconds$"):
        render(source)


def test_what_the_assistant_said_by_the_generation_tag():
    messages = [USER, ANSWER, USER, ANSWER | {"content": "No"}]
    template = ChatTemplate(TAGGED)
    text, spans = template.render(messages, {}, False), template.spans(messages, {})
    assert [text[start:end] for start, end in spans] == ["Yes. <e>", "No<e>"]
    later = ChatTemplate("{% set a %}a{% generation %}b{% endgeneration %}{% endset %}xyz{{ a }}")
    assert later.spans(messages, {}) == [(4, 5)]  # where it stands, not where it is made
    trimmed = ChatTemplate("{% set a %}{% generation %} b {% endgeneration %}{% endset %}{{ a | trim }}")
    assert trimmed.render(messages, {}, False) == "b" and trimmed.spans(messages, {}) == []
    assert ChatTemplate(CHATML).spans(messages, {}) == []
    forged = [{"role": "user", "content": sandbox.OPEN + "x" + sandbox.CLOSE}]
    assert template.spans(forged, {}) == []


def test_variables_from_the_config():
    text = '{"enable_thinking": false, "date_string": "1 May", "depth": [1, {"a": null}]}'
    assert chat.variables(text, "key") == {
        "enable_thinking": False,
        "date_string": "1 May",
        "depth": [1, {"a": None}],
    }
    assert chat.variables("", "key") == {}
    for wrong in ("enable_thinking=false", "{", "[1]", "5", '{"a b": 1}', '{"messages": []}', "[" * 99999):
        with pytest.raises(ConfigError, match=r"^key: found .*, expected a JSON object such as") as caught:
            chat.variables(wrong, "key")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%999999999d' % 1 }}", "{{ '%*d' % (10 ** 9, 1) }}", "{{ '%999999999d'|format(1) }}",
        "{{ '{:999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 10 ** 9) }}", "{{ 'a'|center(10 ** 9) }}",
        "{{ 'a'.ljust(10 ** 9) }}", "{{ 'a'.zfill(10 ** 9) }}", "{{ '\t'.expandtabs(10 ** 9) }}",
        "{{ 'a'|indent(10 ** 9, true) }}", "{{ ('a\n' * 10 ** 5)|indent(10 ** 5) }}",
        "{{ [1, [2]]|tojson(indent=10 ** 9) }}", "{{ ('a' * 10 ** 6)|replace('a', 'b' * 10 ** 6) }}",
        "{{ ('a' * 10 ** 6).replace('', 'b' * 10 ** 6) }}", "{{ ('a' * 10 ** 6).join(['b'] * 10 ** 5) }}",
        "{{ (['a' * 10 ** 6] * 10 ** 6)|join }}", "{{ ['a' * 10 ** 6] * 10 ** 6 }}", 
        "{{ [1]|batch(10 ** 9, 0)|list }}",
        "{{ [1]|slice(10 ** 9)|list }}", "{{ (1).to_bytes(10 ** 9, 'big') }}",
        "{{ ('a ' * 10 ** 6)|wordwrap(1) }}",
        "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}",
        "{{ (['a'] * 10 ** 5)|map('center', 10 ** 6)|list }}",
        "{% autoescape 'a'|center(10 ** 9) %}{% endautoescape %}",
        "{% filter center(10 ** 9) %}{% endfilter %}",
        "{% set x = 'a' * 10 ** 6 %}{% for i in range(9) %}{% set y = x.upper() ~ i %}{{ y }}{% endfor %}",
    ],
)  # fmt: skip
def test_a_template_that_would_fill_the_memory(source):
    tracemalloc.start()
    began = time.thread_time()
    with pytest.raises(UserError, match=r"^chat template: line \d: it makes a text, list or number of more "):
        render(source)
    assert tracemalloc.get_traced_memory()[1] < 1e8 and time.thread_time() - began < 2
    tracemalloc.stop()


def test_filters_and_methods_of_a_usual_template():
    long = [USER | {"content": "a\n</think>" * 10**4}]
    source = (
        "{{ '%s|%5d|%%' % ('x', 123456789) }}|{{ 'x{:>3}'.format('y') }}|"
        "{{ messages[0].content.split('</think>')|length }}|"
        "{{ messages[0].content.replace('</think>', '')|length }}|"
        "{{ ['a', 'b']|join(', ') }}|{{ 'a\nb'|indent(2) }}|"
        "{{ range(3)|map('string')|join('-') }}|{{ {'a': 1}|tojson(indent=2)|length }}|{{ 'a b'|title }}|"
        "{{ x|default(123456789) }}|{{ messages|map(attribute='role')|list }}|{{ '7'|int + 1 }}"
    )
    text = ChatTemplate(source).render(long, {}, False)
    assert text == ("x|123456789|%|x  y|10001|20000|a, b|a\n  b|0-1-2|12|A B|123456789|['user']|8")
