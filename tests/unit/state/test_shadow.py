"""What a shadow pack shows is exact, and the same however it is split over processes."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle_server.errors import GenerationNotFound
from oracle_server.state.shadow import (
    BOUNDS_PERCENT,
    KEPT_GENERATIONS,
    MAX_ENGINES,
    OTHERS,
    Comparison,
    Differences,
    ShadowBook,
    summed,
)

LATENCIES = st.tuples(st.integers(1, 2**62), st.integers(1, 2**62))
STEPS = st.lists(
    st.tuples(st.sampled_from(("a", "b", "c")), st.booleans(), st.integers(1, 3), st.integers(1, 3), LATENCIES)
)


def test_a_difference_on_a_bound_is_within_it_and_one_beyond_is_not() -> None:
    differences = Differences()
    for shadow_ns in (1000, 1010, 990, 1011, 2000, 2001):
        differences.add(1000, shadow_ns)
    assert differences.relative_buckets == [3, 1, 0, 0, 0, 0, 1, 1]
    assert (differences.min_difference_ns, differences.max_difference_ns) == (-10, 1001)
    assert (differences.longer_steps, differences.shorter_steps, differences.steps) == (4, 1, 6)


@given(st.lists(LATENCIES, min_size=1, max_size=30))
def test_buckets_equal_exact_shares(latencies: list[tuple[int, int]]) -> None:
    differences = Differences()
    for latency_ns, shadow_ns in latencies:
        differences.add(latency_ns, shadow_ns)
    shares = [Fraction(abs(two - one), one) * 100 for one, two in latencies]
    lower = (-1, *BOUNDS_PERCENT)
    expected = [sum(low < share <= high for share in shares) for low, high in zip(lower, BOUNDS_PERCENT, strict=False)]
    assert differences.relative_buckets == [*expected, sum(share > BOUNDS_PERCENT[-1] for share in shares)]
    assert differences.shadow_latency_ns - differences.latency_ns == sum(two - one for one, two in latencies)


@given(STEPS, STEPS)
def test_two_processes_show_what_one_would_have(
    first: list[tuple[str, bool, int, int, tuple[int, int]]], second: list[tuple[str, bool, int, int, tuple[int, int]]]
) -> None:
    whole, parts = Comparison(5, "s"), (Comparison(5, "s"), Comparison(5, "s"))
    for part, steps in zip(parts, (first, second), strict=True):
        for engine_id, mixed, support, shadow_support, latencies in steps:
            for comparison in (whole, part):
                comparison.engine(engine_id, "p").add((mixed, support, shadow_support), *latencies)
    merged = summed([[parts[0]], [parts[1]]], 5, "e")
    assert merged == whole
    assert merged.totals() == whole.totals()


def test_old_generations_and_too_many_engines_are_dropped_from_memory() -> None:
    book = ShadowBook()
    for generation in range(1, KEPT_GENERATIONS + 4):
        book.comparison(generation, "s")
    assert [c.generation for c in book.comparisons()] == list(range(4, KEPT_GENERATIONS + 4))
    comparison = Comparison(1, "s")
    for i in range(MAX_ENGINES + 5):
        comparison.engine(f"e{i}", "p").add((False, 1, 1), 10, 11)
    assert len(comparison.engines) == MAX_ENGINES + 1
    assert comparison.engines[OTHERS].regions[False, 1, 1].steps == 5
    assert comparison.totals()[False, 1, 1].steps == MAX_ENGINES + 5


def test_the_newest_generation_is_shown_and_a_missing_one_is_refused() -> None:
    books = [[Comparison(3, "s"), Comparison(9, "t")], [Comparison(4, "u")]]
    assert summed(books, 0, "e").shadow_pack_digest == "t"
    assert summed(books, 4, "e").shadow_pack_digest == "u"
    with pytest.raises(GenerationNotFound, match=r"generation 5 of e .*generations 3, 4, 9 have"):
        summed(books, 5, "e")
    with pytest.raises(GenerationNotFound, match="no generation of e"):
        summed([], 0, "e")
