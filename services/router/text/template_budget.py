"""Bounds what a chat template may do: steps, characters and time. A template is a program that somebody else wrote.

Rendering runs in a thread, which nobody can end from outside. So each loop's round, call, filter, operator and output
pays from the rendering's `Budget` before it takes memory, and looks at the clock: a template, or messages that make it
loop or grow, end in `BudgetSpent` within `MAX_SECONDS` and a hundredth. What could take more than a moment by itself
(repeating, padding, joining, replacing) pays for its result before it makes it.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextvars import ContextVar
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS: Final = 2.0
MAX_WORK: Final = 1 << 26
"""Steps of a loop, calls, and characters or elements made, together."""
MAX_NUMBER: Final = 100_000
"""In an argument that says how wide or how often; Jinja's own bound of `range`."""

_MAX_POWER_BITS: Final = 4096
_WIDE: Final = re.compile(r"\d{6}")  # in a format: a width or precision
_WIDTH_GIVEN: Final = re.compile(r"\*|\{[^}]*\{")  # by a value
_JINJAS_OWN: Final = jinja2.Environment | jinja2.runtime.Context | nodes.EvalContext  # which some filters get first
_PADDING: Final = frozenset({"ljust", "rjust", "center", "zfill"})


class BudgetSpent(Exception):
    """A template did more than it may; the message says of what."""


class Budget:
    """What one rendering may still do."""

    def __init__(
        self, max_seconds: float = MAX_SECONDS, max_work: int = MAX_WORK, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._deadline_s = clock() + max_seconds
        self._left = max_work

    def spend(self, amount: int) -> None:
        """Pay. Raises `BudgetSpent`."""
        self._left -= amount
        if self._left < 0:
            raise BudgetSpent("it makes too much text, or takes too many steps")
        if self._clock() > self._deadline_s:
            raise BudgetSpent("it takes too long")


BUDGET: Final[ContextVar[Budget | None]] = ContextVar("template budget", default=None)
"""Of the rendering in this context; None while a template is compiled."""


def _spend(amount: int) -> None:
    budget = BUDGET.get()
    if budget is not None:
        budget.spend(amount)
    elif amount > MAX_WORK:
        raise BudgetSpent("it makes too much text")


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | set | frozenset | bytes) else 1


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which everything pays."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_pay_for_output, **options)
        self.globals.pop("lipsum", None)  # makes text of nothing
        self.filters = {name: paid(name, function) for name, function in self.filters.items()}

    def compile_bounded(self, source: str) -> jinja2.Template:
        """Compile a template whose loops pay. Raises jinja2.TemplateError."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            literals = sum(len(data.data) for node in loop.body for data in _with_children(node, nodes.TemplateData))
            pay = nodes.Call(nodes.EnvironmentAttribute("pay"), [nodes.Const(1 + literals)], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(pay).set_lineno(loop.lineno))
        _replace_concatenations(tree)
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None), None)

    def pay(self, amount: int) -> None:
        """Called by each round of a loop."""
        _spend(amount)

    def concatenate(self, *values: object) -> str:
        """The operator `~`."""
        texts = [str(value) for value in values]
        _spend(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Pay for what an operator makes, and do it."""
        match operator:
            case "*":
                counts = [each for each in (left, right) if isinstance(each, int)]
                _spend(_size(left) * _size(right) * (max(map(abs, counts)) if len(counts) == 1 else 1))
            case "**" if isinstance(left, int) and isinstance(right, int):
                if left.bit_length() * abs(right) > _MAX_POWER_BITS:
                    raise BudgetSpent("it computes too large a power")
            case "+":
                _spend(_size(left) + _size(right))
            case "%" if isinstance(left, str):
                check_format(left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Pay for a call, and do it."""
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja puts a function of its own around str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        _spend(1)
        if isinstance(text, str):
            args = _pay_for_text(text, name, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        _spend(_size(result))
        return result


def _pay_for_text(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Pay for what a text's method is about to make; returns its arguments."""
    if name in _PADDING and any(map(_is_large, args)):
        raise BudgetSpent("it pads too widely")
    if name == "expandtabs":
        _spend(
            text.count("\t")
            * max((abs(each) for each in (*args, *kwargs.values()) if isinstance(each, int)), default=8)
        )
    elif name in ("format", "format_map"):
        check_format(text, (*args, *kwargs.values()))
    elif name == "replace" and len(args) >= 2:
        _pay_for_replacing(text, args[0], args[1])
    elif name == "join" and args:
        return _joined(text, args[0]), *args[1:]
    return args


def _pay_for_output(value: object) -> str:
    """What is written. Captured and written again, it pays again."""
    text = value if isinstance(value, str) else str(value)
    _spend(1 + len(text))
    return text


def paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its input and its result."""

    @functools.wraps(function)  # with what Jinja passes it first
    def paying(*args: Any, **kwargs: Any) -> Any:
        values = [each for each in args if not isinstance(each, _JINJAS_OWN)]
        _spend(1 + sum(map(_size, values)))
        if name != "int" and any(_is_large(each) for each in (*values[1:], *kwargs.values())):
            raise BudgetSpent(f"its filter {name} is asked for too much")
        match name:
            case "format":
                check_format(str(values[0]), (*values[1:], *kwargs.values()))
            case "replace" if len(values) >= 3:
                _pay_for_replacing(str(values[0]), str(values[1]), str(values[2]))
            case "join" if len(values) >= 2:
                _spend(_size(values[0]) * len(str(values[1])))
            case "sum" if not isinstance(kwargs.get("start", (*values, 0, 0, 0)[2]), int | float):
                raise BudgetSpent("its filter sum adds what are no numbers")
        result = function(*args, **kwargs)
        _spend(_size(result))
        return result

    return paying


def _is_large(value: object) -> bool:
    return isinstance(value, int) and abs(value) > MAX_NUMBER


def check_format(text: str, values: Sequence[object]) -> None:
    """Refuse a format that pads, or gives digits, without end. Raises `BudgetSpent`."""
    given = [*values, *(each for value in values if isinstance(value, Mapping) for each in value.values())]
    if _WIDE.search(text) or (_WIDTH_GIVEN.search(text) and any(map(_is_large, given))):
        raise BudgetSpent("it formats too widely")
    _spend(len(text) + sum(map(_size, given)))


def _joined(separator: str, values: Any) -> list[Any]:
    parts = list(values)
    _spend(sum(map(_size, parts)) + len(separator) * len(parts))
    return parts


def _pay_for_replacing(text: str, old: object, new: object) -> None:
    count = text.count(old) if isinstance(old, str) else 0
    _spend(len(text) + count * (len(new) if isinstance(new, Sized) else 1))


def _with_children(node: nodes.Node, kind: type[Any]) -> Iterable[Any]:
    return [*([node] if isinstance(node, kind) else []), *node.find_all(kind)]


def _replace_concatenations(node: nodes.Node) -> None:
    """Let `a ~ b` be a call, which pays; Jinja has no hook for it."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_as_call(each) if isinstance(each, nodes.Node) else each for each in value]
        elif isinstance(value, nodes.Node):
            setattr(node, name, _as_call(value))


def _as_call(node: nodes.Node) -> nodes.Node:
    _replace_concatenations(node)
    if not isinstance(node, nodes.Concat):
        return node
    function = nodes.EnvironmentAttribute("concatenate")
    return nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)
