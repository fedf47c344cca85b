"""What Prometheus reads: plain integers the event loop writes, collected when asked. Engine ids are never labels."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from oracle_server.sampling.answer import SUPPORT_EXACT, SUPPORT_EXTRAPOLATED, SUPPORT_INTERPOLATED
from oracle_server.state.experiments import Experiments

HANDLING_BOUNDS_NS = (10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 5_000_000, 20_000_000, 100_000_000)
# As step_oracle.v1.ShimCounts.lateness_buckets.
LATENESS_BOUNDS_SECONDS = (10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)
MAX_EXPERIMENT_LABELS = 100

_SUPPORT = {SUPPORT_EXACT: "exact", SUPPORT_INTERPOLATED: "interpolated", SUPPORT_EXTRAPOLATED: "extrapolated"}


class Metrics:
    """Counts of one server. Written by the event loop only; a scrape on another thread sees single integers whole."""

    def __init__(self) -> None:
        # Indexed by the number of step_oracle.v1.Support.
        self.steps = [0, 0, 0, 0]
        self.messages = 0
        self.handling_buckets = [0] * (len(HANDLING_BOUNDS_NS) + 1)
        self.handling_sum_ns = 0
        self.streams = 0
        self.attached = 0
        self.swaps: dict[str, int] = {}
        self.calls: dict[tuple[str, str, str], int] = {}
        self.log_lines_dropped = 0
        self.injected_stalls = 0
        self.injected_errors = 0
        self.shim_steps = 0
        self.shim_leased_steps = 0
        self.shim_late_answers = 0
        self.shim_late_answer_ns = 0
        self.shim_reconnects = 0
        self.shim_lateness_buckets = [0] * (len(LATENESS_BOUNDS_SECONDS) + 1)
        self.shim_lateness_sum_ns = 0

    def count_message(self, handling_ns: int) -> None:
        """One stream message with steps, answered in so long (without the wire)."""
        self.messages += 1
        self.handling_sum_ns += handling_ns
        self.handling_buckets[bisect_left(HANDLING_BOUNDS_NS, handling_ns)] += 1

    def count_call(self, method: str, code: str, reason: str) -> None:
        """One finished call."""
        key = (method, code, reason)
        self.calls[key] = self.calls.get(key, 0) + 1

    def count_dropped_line(self) -> None:
        """One log line that found the queue full; called on any thread."""
        self.log_lines_dropped += 1

    def count_swap(self, result: str) -> None:
        """One activation or roll-back, with its reason where it was refused."""
        self.swaps[result] = self.swaps.get(result, 0) + 1


class MetricsCollector(Collector):
    """Turns the counts into metric families at each scrape."""

    def __init__(self, metrics: Metrics, experiments: Experiments) -> None:
        self._metrics = metrics
        self._experiments = experiments

    def collect(self) -> Iterable[Metric]:
        """All families."""
        yield from self._server()
        yield from self._shims()
        yield from self._by_experiment()

    def _server(self) -> Iterable[Metric]:
        metrics = self._metrics
        steps = CounterMetricFamily(
            "step_oracle_steps", "Steps answered, here or from a lease, by support.", labels=["support"]
        )
        for number, name in _SUPPORT.items():
            steps.add_metric([name], metrics.steps[number])
        yield steps
        injected = CounterMetricFamily(
            "step_oracle_injected_faults", "Steps that overlays made stall or fail, by kind.", labels=["kind"]
        )
        injected.add_metric(["stall"], metrics.injected_stalls)
        injected.add_metric(["error"], metrics.injected_errors)
        yield injected
        yield _histogram(
            "step_oracle_step_handling_seconds",
            "Time from a parsed stream message to its built reply.",
            [bound / 1e9 for bound in HANDLING_BOUNDS_NS],
            metrics.handling_buckets,
            metrics.handling_sum_ns / 1e9,
        )
        yield GaugeMetricFamily("step_oracle_streams", "Open step streams.", value=metrics.streams)
        yield CounterMetricFamily("step_oracle_engines_attached", "Engines that attached.", value=metrics.attached)
        swaps = CounterMetricFamily(
            "step_oracle_pack_swap", "Activations and roll-backs, by result.", labels=["result"]
        )
        for result, count in list(metrics.swaps.items()):
            swaps.add_metric([result], count)
        yield swaps
        calls = CounterMetricFamily("step_oracle_rpc", "Finished calls.", labels=["method", "code", "reason"])
        for labels, count in list(metrics.calls.items()):
            calls.add_metric(labels, count)
        yield calls
        yield CounterMetricFamily(
            "step_oracle_log_lines_dropped",
            "Log lines dropped because the sink was slow.",
            value=metrics.log_lines_dropped,
        )

    def _shims(self) -> Iterable[Metric]:
        metrics = self._metrics
        for name, text, value in (
            ("steps", "Steps the shims report.", metrics.shim_steps),
            ("leased_steps", "Steps the shims answered from leases.", metrics.shim_leased_steps),
            ("late_answers", "Answers that came after their deadline.", metrics.shim_late_answers),
            ("late_answer_seconds", "By how much in total.", metrics.shim_late_answer_ns / 1e9),
            ("reconnects", "Streams the shims opened again.", metrics.shim_reconnects),
        ):
            yield CounterMetricFamily(f"step_oracle_shim_{name}", text, value=value)
        yield _histogram(
            "step_oracle_shim_lateness_seconds",
            "How far after its deadline a step resolved.",
            list(LATENESS_BOUNDS_SECONDS),
            metrics.shim_lateness_buckets,
            metrics.shim_lateness_sum_ns / 1e9,
        )

    def _by_experiment(self) -> Iterable[Metric]:
        generation = GaugeMetricFamily(
            "step_oracle_experiment_generation", "Current generation.", labels=["experiment"]
        )
        engines = GaugeMetricFamily("step_oracle_experiment_streams", "Open step streams.", labels=["experiment"])
        extrapolated = GaugeMetricFamily(
            "step_oracle_experiment_extrapolated_steps",
            "Extrapolated steps of the engines known to the experiment.",
            labels=["experiment"],
        )
        packs = GaugeMetricFamily(
            "step_oracle_pack_info", "1 for each pack a current binding names.", labels=["experiment", "digest"]
        )
        # The event loop may add an experiment meanwhile: list() copies in one step.
        for live in list(self._experiments.all())[:MAX_EXPERIMENT_LABELS]:
            records = list(live.engines.values())
            generation.add_metric([live.name], live.current.generation)
            engines.add_metric([live.name], sum(record.stream is not None for record in records))
            extrapolated.add_metric([live.name], sum(record.counts.extrapolated_steps for record in records))
            for digest in live.current.binding.digests():
                packs.add_metric([live.name, digest], 1)
        yield from (generation, engines, extrapolated, packs)


def _histogram(
    name: str, text: str, bounds_seconds: list[float], counts: list[int], sum_seconds: float
) -> HistogramMetricFamily:
    cumulative = 0
    buckets = []
    for bound, count in zip([*map(repr, bounds_seconds), "+Inf"], counts, strict=True):
        cumulative += count
        buckets.append((bound, float(cumulative)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=sum_seconds)
