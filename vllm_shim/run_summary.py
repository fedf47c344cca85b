"""What the steps of an engine's life were answered from: one line at its end."""

from __future__ import annotations

from step_oracle.v1 import step_pb2 as pb


class RunSummary:
    """Counts resolved steps. Engine thread only."""

    __slots__ = ("_device_ns", "_extrapolated", "_extrapolated_ns", "_late", "_leased", "steps")

    def __init__(self) -> None:
        self.steps = self._leased = self._late = self._extrapolated = 0
        self._device_ns = self._extrapolated_ns = 0

    def count(self, latency_ns: int, support: int, *, is_leased: bool, is_late: bool) -> None:
        """`is_late`: the answer came after the step's deadline."""
        self.steps += 1
        self._device_ns += latency_ns
        self._leased += is_leased
        self._late += is_late
        if support == pb.SUPPORT_EXTRAPOLATED:
            self._extrapolated += 1
            self._extrapolated_ns += latency_ns

    def __str__(self) -> str:
        steps, device_ns = max(self.steps, 1), max(self._device_ns, 1)
        return (
            f"{self.steps} steps; extrapolated: {100 * self._extrapolated / steps:.2f} % of the steps, "
            f"{100 * self._extrapolated_ns / device_ns:.2f} % of the device time; "
            f"{100 * self._leased / steps:.1f} % leased, {self._late} late answers"
        )
