"""What a step costs more after a pause."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

from hypothesis import given
from hypothesis import strategies as st

from oracle_server.sampling.wake import WakeCurve


@given(
    st.lists(st.tuples(st.integers(1, 10**12), st.integers(0, 10**10)), min_size=1, max_size=8), st.integers(0, 10**13)
)
def test_the_curve_goes_through_its_points_and_is_straight_between_them(
    drawn: list[tuple[int, int]], idle_ns: int
) -> None:
    idle = sorted({idle for idle, _ in drawn})
    points = [(0, 0), *zip(idle, sorted(extra for _, extra in drawn), strict=False)]
    curve = WakeCurve(points[1:])

    assert [curve.extra_ns(idle) for idle, _ in points] == [extra for _, extra in points]
    expected = points[-1][1]
    for (begin, low), (end, high) in pairwise(points):
        if begin <= idle_ns < end:
            expected = floor(low + Fraction((high - low) * (idle_ns - begin), end - begin))
    assert curve.extra_ns(idle_ns) == expected


def test_without_points_nothing_is_added() -> None:
    assert [WakeCurve(()).extra_ns(idle) for idle in (0, 1, 10**12)] == [0, 0, 0]
