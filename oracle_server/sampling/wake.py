"""What a step costs more after a pause: caches, clocks and threads that have gone to sleep meanwhile."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


class WakeCurve:
    """Piecewise linear through no idleness, no cost and the points given; beyond the last it stays there. Immutable."""

    __slots__ = ("_extra_ns", "_idle_ns")

    def __init__(self, points: Sequence[tuple[int, int]]) -> None:
        """(idle, extra) in nanoseconds, ascending in the first, never descending in the second."""
        self._idle_ns = (0, *(idle_ns for idle_ns, _ in points))
        self._extra_ns = (0, *(extra_ns for _, extra_ns in points))

    def extra_ns(self, idle_ns: int) -> int:
        """After so long without a step; whole nanoseconds, rounded down."""
        right = bisect_right(self._idle_ns, idle_ns)
        if right == len(self._idle_ns):
            return self._extra_ns[-1]
        begin_ns, end_ns = self._idle_ns[right - 1 : right + 1]
        low_ns, high_ns = self._extra_ns[right - 1 : right + 1]
        return low_ns + (high_ns - low_ns) * (idle_ns - begin_ns) // (end_ns - begin_ns)
