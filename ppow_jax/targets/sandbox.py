"""jinja2's sandbox as chat templates know it from transformers, with an end to loops and to growth."""

import datetime
import functools
import json
import time
from collections.abc import Callable, Iterator, Sized
from typing import Any

import jinja2
from jinja2 import nodes, sandbox
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

from ppow_jax.targets.growth import LARGEST, made, weight

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # stand around what the assistant says, where that is asked for; no letters
_ROOM = 10 * LARGEST  # characters of all that filters and methods make
_OWN = 10**5  # characters of its own that a template may write
_SECONDS = 2.0  # of computation; a conversation takes milliseconds


class Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """The environment of `transformers.utils.chat_template_utils`.

    Blocks are trimmed; there are `raise_exception`, `strftime_now`, `break` and `continue`, a `tojson` that
    keeps all characters, and `{% generation %}` around what the assistant says. jinja2 itself limits `range`;
    here loops and calls end after some seconds, and texts, lists and numbers at some length. That holds while
    a template is compiled too, when jinja2 computes what is constant.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._shown)
        self.filters["tojson"] = _tojson
        self.filters = {name: self._watched(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]  # random words, as many as one likes
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        self.marking = self.has_generation = False
        self._end = self._left = 0.0
        self._room = self._longest = 0

    def compiled(self, source: str) -> jinja2.Template:
        """A template whose loops and joined texts are watched."""
        self.begin(False)
        return self.from_string(_Watched().visit(self.parse(source)))

    def begin(self, marking: bool, given: Any = ()) -> None:
        """Counts from now on, for what is given to a template.

        With `marking`, `OPEN` and `CLOSE` stand around what the assistant says.
        """
        self._end, self._left, self.marking = time.thread_time() + _SECONDS, _ROOM, marking
        self._longest = self._room = _OWN + 10 * weight(given)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template, and every turn of a loop."""
        self._in_time()
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps `format`
        if isinstance(owner := getattr(method, "__self__", None), str | bytes | int):
            self._spend(made(method.__name__, owner, (*args, *kwargs.values())))
        found = super().call(context, function, *args, **kwargs)
        self._left -= len(found) if isinstance(found, Sized) else 0
        return found

    def _in_time(self) -> None:
        if time.thread_time() > self._end:
            raise sandbox.SecurityError(f"it computes for more than {_SECONDS:g} seconds")

    def _spend(self, size: int) -> None:
        """Takes what is made next from the room for all of it."""
        self._left -= size
        _require(size if self._left > 0 else LARGEST + 1)

    def _watched(self, name: str, function: Callable) -> Callable:
        """A filter whose result is not too large."""
        at = int(hasattr(function, "jinja_pass_arg"))  # the context comes first

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._in_time()
            value = args[at] if len(args) > at else None
            if isinstance(value, Iterator):
                value = self._taken(value)
            self._spend(made(name, value, (*args[at + 1 :], *kwargs.values())))
            return function(*args[:at], value, *args[at + 1 :], **kwargs)

        return watched

    def _taken(self, values: Iterator) -> list:
        """The items of a generator."""
        found = []
        for value in values:
            self._in_time()
            self._spend(weight(value) + 1)
            found.append(value)
        return found

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%` where the result is not too large."""
        if operator == "%" and isinstance(left, str | bytes):
            self._spend(made("%", left, right if isinstance(right, tuple) else (right,)))
        _require(_grown(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def turn(self) -> None:
        """Is called at every turn of a loop."""

    def joined(self, *parts: Any) -> str:
        """`~`."""
        _require(sum(map(weight, parts)))
        return "".join(map(str, parts))

    def _shown(self, value: Any) -> Any:
        """Every `{{ value }}`."""
        self._room -= weight(value)
        _require(self._longest - self._room, self._longest)
        return value


class _Watched(NodeTransformer):
    """Calls methods of the environment in every loop and for every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        turn = nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        joined = nodes.EnvironmentAttribute("joined")
        return nodes.Call(joined, node.nodes, [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: the block as it is, marked if the environment says so."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)
    environment: Sandbox

    def parse(self, parser: Any) -> nodes.Node:
        """The tag's block as the body of a call."""
        self.environment.has_generation = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

    def _block(self, caller: Any) -> str:
        text = caller()
        return OPEN + text + CLOSE if self.environment.marking else text


def _grown(operator: str, left: Any, right: Any) -> int:
    """The size of a result."""
    if operator == "%":
        return 0
    if operator == "+":
        return _size(left) + _size(right)
    if isinstance(left, Sized) or isinstance(right, Sized):
        size, times = (_size(left), right) if isinstance(left, Sized) else (_size(right), left)
        return size * times if isinstance(times, int) else 0
    if operator == "**":
        return _size(left) * right if isinstance(right, int) else 0
    return _size(left) + _size(right)


def _size(value: Any) -> int:
    """Of a text, a list, or a number, whose bits count a hundred times: to multiply them takes long."""
    if isinstance(value, Sized):
        return len(value)
    return 100 * value.bit_length() if isinstance(value, int) else 0


def _require(size: int, most: int = LARGEST) -> None:
    if size > most:
        raise sandbox.SecurityError(f"it makes a text, list or number of more than {most} characters")


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
