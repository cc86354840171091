"""Speaks OpenAI's API: bodies to requests, tokens to choices, choices to answers whole or streamed."""

from services.router.openai.bodies import (
    AbortBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
)
from services.router.openai.chat import ChatRenderer, plan_chat
from services.router.openai.choice import Delta
from services.router.openai.completions import CompletionRenderer, plan_completion
from services.router.openai.decoding import decode
from services.router.openai.generation import Generation, GenerationPlan
from services.router.openai.openapi import openapi_document
from services.router.openai.renderer import Renderer
from services.router.openai.sizes import Count, SizeLimits, check_sizes
from services.router.openai.tokenizing import detokenize, longest_text, tokenize

__all__ = [
    "AbortBody",
    "ChatBody",
    "ChatRenderer",
    "CompletionBody",
    "CompletionRenderer",
    "Count",
    "Delta",
    "DetokenizeBody",
    "GenerateBody",
    "Generation",
    "GenerationPlan",
    "Renderer",
    "SizeLimits",
    "TokenizeBody",
    "check_sizes",
    "decode",
    "detokenize",
    "longest_text",
    "openapi_document",
    "plan_chat",
    "plan_completion",
    "tokenize",
]
