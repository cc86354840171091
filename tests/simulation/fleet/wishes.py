"""What simulated clients ask for, of every kind, and what an engine that nobody disturbs would answer.

The right answer is computed here: the model's hashes over the whole context, the product's sampler on one row at a
time, and stops by hand. No scheduler, no cache, no worker has a part in it.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models

from services.engine.native.sampling import position_logprobs, sample
from services.engine.native.sampling.sampler import NoToken, SamplingRow
from services.engine.request import SampledToken, SamplingParams
from services.router.text import ModelTokenizer
from services.router.text.models import ModelFiles
from tests.simulation.fleet.computation import VOCAB_SIZE, undisturbed_logits

_FIRST_LETTERS: Final = "abcdefgh"
_SECOND_LETTERS: Final = "ijklmnopqrstuvwx"
_TOLERANCE: Final = 1e-4  # of log probabilities: a batch's shape may show in the last bits
_TRUNKS: Final = 3
_FAMOUS: Final = 4
"""Whole prompts that many clients send."""


@dataclass(frozen=True)
class Answer:
    """Of one choice. `logprobs`: of each token; of the prompt's tokens from the second on."""

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[float] | None
    prompt_logprobs: list[float] | None


@dataclass(frozen=True)
class Wish:
    """One request. `timeout_s`: what its client waits for it; 0: as long as it takes."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    """Of the first choice: of the others the seed counts on."""
    n: int = 1
    is_streamed: bool = True
    stop: str = ""
    timeout_s: float = 0.0

    def body(self, model: str) -> bytes:
        """As OpenAI's clients write it."""
        params = self.sampling
        fields: dict[str, Any] = {
            "model": model,
            "prompt": list(self.prompt),
            "n": self.n,
            "stream": self.is_streamed,
            "max_tokens": params.max_tokens,
            "min_tokens": params.min_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
            "logit_bias": {str(token_id): bias for token_id, bias in params.logit_bias.items()},
            "stop_token_ids": list(params.stop_token_ids),
            "seed": params.seed,
            "logprobs": params.logprobs,
            "prompt_logprobs": params.prompt_logprobs,
            "ignore_eos": True,
            "return_token_ids": True,
            "receipt": True,
        }
        if params.allowed_token_ids:
            fields["allowed_token_ids"] = list(params.allowed_token_ids)
        if self.stop:
            fields["stop"] = [self.stop]
        if self.is_streamed:
            fields["stream_options"] = {"include_usage": True}
        return json.dumps(fields).encode()

    @functools.cached_property
    def answers(self) -> list[Answer]:
        """What its choices must be."""
        seeds = range(self.sampling.seed, self.sampling.seed + self.n)
        return [self._answer(replace(self.sampling, seed=seed)) for seed in seeds]

    @property
    def kinds(self) -> list[str]:
        """What is not plain about it."""
        return [kind for kind, has in KINDS.items() if has(self)]

    def _answer(self, params: SamplingParams) -> Answer:
        tokens: list[SampledToken] = []
        text, finish_reason, stop_reason = "", "length", None
        while len(tokens) < params.max_tokens and finish_reason == "length":
            output = [token.token_id for token in tokens]
            (logits,) = undisturbed_logits([*self.prompt, *output], 1)
            (token,) = sample(logits[None], [SamplingRow(params, self.prompt, output)])
            assert not isinstance(token, NoToken)
            tokens.append(token)
            if token.token_id in params.stop_token_ids:
                finish_reason, stop_reason = "stop", token.token_id
                break
            text += text_of(token.token_id)
            if self.stop and self.stop in text:
                text, finish_reason, stop_reason = text[: text.index(self.stop)], "stop", self.stop
        return Answer(
            [token.token_id for token in tokens],
            text,
            finish_reason,
            stop_reason,
            [token.logprobs.chosen.logprob for token in tokens if token.logprobs is not None]
            if params.logprobs is not None
            else None,
            self._prompt_logprobs(params) if params.prompt_logprobs is not None else None,
        )

    def _prompt_logprobs(self, params: SamplingParams) -> list[float]:
        logits = undisturbed_logits(self.prompt[:-1], len(self.prompt) - 1)
        return [each.chosen.logprob for each in position_logprobs(logits, self.prompt[1:], 1)]


KINDS: Final[dict[str, Callable[[Wish], object]]] = {
    "sampled": lambda wish: not wish.sampling.is_greedy,
    "three choices": lambda wish: wish.n > 1,
    "whole": lambda wish: not wish.is_streamed,
    "log probabilities": lambda wish: wish.sampling.logprobs is not None,
    "log probabilities of the prompt": lambda wish: wish.sampling.prompt_logprobs is not None,
    "penalties": lambda wish: wish.sampling.presence_penalty,
    "least tokens": lambda wish: wish.sampling.min_tokens,
    "stop tokens": lambda wish: wish.sampling.stop_token_ids,
    "stop string": lambda wish: wish.stop,
    "bias": lambda wish: wish.sampling.logit_bias,
    "allowed tokens": lambda wish: wish.sampling.allowed_token_ids,
    "deadline": lambda wish: wish.timeout_s,
}


def draw_wish(draw: random.Random) -> Wish:
    """Any kind of request; one in three is as plain as can be."""
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": draw.randrange(1, 14), "seed": draw.getrandbits(32)}
    prompt = _draw_prompt(draw)
    if draw.random() < 0.33:
        return Wish(prompt, SamplingParams(**params))
    if draw.random() < 0.6:
        params |= {"temperature": 1.0, "top_p": draw.choice([1.0, 0.9]), "top_k": draw.choice([0, 40])}
    if draw.random() < 0.3:
        params |= {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    if draw.random() < 0.3:
        params["logprobs"] = draw.choice([0, 2])
    if draw.random() < 0.1:
        params["logit_bias"] = {draw.randrange(VOCAB_SIZE): 5.0, draw.randrange(VOCAB_SIZE): -100.0}
    if draw.random() < 0.1:
        params["allowed_token_ids"] = tuple(sorted(draw.sample(range(VOCAB_SIZE), 40)))
    stop, may_stream = "", True
    match draw.randrange(4):
        case 0:
            stop = draw.choice([*_SECOND_LETTERS[:4], *(last + first for last in "xw" for first in _FIRST_LETTERS)])
        case 1:
            params["stop_token_ids"] = tuple(draw.sample(range(VOCAB_SIZE), 8))
            params["min_tokens"] = draw.choice([0, params["max_tokens"] // 2])
        case 2 if draw.random() < 0.3:
            params["prompt_logprobs"], may_stream = 1, False
    return Wish(
        prompt,
        SamplingParams(**params),
        n=draw.choice([1, 1, 1, 3]),
        is_streamed=may_stream and draw.random() < 0.7,
        stop=stop,
        timeout_s=draw.uniform(0.3, 8.0) if draw.random() < 0.1 else 0.0,
    )


def is_close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether these log probabilities are the same."""
    return len(ours) == len(theirs) and all(
        abs(one - other) <= _TOLERANCE for one, other in zip(ours, theirs, strict=True)
    )


def text_of(token_id: int) -> str:
    """Two letters, so that a stop string may lie within one or across two."""
    first, second = divmod(token_id, len(_SECOND_LETTERS))
    return _FIRST_LETTERS[first] + _SECOND_LETTERS[second]


@functools.cache
def model_files() -> ModelFiles:
    """What a router reads of the simulated model."""
    tokenizer = Tokenizer(models.WordLevel({text_of(each): each for each in range(VOCAB_SIZE)}, unk_token=text_of(0)))
    tokenizer.decoder = decoders.Fuse()
    with TemporaryDirectory(prefix="tandem-simulation-") as directory:
        tokenizer.save(str(Path(directory, "tokenizer.json")))
        Path(directory, "tokenizer_config.json").write_text("{}", encoding="utf-8")
        return ModelFiles(ModelTokenizer(Path(directory)), {}, VOCAB_SIZE, frozenset(), {})


def _draw_prompt(draw: random.Random) -> tuple[int, ...]:
    """Some are the same, some begin alike: with one of a few trunks, or with a part of it."""
    if draw.random() < 0.2:
        draw = random.Random(f"famous {draw.randrange(_FAMOUS)}")
    trunk = random.Random(draw.randrange(_TRUNKS))
    shared, own = draw.choice([0, 20, 40, 64, 90]), draw.randrange(2, 60)
    return (*trunk.choices(range(VOCAB_SIZE), k=shared), *draw.choices(range(VOCAB_SIZE), k=own))
