"""Checks that a draft model can guess for another one: that a token's number means the same to both. No torch."""

from __future__ import annotations

from pathlib import Path

from services.engine.model_config import ModelConfig, UnsupportedModel, read_json


def check_draft(draft: Path, draft_config: ModelConfig, model: Path, config: ModelConfig) -> None:
    """Raise `UnsupportedModel` where vocabularies or special tokens differ; `draft` and `model` are directories."""
    remedy = "take a draft model of the same family, or leave --speculative-model out"
    if draft_config.vocab_size != config.vocab_size:
        raise UnsupportedModel(
            f"--speculative-model {draft}: it has {draft_config.vocab_size} tokens (vocab_size), and {model} has"
            f" {config.vocab_size}; {remedy}"
        )
    if set(draft_config.eos_token_ids) != set(config.eos_token_ids):
        raise UnsupportedModel(
            f"--speculative-model {draft}: its output ends by {_listed(draft_config)}, and that of {model} by"
            f" {_listed(config)} (eos_token_id); {remedy}"
        )
    theirs, ours = _special_tokens(draft), _special_tokens(model)
    if theirs and ours and theirs != ours:
        token, place = min(set(theirs.items()) ^ set(ours.items()), key=lambda item: item[1])
        raise UnsupportedModel(
            f"--speculative-model {draft}: the tokenizers of both differ, as in {token!r}, token {place} of one of them"
            f" (tokenizer.json); {remedy}"
        )


def _listed(config: ModelConfig) -> str:
    return "token " + ", ".join(map(str, sorted(config.eos_token_ids))) if config.eos_token_ids else "no token"


def _special_tokens(directory: Path) -> dict[str, int]:
    """The tokens that no text is made of, by their names; empty where the directory has no tokenizer that says them."""
    added = (read_json(directory / "tokenizer.json") or {}).get("added_tokens")
    if not isinstance(added, list):
        return {}
    named = [each for each in added if isinstance(each, dict) and isinstance(each.get("id"), int)]
    return {str(each.get("content")): each["id"] for each in named}
