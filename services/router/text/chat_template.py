"""Renders messages with the model's Jinja chat template, in a bounded sandbox, with the helpers of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser

from services.router.text.template_budget import BUDGET, BoundedEnvironment, Budget, BudgetSpent, check_format, paid

# Of a rendering that the event loop waits for. A plain conversation takes a tenth of a millisecond.
_SHORT_SECONDS, _SHORT_WORK = 0.005, 1 << 16
_CONTINUE_MARK = "TANDEM_CONTINUES_HERE_5f3a "


class ChatTemplateError(ValueError):
    """The template cannot be parsed, or refuses these messages."""


class TemplateBudgetSpent(ChatTemplateError):
    """The template does more with these messages than it may (`template_budget.py`)."""


class _GenerationExtension(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(jinja2.TemplateError):
    """The template's own words."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which models have never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    check_format(format, ())
    return datetime.now().strftime(format)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationExtension, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = paid("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template. `special_tokens` are the variables (`bos_token`, …) that it may use."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ChatTemplateError where the source is no template."""
        environment = _environment()
        try:
            self._template = environment.compile_bounded(source)
            self._wants_parts = _loops_over_content(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template cannot be parsed: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        is_short: bool = False,
    ) -> str:
        """The prompt's text. `variables` are the client's chat_template_kwargs. `is_short`: it shall take a moment.

        Raises ChatTemplateError; where the template takes too long or makes too much, TemplateBudgetSpent. Of the
        messages it says what the template says, and nothing else.
        """
        prepared = [self._prepare(message) for message in messages]
        if continue_final_message:
            _mark_end(prepared[-1])
        context = {
            **self._special_tokens,
            **(variables or {}),
            "messages": prepared,
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
        }
        token = BUDGET.set(Budget(_SHORT_SECONDS, _SHORT_WORK) if is_short else Budget())
        try:
            text = self._template.render(context)
        except BudgetSpent as error:
            raise TemplateBudgetSpent(f"the chat template does too much with these messages: {error}") from None
        except _Refused as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:
            # A template is a program: whatever it trips over comes from the messages that it was given.
            raise ChatTemplateError(
                f"the chat template cannot render these messages: {type(error).__name__}"
            ) from error
        finally:
            BUDGET.reset(token)
        return _cut_at_mark(text) if continue_final_message else text

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        prepared = dict(message)
        content = prepared.get("content")
        if isinstance(content, list) and not self._wants_parts:
            prepared["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, list):
            prepared["content"] = [dict(part) for part in content]
        return prepared


def _loops_over_content(template: nodes.Template) -> bool:
    """Whether the template loops over content parts itself: `{% for part in message['content'] %}`."""
    return any(_is_content(loop.iter) for loop in template.find_all(nodes.For))


def _is_content(expression: nodes.Node) -> bool:
    if isinstance(expression, nodes.Filter) and expression.node is not None:
        return _is_content(expression.node)
    if isinstance(expression, nodes.Getattr):
        return expression.attr == "content"
    if isinstance(expression, nodes.Getitem):
        return isinstance(expression.arg, nodes.Const) and expression.arg.value == "content"
    return isinstance(expression, nodes.Name) and expression.name == "content"


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_MARK
    elif isinstance(content, list) and content:
        content[-1]["text"] += _CONTINUE_MARK
    else:
        raise ChatTemplateError("continue_final_message: the final message has no text to continue")


def _cut_at_mark(text: str) -> str:
    start = text.rfind(_CONTINUE_MARK.strip())
    if start < 0:
        raise ChatTemplateError("continue_final_message: the chat template does not render the final message's text")
    if text.startswith(_CONTINUE_MARK, start):
        return text[:start]
    return text[:start].rstrip()  # the template trims the message, so what stood before the mark is trimmed too
