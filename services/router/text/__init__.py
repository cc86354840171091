"""Turns text into tokens and back: tokenizers, chat templates, and the models that they belong to."""

from services.router.text.chat_template import ChatTemplateError, TemplateBudgetSpent
from services.router.text.detokenizer import Detokenizer, StopMatcher
from services.router.text.models import ModelDirectory, ServedModel
from services.router.text.pool import LONG_CHARS, SHORT_CHARS, ClientPool, GoOn, TokenizerPool, WorkStopped, at_once
from services.router.text.tokenizer import (
    ModelTokenizer,
    PromptTooLong,
    TokenizerError,
    check_overrides,
    check_templates,
)

__all__ = [
    "LONG_CHARS",
    "SHORT_CHARS",
    "ChatTemplateError",
    "ClientPool",
    "Detokenizer",
    "GoOn",
    "ModelDirectory",
    "ModelTokenizer",
    "PromptTooLong",
    "ServedModel",
    "StopMatcher",
    "TemplateBudgetSpent",
    "TokenizerError",
    "TokenizerPool",
    "WorkStopped",
    "at_once",
    "check_overrides",
    "check_templates",
]
