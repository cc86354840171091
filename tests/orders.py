"""Orders to workers of a stack as a router would give them, with the workers and the holders chosen by the test."""

from __future__ import annotations

import json

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash, hash_blocks, namespace
from kvstore.registry import WorkerRecord
from tests.peers import session_with
from tests.stack import Stack

REQUEST_ID = "ordered"


class Orders:
    """Sends orders to the workers that the registry names at the moment."""

    def __init__(self, stack: Stack, num_new_tokens: int) -> None:
        self._stack = stack
        self._num_new_tokens = num_new_tokens

    def record(self, worker_id: str) -> WorkerRecord:
        """What the worker announces, once it does: one that did not run for a while is forgotten for a moment."""
        found: list[WorkerRecord] = []

        def is_registered() -> bool:
            found[:] = [record for record in self._stack.records() if record.worker_id == worker_id]
            return bool(found)

        self._stack.wait_for(is_registered, f"{worker_id} to be registered")
        return found[0]

    def hashes(self, prompt: list[int]) -> list[BlockHash]:
        """Of the prompt's full blocks, under the model that the stack serves."""
        record = next(record for record in self._stack.records() if record.role != "store")
        return hash_blocks(namespace(record.model_fingerprint), prompt, record.block_size)

    def source(self, holder: str, num_blocks: int, tier: str = "device") -> pb.PrefixSource:
        """The hint that a holder has the first blocks of a prompt."""
        record = self.record(holder)
        return pb.PrefixSource(
            holder_id=holder,
            incarnation=record.incarnation,
            kv_address=record.kv_address,
            num_blocks=num_blocks,
            tier=tier,
        )

    def were_lent_for_ours(self, holder: str) -> bool:
        """Whether the holder's log (JSON, debug) has it that it lent blocks, and only ever for our orders."""
        # What vLLM's native code warns of comes as it is.
        log = self._stack.services[holder].log.splitlines()
        lines = [json.loads(line) for line in log if line.startswith("{")]
        lent = [line for line in lines if line["logger"] == "kvstore.exchange.owner" and ": lent " in line["message"]]
        return bool(lent) and all(line.get("request_id") == REQUEST_ID for line in lent)

    async def generate(
        self, prompt: list[int], decode: str, prefill: str | None, sources: list[pb.PrefixSource], num_attempts: int = 1
    ) -> tuple[list[int], pb.Usage]:
        """Have a decode worker serve a prompt, which `prefill` (None: the decode worker itself) computes.

        Where a handoff fails, that worker is asked again: `num_attempts` times in all.
        """
        order = pb.GenerateRequest(
            handle=1,
            request_id=REQUEST_ID,
            prompt_token_ids=prompt,
            sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=self._num_new_tokens, ignore_eos=True),
            prefill_targets=[] if prefill is None else [_target(self.record(prefill))] * num_attempts,
            prefix_sources=sources,
        )
        tokens: list[int] = []
        async with session_with(self.record(decode).grpc_address) as session:
            await session.write(pb.SessionRequest(hello=pb.SessionHello(router_id="test", protocol_version="2")))
            await session.write(pb.SessionRequest(generate=order))
            async for frame in session:
                tokens += [
                    token_id for output in frame.outputs if not output.finish_reason for token_id in output.token_ids
                ]
                tokens += frame.token_ids
                for output in frame.outputs:
                    if output.finish_reason:
                        tokens += output.token_ids
                        assert output.finish_reason == pb.FINISH_REASON_LENGTH, output.error
                        return tokens, output.usage
        raise AssertionError("the session ended early")


def _target(record: WorkerRecord) -> pb.PrefillTarget:
    return pb.PrefillTarget(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        grpc_address=record.grpc_address,
        kv_address=record.kv_address,
    )
