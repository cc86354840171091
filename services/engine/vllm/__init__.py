"""vLLM behind the port: its scheduler, models and kernels, with our block hashes, loans and proofs.

Nothing outside this room imports vllm. `EngineCore` runs on the worker's engine thread, one step a call; with one rank
no process, no socket, no polling. Blocks are vLLM's own, under its own ids (0 is its null block, which nobody else
sees); its prefix cache is keyed by our hashes, so that index, stores and peers understand it. The port comes about so:

    the port                    here
    check                       our limits, then its `SamplingParams.verify`: what vLLM cannot do is refused by name
    add_request                 a `Request` of vLLM's, our hashes in it, into its waiting queue (by priority, arrival)
    adapter                     all are loaded at the start; a `LoRARequest` by the key, which our hashes begin with
    reserve                     blocks straight from its `BlockPool`, cached ones first; the queue for them is ours
    add_prefilled               the blocks become findable and the request enters with all but the newest token
                                computed: vLLM finds the full blocks in its cache, the connector copies the partial one
                                over. After a handoff the newest token is the context's last, and vLLM samples the first
                                one itself (`samples_first_token`); after a move it is the output's, and nothing is
                                computed twice
    release_reservation, abort  references go back to the pool; blocks that a transfer still writes to are the caller's,
                                whatever becomes of the request, so vLLM never knows of a transfer
    resumed_token_ids           a preempted request that has said so much (penalties, min_tokens, limits and
                                logprobs count as ever; seeds are by position)
    hold_blocks                 `max_tokens` 1; the connector takes a reference on each block as the step fills it
    suspend                     references on its blocks, then an abort
    lend_prefix, take_prefix    `get_cached_block`, `touch`, `get_new_blocks`; publish_blocks: an entry in its cache
    proofs, recheck             made after the step that filled a block, kept here by block id
    take_cache_changes          its KV events, in the process
    step                        schedule, run, update: `EngineCore.step`; the connector tells what was scheduled

A request, and what an abort finds to free:

    state      where                               holds                      abort             next
    BEHIND     our queue, after a reservation      nothing                    forgotten         QUEUED, FINISHED
    QUEUED     vLLM's queue or batch, or preempted vLLM's block table         vLLM frees it     FINISHED
    RESERVING  our queue                           nothing                    forgotten         RESERVED, FINISHED
    RESERVED   a transfer fills its blocks         nothing: they are lent     forgotten         JOINING, FINISHED
    JOINING    vLLM's queue, not yet scheduled     `held` references          they go back      QUEUED, FINISHED
    FINISHED   nowhere                             nothing (loans are the callers')

Reservations and vLLM's queue are one order, by priority and arrival: what comes after a reservation that waits for
blocks stays BEHIND it, and no reservation takes blocks that an older request of the queue waits for.

Ranks (`--tensor-parallel-size`): processes of vLLM's, started and stepped by its executor; each shows its cache to this
one, where all of them are one memory (`ranks`, `services.engine.shared_tensor`). Heads that several ranks have are read
from the first, and given to the others as blocks arrive.

Failures: a block that does not match its proof never comes here (the exchange keeps it out), and the caller tries
elsewhere or computes; blocks whose bytes nobody has proven are wiped before others get them (`foreign.arrivals`), since
attention computes with all of a block, and a NaN in it makes NaN wherever the sequence ends. A joining request that
cannot get the one block for its partial one, since all others are lent, gives up what it holds and is computed again:
counted as a preemption. An exception of a step leaves the engine unusable, and the worker ends. Not promised: equal
tokens in any company (vLLM's sums depend on the batch).
"""

from services.engine.vllm.opening import open_vllm

__all__ = ["open_vllm"]
