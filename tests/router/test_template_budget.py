"""A chat template, or messages that make it loop or grow, end within a bound of steps, characters and time."""

from __future__ import annotations

import pytest

from services.router.text import ChatTemplateError
from services.router.text import chat_template as room
from services.router.text.chat_template import ChatTemplate
from services.router.text.template_budget import MAX_WORK, Budget, BudgetSpent

BIG = "x" * 200_000
HUGE = "10" + "0" * 9
LOOPS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "ranges that a test empties": (
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}"
    ),
    "macros that call themselves": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "loops that recurse": ("{% for n in [60] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}{% endif %}{% endfor %}"),
    "filters in filters": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
}
GROWTH = {
    "output": "{% for a in range(99999) %}{{ m }}{% endfor %}",
    "literals": "{% for a in range(99999) %}" + "x" * 2000 + "{% endfor %}",
    "captured output": "{% set n = namespace(x=m) %}{% for a in range(99) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "~": "{% set n = namespace(x=m) %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "+": "{% set n = namespace(x=m) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "lists": "{% set n = namespace(x=[m]) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "*": "{{ m * " + HUGE + " }}",
    "* of a constant": "{{ 'x' * " + HUGE + " }}",
    "* of a list": "{{ [m] * " + HUGE + " }}",
    "**": "{{ 9 ** 99999999 }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% by a value": "{{ '%*d' % (" + HUGE + ", 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format by a value": "{{ '{:{w}}'.format(1, w=" + HUGE + ") }}",
    "format, the filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ m | center(" + HUGE + ") }}",
    "ljust": "{{ '%'.ljust(" + HUGE + ") }}",
    "zfill": "{{ '1'.zfill(" + HUGE + ") }}",
    "expandtabs": "{{ m.replace('x', '\t').expandtabs(99999) }}",
    "indent": "{{ m | indent(" + HUGE + ") }}",
    "tojson": "{{ [1] | tojson(indent=" + HUGE + ") }}",
    "batch": "{{ [1] | batch(" + HUGE + ", 'x') | list }}",
    "slice": "{{ [1] | slice(" + HUGE + ") | list }}",
    "replace": "{{ m.replace('x', m) }}",
    "replace, the filter": "{{ m | replace('x', m) }}",
    "replace of nothing": "{{ m.replace('', m) }}",
    "join": "{{ m.join(m) }}",
    "join, the filter": "{{ m | join(m) }}",
    "sum of lists": "{{ [[m]] | sum(start=[]) }}",
    "a date": "{{ strftime_now('%1000000000d') }}",
}


def render(source: str, text: str = BIG) -> str:
    messages = [{"role": "user", "content": text}]
    return ChatTemplate("{% set m = messages[0].content %}" + source, {}).render(messages)


@pytest.mark.parametrize("source", GROWTH.values(), ids=GROWTH)
def test_what_would_grow_without_end_is_refused_before_it_takes_memory(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="does too much with these messages"):
        render(source)


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_what_would_loop_without_end_is_ended_by_the_clock(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(room, "Budget", lambda: Budget(1.0, 10**12, lambda: next(ticks) / 100))
    with pytest.raises(ChatTemplateError, match="it takes too long"):
        render(source, "x")
    assert next(ticks) < 200, "it looks at the clock as it goes"


def test_a_budget_ends_by_work_and_by_time() -> None:
    now = [0.0]
    budget = Budget(max_seconds=2.0, max_work=10, clock=lambda: now[0])
    budget.spend(10)
    with pytest.raises(BudgetSpent, match="too much text"):
        budget.spend(1)
    budget = Budget(max_seconds=2.0, max_work=10, clock=lambda: now[0])
    now[0] = 2.5
    with pytest.raises(BudgetSpent, match="too long"):
        budget.spend(1)


def test_what_fits_renders_whole() -> None:
    text = "{% for a in range(100) %}{{ m }}{% endfor %}{{ [1, 2] | sum(start=3) }}{{ '%s-%5d' % ('a', 1234567) }}"
    assert render(text) == BIG * 100 + "6a-1234567"
    assert 200 * len(BIG) < MAX_WORK
    assert (
        render("{{ '{}'.format(12345678) }}{{ 'a' ~ 1 ~ none }}{{ ('a', 'b') | join(', ') }}") == "12345678a1Nonea, b"
    )
    assert render("{{ 'ab'.replace('b', 'c').upper().center(6) }}|{{ 2 ** 10 }}|{{ 'x' * 3 }}") == "  AC  |1024|xxx"


def test_a_failing_template_says_nothing_of_the_messages() -> None:
    with pytest.raises(ChatTemplateError) as failed:
        render("{{ {}[m].x.y + 1 }}{{ m + 1 }}", "a marked prompt")
    assert "marked" not in str(failed.value)
