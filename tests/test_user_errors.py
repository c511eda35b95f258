"""What is said of a stranger's files is one line, whatever stands in them."""

import pytest

from ppow_jax.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("é 中 \U0001f600: 'x'", "é 中 \U0001f600: 'x'"),
        ("a\nb\r\x85c\u2028d", "a\\nb\\r\\x85c\\u2028d"),
        ("\x1b[31mred\0\x7f", "\\x1b[31mred\\x00\\x7f"),
        ("half \ud800", "half \\ud800"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_a_message_is_one_line(message, line):
    assert str(UserError(message)) == str(ConfigError(message)) == line


def test_of_a_long_message_both_ends_are_kept():
    said = str(UserError("begins" + "x" * 10**6 + "ends"))
    assert len(said) < 700 and said.startswith("beginsx") and said.endswith("xends") and " ... " in said
    assert str(UserError("x" * 690)) == "x" * 690
