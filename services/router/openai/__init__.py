"""OpenAI's API: bodies to requests, tokens to choices, choices to answers whole or streamed."""

from services.router.openai.chat import ChatRenderer, plan_chat, tokenize_chat
from services.router.openai.choice import Delta
from services.router.openai.completions import CompletionRenderer, plan_completion
from services.router.openai.fields import boolean, check_token_ids, parse_object, string
from services.router.openai.generation import Generation, GenerationPlan, Receipts, UsageCount
from services.router.openai.requests import parse_chat, parse_chat_input, parse_completion

__all__ = [
    "ChatRenderer",
    "CompletionRenderer",
    "Delta",
    "Generation",
    "GenerationPlan",
    "Receipts",
    "UsageCount",
    "boolean",
    "check_token_ids",
    "parse_chat",
    "parse_chat_input",
    "parse_completion",
    "parse_object",
    "plan_chat",
    "plan_completion",
    "string",
    "tokenize_chat",
]
