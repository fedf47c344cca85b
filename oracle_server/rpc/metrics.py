"""What Prometheus reads: plain integers the event loop writes, collected when asked. Engine ids are never labels."""

from __future__ import annotations

from bisect import bisect_left

# Upper bounds of the histograms; one bucket more takes what lies above the last.
HANDLING_BOUNDS_NS = (10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 5_000_000, 20_000_000, 100_000_000)
CALL_BOUNDS_SECONDS = (1e-3, 5e-3, 10e-3, 50e-3, 0.1, 0.5, 1.0, 5.0, 30.0)
LAG_BOUNDS_SECONDS = (1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1.0, 5.0)
# As step_oracle.v1.ShimCounts.lateness_buckets.
LATENESS_BOUNDS_SECONDS = (10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)

# Counts of what is now, not of what has been: they end with their process.
PRESENT = ("streams", "processes", "ready")


class Metrics:
    """Counts of one process. Written by the event loop only; a scrape on another thread sees single integers whole."""

    def __init__(self) -> None:
        # By tenant, then by the number of step_oracle.v1.Support.
        self.steps: dict[str, list[int]] = {}
        self.messages = 0
        self.handling_buckets = [0] * (len(HANDLING_BOUNDS_NS) + 1)
        self.handling_sum_ns = 0
        self.streams = 0
        self.processes = 0
        # 1 while the server is SERVING.
        self.ready = 0
        self.attached = 0
        self.swaps: dict[str, int] = {}
        self.calls: dict[tuple[str, str, str], int] = {}
        self.call_buckets: dict[str, list[int]] = {}
        self.call_sum_ns: dict[str, int] = {}
        self.lag_buckets = [0] * (len(LAG_BOUNDS_SECONDS) + 1)
        self.lag_sum_ns = 0
        self.shard_restarts = 0
        self.log_lines_dropped = 0
        self.injected_stalls = 0
        self.injected_errors = 0
        self.shim_steps = 0
        self.shim_leased_steps = 0
        # By tenant.
        self.shim_late_answers: dict[str, int] = {}
        self.shim_late_answer_ns = 0
        self.shim_reconnects = 0
        self.shim_lateness_buckets = [0] * (len(LATENESS_BOUNDS_SECONDS) + 1)
        self.shim_lateness_sum_ns = 0

    def steps_of(self, tenant: str) -> list[int]:
        """A tenant's steps by support, to count in."""
        return self.steps.setdefault(tenant, [0, 0, 0, 0])

    def count_message(self, handling_ns: int) -> None:
        """One stream message with steps, answered in so long (without the wire)."""
        self.messages += 1
        self.handling_sum_ns += handling_ns
        self.handling_buckets[bisect_left(HANDLING_BOUNDS_NS, handling_ns)] += 1

    def count_call(self, method: str, code: str, reason: str) -> None:
        """One finished call."""
        key = (method, code, reason)
        self.calls[key] = self.calls.get(key, 0) + 1

    def time_call(self, method: str, duration_ns: int) -> None:
        """How long a finished unary call took."""
        buckets = self.call_buckets.setdefault(method, [0] * (len(CALL_BOUNDS_SECONDS) + 1))
        buckets[bisect_left(CALL_BOUNDS_SECONDS, duration_ns / 1e9)] += 1
        self.call_sum_ns[method] = self.call_sum_ns.get(method, 0) + duration_ns

    def count_lag(self, lag_ns: int) -> None:
        """How much later than it was due the event loop woke up."""
        self.lag_sum_ns += lag_ns
        self.lag_buckets[bisect_left(LAG_BOUNDS_SECONDS, lag_ns / 1e9)] += 1

    def count_dropped_line(self) -> None:
        """One log line that found the queue full; called on any thread."""
        self.log_lines_dropped += 1

    def count_swap(self, result: str) -> None:
        """One activation or roll-back, with its reason where it was refused."""
        self.swaps[result] = self.swaps.get(result, 0) + 1

    def count_late_answers(self, tenant: str, answers: int, late_ns: int) -> None:
        """Answers that reached an engine after their deadline, and by how much in total."""
        if answers:
            self.shim_late_answers[tenant] = self.shim_late_answers.get(tenant, 0) + answers
        self.shim_late_answer_ns += late_ns


def total_steps(metrics: Metrics) -> int:
    """The steps of all tenants."""
    return sum(sum(by_support) for by_support in metrics.steps.values())
