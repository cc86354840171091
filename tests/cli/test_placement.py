"""Which worker gets which cores and which GPU."""

from __future__ import annotations

from services.cli.up.placement import Core, Placement, place_workers


def cores(num_physical: int, threads: int = 1) -> list[Core]:
    """As Linux numbers them: first one thread of each physical core, then the others."""
    return [Core(thread * num_physical + core, (0, core)) for thread in range(threads) for core in range(num_physical)]


def test_two_workers_on_two_cores_get_one_each() -> None:
    assert place_workers(2, cores(2), []) == [
        Placement(cores=(0,), num_threads=1, num_others_cores=1),
        Placement(cores=(1,), num_threads=1, num_others_cores=1),
    ]


def test_more_cores_are_dealt_out_evenly() -> None:
    places = place_workers(3, cores(8), [])
    assert [place.cores for place in places] == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert [place.num_threads for place in places] == [2, 3, 3]


def test_threads_of_one_physical_core_stay_together_and_count_once() -> None:
    places = place_workers(2, cores(4, threads=2), [])
    assert [place.cores for place in places] == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert [place.num_threads for place in places] == [2, 2]


def test_with_fewer_cores_than_workers_some_share_one() -> None:
    assert [place.cores for place in place_workers(3, cores(2), [])] == [(0,), (1,), (0,)]


def test_no_cores_means_no_pinning() -> None:
    assert place_workers(2, [], []) == [Placement(), Placement()]


def test_gpus_are_dealt_out_and_a_shared_one_is_split() -> None:
    places = place_workers(3, [], ["4", "7"])
    assert [(place.gpu, place.gpu_share) for place in places] == [("4", 0.5), ("7", 1.0), ("4", 0.5)]
