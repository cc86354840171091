"""How long a worker may say nothing until the router leaves it."""

from __future__ import annotations

from services.router.fleet.silence import Silence


def looks(silence: Silence, start_s: float, seconds: float) -> float:
    """Look as often as one should; returns the time of the last look."""
    now_s = start_s
    while now_s < start_s + seconds:
        now_s += silence.look_s
        silence.look(now_s)
    return now_s


def test_a_worker_that_promised_to_speak_is_suspected_soon_and_left_after_the_timeout() -> None:
    silence = Silence(2.0)
    silence.begin(50.0, is_promised=True)
    now_s = looks(silence, 50.0, 1.5)
    assert (silence.is_suspect(now_s), silence.is_broken) == (True, False)
    looks(silence, now_s, 0.75)
    assert silence.is_broken


def test_who_speaks_in_time_is_neither() -> None:
    silence, now_s = Silence(2.0), 50.0
    silence.begin(now_s, is_promised=True)
    for _ in range(100):
        silence.heard(now_s)
        now_s = looks(silence, now_s, silence.heartbeat_s)
        assert not silence.is_suspect(now_s)
        assert not silence.is_broken


def test_a_worker_that_knows_no_heartbeats_may_be_silent() -> None:
    silence = Silence(2.0)
    silence.begin(50.0, is_promised=False)
    now_s = looks(silence, 50.0, 100)
    assert (silence.is_suspect(now_s), silence.is_broken) == (False, False)


def test_the_time_in_which_the_router_stood_still_is_no_silence_of_the_workers() -> None:
    silence = Silence(2.0)
    silence.begin(50.0, is_promised=True)
    now_s = looks(silence, 50.0, 0.5)
    silence.look(now_s + 30)  # what came meanwhile waits unread
    assert not silence.is_broken
    silence.heard(now_s + 30)
    looks(silence, now_s + 30, 1.5)
    assert not silence.is_broken


def test_a_new_stream_begins_with_a_new_word() -> None:
    silence = Silence(2.0)
    silence.begin(50.0, is_promised=True)
    now_s = looks(silence, 50.0, 3)
    assert silence.is_broken
    silence.begin(now_s, is_promised=True)
    assert not silence.is_broken


def test_what_breaks_while_we_stand_still_ourselves_is_known_for_a_moment() -> None:
    silence = Silence(2.0)
    silence.begin(50.0, is_promised=True)
    now_s = looks(silence, 50.0, 1.0)
    assert not silence.was_blind(now_s)
    now_s += 14.0
    assert silence.was_blind(now_s), "before it has looked again"
    silence.look(now_s)
    assert silence.was_blind(now_s + 1.0)
    assert not silence.was_blind(looks(silence, now_s, 3.0))
