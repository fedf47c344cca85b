"""Grids of composed packs."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from profiler.grids import context_grid, octaves, request_grid, token_grid


@given(st.integers(1, 40_000), st.lists(st.integers(1, 40_000), max_size=20))
def test_token_grids_ascend_from_one_to_the_limit_and_hold_every_measured_point(
    limit: int, measured: list[int]
) -> None:
    grid = token_grid(limit, measured)
    assert grid == sorted(set(grid))
    assert grid[0] == 1
    assert grid[-1] == limit
    assert {point for point in measured if point <= limit} <= set(grid)


@given(st.integers(2, 200_000))
def test_no_gap_of_a_context_grid_is_wider_than_a_quarter_octave(limit: int) -> None:
    grid = context_grid(limit, first=0)
    assert grid[0] == 0
    assert grid[-1] == limit
    for low, high in pairwise(grid[1:]):
        assert high <= low + 1 or high / low < 2**0.25 * 1.13


def test_small_batches_and_small_token_counts_are_all_there() -> None:
    assert request_grid(512)[:16] == list(range(1, 17))
    assert token_grid(8192)[:64] == list(range(1, 65))


def test_octaves_are_whole_ascending_numbers() -> None:
    assert octaves(1, 16, 2) == [1, 2, 3, 4, 6, 8, 11, 16]
    assert octaves(1, 64, 0.5) == [1, 4, 16, 64]
