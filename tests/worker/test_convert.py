"""Orders on the wire and the engine's own types say the same."""

import pytest
from tandem.v1 import worker_pb2 as pb

from services.engine.api import InvalidRequest, PositionLogprobs, SamplingParams, TokenLogprob
from services.lifecycle import Event, Timeline
from services.worker import convert


def test_every_event_has_the_number_that_it_has_on_the_wire() -> None:
    assert {f"EVENT_{event.name}": int(event) for event in Event} == {
        name: number for name, number in pb.Event.items() if number
    }


def test_every_sampling_field_arrives() -> None:
    message = pb.SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={3: -1.0},
        allowed_token_ids=[3, 4],
        seed=2**63 + 1,
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=[5],
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=4,
    )
    expected = SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={3: -1.0},
        allowed_token_ids=(3, 4),
        seed=2**63 + 1,
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=(5,),
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=4,
    )
    assert convert.sampling_from_proto(message) == expected
    assert {field.name for field in message.DESCRIPTOR.fields} == set(SamplingParams.__dataclass_fields__)


def test_absent_logprobs_stay_absent_and_nonsense_is_refused_by_name() -> None:
    message = pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=1)
    assert convert.sampling_from_proto(message).logprobs is None
    message.temperature = float("nan")
    with pytest.raises(InvalidRequest, match="temperature"):
        convert.sampling_from_proto(message)


def test_logprobs_go_there_and_back() -> None:
    token = TokenLogprob(token_id=3, logprob=-0.5, rank=2)
    logprobs = PositionLogprobs(chosen=token, top=(TokenLogprob(1, -0.25, 1), token))
    assert convert.logprobs_from_proto(convert.logprobs_to_proto(logprobs)) == logprobs
    first, second = convert.prompt_logprobs_to_proto([None, logprobs])
    assert not first.HasField("chosen")
    assert second.chosen.token_id == 3


def test_stamps_carry_the_timeline() -> None:
    timeline = Timeline(lambda: 12.5)
    timeline.mark(Event.RECEIVED)
    (stamp,) = convert.stamps_to_proto(timeline)
    assert (stamp.event, stamp.unix_s) == (pb.EVENT_RECEIVED, 12.5)
