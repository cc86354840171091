"""Turns text into tokens and back: tokenizers, chat templates, and the models that they belong to."""

from services.router.text.chat_template import ChatTemplateError
from services.router.text.detokenizer import StopMatcher
from services.router.text.models import ModelDirectory, ServedModel
from services.router.text.tokenizer import (
    ModelTokenizer,
    TokenizerError,
    TokenizerPool,
    check_overrides,
    check_templates,
)

__all__ = [
    "ChatTemplateError",
    "ModelDirectory",
    "ModelTokenizer",
    "ServedModel",
    "StopMatcher",
    "TokenizerError",
    "TokenizerPool",
    "check_overrides",
    "check_templates",
]
