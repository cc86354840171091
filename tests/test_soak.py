"""The soak test's verdict."""

from __future__ import annotations

import pytest

from tests.soak import Track, slope


def track(*memory_mb: float, num_files: int = 60, new_files: int = 0) -> Track:
    minutes = range(len(memory_mb))
    files = [num_files + new_files * minute for minute in minutes]
    return Track("worker", 1, [float(minute) for minute in minutes], list(memory_mb), files)


def test_a_slope_is_that_of_the_nearest_line() -> None:
    assert slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx(2)
    assert slope([0, 1, 2], [4, 6, 4]) == pytest.approx(0)
    assert slope([1], [4]) == 0


def test_what_is_filled_at_the_start_is_no_growth() -> None:
    assert track(100, 300, 400, 450, 450, 450.2, 450, 450.1).is_flat


def test_what_still_grows_in_the_second_half_grows() -> None:
    assert not track(100, 100, 100, 100, 101, 102, 103, 104).is_flat


def test_who_opens_a_file_a_minute_and_closes_none_grows() -> None:
    assert track(100, 100, 100, 100).is_flat
    assert not track(100, 100, 100, 100, new_files=1).is_flat
