"""A sequence at the router: which ways it may go, and what it takes of its worker's outputs."""

from __future__ import annotations

import itertools

import pytest
from tandem.v1 import worker_pb2 as pb

from services.router.fleet.placement import Ask
from services.router.fleet.prefixes import PromptBlocks
from services.router.fleet.sequence import _TRANSITIONS, IllegalTransition, Sequence, SequenceState


def sequence() -> Sequence:
    order = pb.GenerateRequest(request_id="r")
    order.sampling.prompt_logprobs = 2
    return Sequence(Ask("", "r", 0, order, (1, 2), None, (), PromptBlocks(), b""))


@pytest.mark.parametrize(("start", "end"), list(itertools.product(SequenceState, repeat=2)))
def test_no_step_is_taken_that_the_table_lacks(start: SequenceState, end: SequenceState) -> None:
    moved = sequence()
    moved.state = start
    if end in _TRANSITIONS[start]:
        moved.move_to(end)
        assert moved.state is end
    else:
        with pytest.raises(IllegalTransition, match=f"DISPATCHING -> {end.name}"):
            moved.move_to(end)
        assert moved.state is start


def test_every_state_but_the_last_can_be_left_for_the_end() -> None:
    ways = {state for state in SequenceState if SequenceState.ENDED in _TRANSITIONS[state]}
    assert ways == set(SequenceState) - {SequenceState.ENDED}


def test_what_a_worker_says_again_is_left_out_of_its_outputs() -> None:
    asked = sequence()
    for token_id in (5, 6, 7):
        asked.add_token(token_id, 1.0)
    asked.move_to(SequenceState.LOST)
    asked.move_to(SequenceState.RESUMING)
    asked.num_repeated = 3
    known = pb.Output(token_ids=[5, 6], logprobs=[pb.PositionLogprobs()] * 2, prompt_logprobs=[pb.PositionLogprobs()])
    asked.take_output(known, 2.0)
    assert (list(known.token_ids), list(known.logprobs), list(known.prompt_logprobs)) == ([], [], [])
    assert (asked.state, asked.num_repeated) == (SequenceState.RESUMING, 1)
    told = [pb.PositionLogprobs(chosen=pb.TokenLogprob(token_id=token_id)) for token_id in (7, 8)]
    half = pb.Output(token_ids=[7, 8], logprobs=told)
    asked.take_output(half, 3.0)
    assert (list(half.token_ids), list(half.logprobs)) == ([8], told[1:])
    assert (asked.state, list(asked.token_ids), asked.newest_token_s) == (SequenceState.STREAMING, [5, 6, 7, 8], 3.0)


def test_a_resumed_order_is_the_order_with_the_tokens_so_far_and_asks_for_the_prompt_no_more() -> None:
    asked = sequence()
    asked.add_token(5, 1.0)
    order = asked.resumed_order()
    assert list(order.resumed_token_ids) == [5]
    assert not order.sampling.HasField("prompt_logprobs")
    assert (list(asked.ask.order.resumed_token_ids), asked.ask.order.sampling.prompt_logprobs) == ([], 2)
