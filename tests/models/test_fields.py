"""Keys of JSON files: types, limits, and what nobody has asked for."""

import math

import pytest

from ppow_jax.errors import UserError
from ppow_jax.models import fields
from ppow_jax.models.fields import Fields


def of(**values) -> Fields:
    return Fields(values, "m/config.json", of="a llama model")


def refused(ask, *said: str) -> None:
    with pytest.raises(UserError) as e:
        ask()
    assert "\n" not in str(e.value) and str(e.value).startswith("m/config.json: found ")
    for words in said:
        assert words in str(e.value), str(e.value)


@pytest.mark.parametrize(
    "value", ["4", [4], {"a": 4}, True, 4.0, 4.5, -1, 0, 2**31, 10**400, math.nan, math.inf]
)
def test_what_is_no_whole_number(value):
    refused(lambda: of(layers=value).whole("layers"), "layers ", "a whole number from 1 to 2147483647")


@pytest.mark.parametrize("value", ["4", [4], {}, True, -1, 0, 10**400, math.nan, math.inf, -math.inf])
def test_what_is_no_number(value):
    refused(lambda: of(eps=value).number("eps"), "eps ", "a number above 0")


def test_limits_and_what_is_missing():
    assert of(n=7).whole("n", least=7, most=7) == 7 and of(n=0).whole("n", least=0) == 0
    assert of().whole("n", 3) == 3 and of(n=None).whole("n", 3) == 3 and of(n=None).whole("n", None) is None
    refused(lambda: of(n=8).whole("n", most=7), "n 8, expected a whole number from 1 to 7")
    refused(lambda: of().whole("n"), "no 'n', which a llama model has; add it")
    refused(lambda: of(n=None).whole("n"), "no 'n'")
    found = of(x=2).number("x")
    assert found == 2.0 and isinstance(found, float)
    assert of(x=0).number("x", zero=True) == 0 and of().number("x", None) is None
    refused(lambda: of(x=1.0).number("x", above=1), "x 1.0, expected a number above 1")
    refused(lambda: of(x=-0.5).number("x", zero=True), "x -0.5, expected a number above 0 or 0")


@pytest.mark.parametrize("value", [1, 0, "true", [], {}])
def test_what_is_neither_true_nor_false(value):
    refused(lambda: of(on=value).flag("on"), "on ", "true or false")
    assert of(on=True).flag("on") and not of(on=None).flag("on") and of().flag("on", True)


def test_texts_and_lists():
    assert of(a="x").text("a", choices=("x", "y")) == "x" and of().text("a", None) is None
    refused(lambda: of(a="z").text("a", choices=("x", "y")), "a 'z', expected one of x, y")
    refused(lambda: of(a=["x"]).text("a", choices={"x": 1}), "a ['x']")
    assert of(a=[1, 2]).listed("a", int) == (1, 2) and of(a=[1, 2.5]).listed("a", float) == (1.0, 2.5)
    assert of(a=["x"]).listed("a", str, 1) == ("x",) and of().listed("a", str, default=()) == ()
    for value in ("12", 12, {"a": 1}, [1, "2"], [1, True], [1, 2.0], [1, 2**31], [[1]]):
        refused(lambda v=value: of(a=v).listed("a", int), "a list of whole numbers")
    for value in ([1.0, math.nan], [1.0, 0.0], [1.0, "2"], [1.0]):
        refused(lambda v=value: of(a=v).listed("a", float, 2), "a list of 2 numbers above 0")
    refused(
        lambda: of(a=[*range(999), "x"]).listed("a", int),
        "a with 'x' in it, expected a list of whole numbers",
    )


def test_groups_name_their_keys_in_full():
    inner = of(a={"b": {"c": "4"}}).part("a").part("b")
    refused(lambda: inner.whole("c"), "a.b.c '4'")
    refused(lambda: inner.whole("d"), "no 'a.b.d'")
    assert of().group("a") is None and of(a={}).group("a").values == {}
    for value in ("linear", ["linear"], 4, True):
        refused(lambda v=value: of(a=v).group("a"), "a ", "a group of keys")
    with pytest.raises(UserError, match=r"config.json: found \[1, 2\], expected an object"):
        Fields([1, 2], "config.json")


def test_one_value_alone():
    for value, good, bad in (
        (False, (False,), (True, 0, "x")),
        (1.0, (1, 1.0), (True, 0.5, "1")),
        (None, (), (0, 3)),
    ):
        of().only("a", value), of(a=None).only("a", value)
        for v in good:
            of(a=v).only("a", value)
        for v in bad:
            refused(lambda v=v, value=value: of(a=v).only("a", value), "a ", "nothing else is supported")


def test_keys_that_nobody_asked_for():
    c = of(asked=1, name="x", null=None, off=False, zero=0, none=0.0, text="", empty=[], group={}, experts=8)
    c.whole("asked")
    refused(lambda: c.rest({"name"}.__contains__), "experts 8", "not known here", "remove it")
    c.whole("experts")
    c.rest({"name"}.__contains__)
    refused(lambda: c.rest(lambda key: False), "name 'x'")
    refused(lambda: of(a={"b": 1}).part("a").rest(lambda key: False), "a.b 1")


def test_files_that_hold_no_object(tmp_path):
    file = tmp_path / "config.json"
    for content in (b"", b"{", b"[1]", b"3", b"null", b'"x"', b"\xff\xfe{}", b"[" * 100_000, b"{'a': 1}"):
        file.write_bytes(content)
        with pytest.raises(UserError) as e:
            fields.read(file, "the config.json of a model")
        assert str(e.value).startswith(str(file)) and "\n" not in str(e.value) and len(str(e.value)) < 400
    for content in (b'{"a": 1}', b'\xef\xbb\xbf{"a": 1}'):
        file.write_bytes(content)
        assert fields.read(file, "it").whole("a") == 1
    with pytest.raises(UserError, match=r"no readable JSON file.*expected a drafter's"):
        fields.read(tmp_path / "none.json", "a drafter's")
