"""Requests: what is refused by name, which statuses follow each other, when the newest token is the last."""

from __future__ import annotations

import dataclasses
import math

import pytest

from services.engine.api import FinishReason, InvalidRequest, SamplingParams
from services.engine.config import EngineConfig
from services.engine.limits import check_fits
from services.engine.native.scheduling import Request
from services.engine.native.scheduling.request import IllegalTransition, RequestStatus
from services.settings import SettingsError

NO_EOS: frozenset[int] = frozenset()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.inf, math.nan]),
        ("top_p", [0.0, 1.01, -1.0, math.nan]),
        ("top_k", [-2]),
        ("min_p", [-0.01, 1.01]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0.0, -1.0, 1e-38, 1e38, math.inf]),
        ("logit_bias", [{-1: 0.0}, {1: 101.0}, {1: math.nan}]),
        ("allowed_token_ids", [(-1,)]),
        ("stop_token_ids", [(3, -1)]),
        ("seed", [-1, 2**64]),
        ("max_tokens", [0]),
        ("min_tokens", [-1, 17]),
        ("logprobs", [-1, 21]),
        ("prompt_logprobs", [-1, 21]),
    ],
)
def test_an_out_of_range_parameter_is_refused_by_its_name(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            dataclasses.replace(SamplingParams(max_tokens=16), **{field: value})
        assert caught.value.param == field
        assert str(caught.value).startswith(f"{field}: must be in")


def test_the_borders_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, min_p=1.0, seed=2**64 - 1, max_tokens=1, min_tokens=1)
    SamplingParams(presence_penalty=-2.0, frequency_penalty=2.0, logit_bias={0: -100.0}, logprobs=20)


def test_parameters_share_lists_and_what_is_made_of_them() -> None:
    lists = SamplingParams(logit_bias={3: 1.0}, allowed_token_ids=(3, 4), stop_token_ids=(5,))
    one, other = (SamplingParams(seed=seed, logprobs=2).with_lists_of(lists) for seed in (1, 2))
    assert one == dataclasses.replace(lists, seed=1, logprobs=2)
    assert other.seed == 2
    for name in ("logit_bias", "biased_index", "biases", "allowed_index", "stop_index", "stop_set"):
        assert getattr(one, name) is getattr(other, name) is getattr(lists, name)


def test_an_illegal_transition_raises_with_the_history() -> None:
    request = Request("r1", [1], SamplingParams())
    request.move_to(RequestStatus.WAITING)
    request.move_to(RequestStatus.RUNNING)
    with pytest.raises(IllegalTransition, match="r1: NEW -> WAITING -> RUNNING -> WAITING is not a legal"):
        request.move_to(RequestStatus.WAITING)
    assert request.status is RequestStatus.RUNNING


def test_nothing_follows_finished() -> None:
    request = Request("r1", [1], SamplingParams())
    for status in (RequestStatus.WAITING, RequestStatus.FINISHED):
        request.move_to(status)
    for status in RequestStatus:
        with pytest.raises(IllegalTransition):
            request.move_to(status)


def stop_reason(outputs: list[int], *, hold_blocks: bool = False, **sampling: object) -> tuple[object, object]:
    request = Request("r", [1, 2], SamplingParams(**sampling), hold_blocks=hold_blocks)  # type: ignore[arg-type]
    for token_id in outputs:
        request.append_output(token_id)
    return request.stop_reason(frozenset({9}), max_model_len=8), request.stop_token_id


def test_what_ends_a_request() -> None:
    assert stop_reason([3]) == (None, None)
    assert stop_reason([9]) == (FinishReason.STOP, None)
    assert stop_reason([9], ignore_eos=True) == (None, None)
    assert stop_reason([5], stop_token_ids=(5,)) == (FinishReason.STOP, 5)
    assert stop_reason([9], stop_token_ids=(9,)) == (FinishReason.STOP, None)
    assert stop_reason([9], stop_token_ids=(9,), ignore_eos=True) == (FinishReason.STOP, 9)
    assert stop_reason([5], stop_token_ids=(5,), min_tokens=2) == (None, None)
    assert stop_reason([9, 9], min_tokens=2) == (FinishReason.STOP, None)
    assert stop_reason([3, 3], max_tokens=2) == (FinishReason.LENGTH, None)
    assert stop_reason([3] * 5) == (None, None)
    assert stop_reason([3] * 6) == (FinishReason.LENGTH, None)


def test_a_request_that_is_handed_off_ends_with_its_first_token() -> None:
    assert stop_reason([3], hold_blocks=True) == (FinishReason.HANDED_OFF, None)
    assert stop_reason([9], hold_blocks=True) == (FinishReason.STOP, None)
    assert stop_reason([3], hold_blocks=True, max_tokens=1) == (FinishReason.LENGTH, None)


def fits(num_prompt_tokens: int, max_tokens: int, *, num_blocks: int, hold_blocks: bool = False) -> str | None:
    request = Request("r", [0] * num_prompt_tokens, SamplingParams(max_tokens=max_tokens), hold_blocks=hold_blocks)
    try:
        check_fits(request, 32, 4, num_blocks)
    except InvalidRequest as error:
        return error.param
    return None


def test_what_can_never_fit_is_refused() -> None:
    assert fits(0, 1, num_blocks=100) == "prompt"
    assert fits(31, 1000, num_blocks=8) is None
    assert fits(32, 1, num_blocks=100) == "prompt"
    assert fits(10, 6, num_blocks=4) is None
    assert fits(10, 7, num_blocks=4) == "max_tokens"
    assert fits(10, 7, num_blocks=4, hold_blocks=True) is None
    assert fits(16, 7, num_blocks=4, hold_blocks=True) == "max_tokens"


@pytest.mark.parametrize(
    "settings",
    [
        {"model": ""},
        {"block_size": 0},
        {"max_num_seqs": -1},
        {"max_num_batched_tokens": -1},
        {"max_model_len": -1},
        {"gpu_memory_utilization": 0.0},
        {"gpu_memory_utilization": 1.1},
        {"kv_offloading_size": -1.0},
        {"kv_offloading_size": float("nan")},
        {"kv_offloading_size": float("inf")},
        {"kv_offloading_size": 1.0, "enable_prefix_caching": False},
    ],
)
def test_an_impossible_setting_is_refused_by_its_name(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError) as caught:
        EngineConfig(**{"model": "m", **settings})  # type: ignore[arg-type]
    assert caught.value.setting == next(iter(settings))
