"""A model in plain Python that reads its tokens back from a paged cache: a wrong block table gives a wrong token.

What the next token is depends on every token before it, so a request's whole output is known beforehand
(`expected_outputs`), whatever batching, preemption, caching and transfers it went through.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvstore.pool import BlockPool
from services.engine.api import PositionLogprobs, SampledToken, SamplingParams, TokenLogprob
from services.engine.native.scheduling import Request
from services.engine.native.scheduling.batch import Batch, SampledBatch, SampledSequence, ScheduledSequence
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.speculation import Candidate, NgramSpeculation, Plan
from services.rates import RateLearner, StepShape

VOCAB_SIZE = 7
EOS = 6


def next_token(token_ids: Sequence[int]) -> int:
    """A deterministic function of all tokens so far."""
    state = 17
    for token_id in token_ids:
        state = (state * 31 + token_id + 1) % 1_000_003
    return state % VOCAB_SIZE


def expected_outputs(prompt: Sequence[int], sampling: SamplingParams, max_model_len: int) -> list[int]:
    """What a request alone on an endless machine generates."""
    token_ids = list(prompt)
    outputs: list[int] = []
    while len(outputs) < sampling.max_tokens and len(token_ids) < max_model_len:
        token_ids.append(next_token(token_ids))
        outputs.append(token_ids[-1])
        if outputs[-1] == EOS and not sampling.ignore_eos and len(outputs) >= sampling.min_tokens:
            break
    return outputs


class PagedWorld:
    """The cache: per block a list of tokens, None where nothing was written since it was cleared, -1 for garbage."""

    def __init__(self, pool: BlockPool, config: SchedulerConfig) -> None:
        self.pool = pool
        self.config = config
        self.blocks: list[list[int | None]] = [[-1] * config.block_size for _ in range(pool.num_blocks)]

    def run(self, batch: Batch) -> SampledBatch:
        """Do what the runner does, and check what it may rely on."""
        for source, destination, num_tokens in batch.copies:
            rest: list[int | None] = [None] * (self.config.block_size - num_tokens)
            self.blocks[destination] = self.blocks[source][:num_tokens] + rest
        assert not {copy.destination for copy in batch.copies} & set(batch.new_block_ids)
        for block_id in batch.new_block_ids:
            self.blocks[block_id] = [None] * self.config.block_size
        assert 0 < batch.num_tokens <= self.config.max_num_batched_tokens
        assert len(batch.sequences) <= self.config.max_num_seqs
        assert len({id(sequence.request) for sequence in batch.sequences}) == len(batch.sequences)
        return SampledBatch(tuple(self._run_sequence(sequence) for sequence in batch.sequences))

    def _run_sequence(self, sequence: ScheduledSequence) -> SampledSequence:
        request = sequence.request
        assert sequence.start == request.num_computed_tokens
        for position, token_id in enumerate(sequence.token_ids, sequence.start):
            block_id = request.block_table[position // self.config.block_size]
            assert self.pool.num_references(block_id) == 1, f"{request.request_id} writes to shared block {block_id}"
            assert self.pool.hash_of(block_id) is None, f"{request.request_id} writes to cached block {block_id}"
            self.blocks[block_id][position % self.config.block_size] = token_id
        context = self.read(request.block_table, sequence.end)
        known = request.token_ids[: sequence.start + sequence.num_known]
        assert context == [*known, *sequence.draft], f"{request.request_id} reads {context}"
        tokens: list[SampledToken] = []
        for end in range(len(known), sequence.end + 1) if sequence.needs_sample else ():
            tokens.append(SampledToken(next_token(context[:end])))
            if context[end : end + 1] != [tokens[-1].token_id]:
                break
        following = request.token_ids[sequence.start + 1 : sequence.start + 1 + sequence.num_prompt_rows]
        logprobs = tuple(PositionLogprobs(TokenLogprob(token_id, -1.0, 1), ()) for token_id in following)
        return SampledSequence(tuple(tokens), None, logprobs)

    def read(self, block_table: Sequence[int], num_tokens: int) -> list[int | None]:
        """The first `num_tokens` tokens that lie in the blocks."""
        flat = [token for block_id in block_table for token in self.blocks[block_id]]
        return flat[:num_tokens]

    def transfer(self, request: Request, block_ids: Sequence[int], num_present: int) -> None:
        """Write a context's content into reserved blocks, as a transfer does, and check those that were there."""
        size = self.config.block_size
        context = request.token_ids
        assert self.read(block_ids, num_present * size) == context[: num_present * size]
        for index in range(num_present, len(block_ids)):
            assert self.pool.num_references(block_ids[index]) == 1, "a transfer writes to a shared block"
            content = context[index * size : (index + 1) * size]
            self.blocks[block_ids[index]] = [*content, *([None] * (size - len(content)))]


class Oracle(NgramSpeculation):
    """Guesses that are right for a while, as a seed says, then wrong: so many that every limit is met."""

    def __init__(self, seed: int) -> None:
        super().__init__(9, 1, 3, RateLearner())
        self._random = random.Random(seed)

    def plan(self, candidates: Sequence[Candidate], max_guesses: int, shape: StepShape) -> Plan:
        drafts: list[tuple[int, ...]] = []
        for each in candidates:
            assert shape.num_running >= len(candidates)
            most = min(each.max_guesses, max_guesses - sum(map(len, drafts)))
            token_ids, num_known = list(each.token_ids), len(each.token_ids)
            for _ in range(self._random.randint(0, 9)):
                token_ids.append(next_token(token_ids))
            token_ids += self._random.choices(range(VOCAB_SIZE), k=self._random.randint(0, 3))
            drafts.append(tuple(token_ids[num_known:][: max(0, most)]))
        return Plan(drafts)
