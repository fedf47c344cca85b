"""Turns the counts of a server into the families Prometheus reads, at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from oracle_server.errors import QuotaExceeded
from oracle_server.rpc.metrics import (
    CALL_BOUNDS_SECONDS,
    HANDLING_BOUNDS_NS,
    LAG_BOUNDS_SECONDS,
    LATENESS_BOUNDS_SECONDS,
    Metrics,
)
from oracle_server.rpc.version import package_version
from oracle_server.sampling.answer import SUPPORT_EXACT, SUPPORT_EXTRAPOLATED, SUPPORT_INTERPOLATED
from oracle_server.state.experiments import Experiments

MAX_LABELS = 100
OTHER = "other"

_SUPPORT = {SUPPORT_EXACT: "exact", SUPPORT_INTERPOLATED: "interpolated", SUPPORT_EXTRAPOLATED: "extrapolated"}


class Labels:
    """The first MAX_LABELS names have a label of their own, all others share `other`. Owned by the scrape's thread.

    It outlives scrapes: a counter that changed between its name and `other` would go backwards.
    """

    def __init__(self) -> None:
        self._named: dict[str, None] = {}

    def of(self, name: str) -> str:
        """The label of a name."""
        if name not in self._named:
            if len(self._named) >= MAX_LABELS:
                return OTHER
            self._named[name] = None
        return name

    def keep(self, names: Iterable[str]) -> None:
        """Give the labels of all other names away: of gauges, which say nothing about what is gone."""
        present = set(names)
        self._named = {name: None for name in self._named if name in present}


class MetricsCollector(Collector):
    """Turns the counts into metric families at each scrape."""

    def __init__(
        self, metrics: Metrics, experiments: Experiments, tenants: Labels | None = None, names: Labels | None = None
    ) -> None:
        self._metrics = metrics
        self._experiments = experiments
        self._tenants = tenants or Labels()
        self._names = names or Labels()

    def collect(self) -> Iterable[Metric]:
        """All families."""
        yield from self._server()
        yield from self._steps()
        yield from self._calls()
        yield from self._shims()
        yield from self._by_experiment()

    def _server(self) -> Iterable[Metric]:
        metrics = self._metrics
        build = GaugeMetricFamily(
            "step_oracle_build_info", "1, labelled with the server's version.", labels=["version"]
        )
        build.add_metric([package_version()], 1)
        yield build
        for name, text, value in (
            ("ready", "1 while the server is SERVING, 0 while it starts or drains.", metrics.ready),
            ("processes", "Processes of this server: 1, or the parent and its shards.", metrics.processes),
            ("streams", "Open step streams.", metrics.streams),
            ("experiments", "Experiments there are.", len(list(self._experiments.all()))),
        ):
            yield GaugeMetricFamily(f"step_oracle_{name}", text, value=value)
        for name, text, value in (
            ("engines_attached", "Engines that attached.", metrics.attached),
            ("shard_restarts", "Shards that ended and were started again.", metrics.shard_restarts),
            ("log_lines_dropped", "Log lines dropped because the sink was slow.", metrics.log_lines_dropped),
        ):
            yield CounterMetricFamily(f"step_oracle_{name}", text, value=value)
        yield _histogram(
            "step_oracle_event_loop_lag_seconds",
            "How much later than due the event loops of the server woke up.",
            LAG_BOUNDS_SECONDS,
            metrics.lag_buckets,
            metrics.lag_sum_ns / 1e9,
        )
        yield _counter(
            "step_oracle_pack_swap",
            "Activations and roll-backs, by result: ok, or why refused.",
            "result",
            metrics.swaps,
        )

    def _steps(self) -> Iterable[Metric]:
        metrics = self._metrics
        steps = CounterMetricFamily(
            "step_oracle_steps", "Steps answered, here or from a lease, by support.", labels=["tenant", "support"]
        )
        by_label: dict[str, list[int]] = {}
        for tenant, counts in list(metrics.steps.items()):
            total = by_label.setdefault(self._tenants.of(tenant), [0] * len(counts))
            for i, count in enumerate(counts):
                total[i] += count
        for label, counts in by_label.items():
            for number, name in _SUPPORT.items():
                steps.add_metric([label, name], counts[number])
        yield steps
        yield _counter(
            "step_oracle_injected_faults",
            "Steps that overlays made stall or fail, by kind.",
            "kind",
            {"stall": metrics.injected_stalls, "error": metrics.injected_errors},
        )
        yield _histogram(
            "step_oracle_step_handling_seconds",
            "Time from a parsed stream message to its built reply.",
            [bound / 1e9 for bound in HANDLING_BOUNDS_NS],
            metrics.handling_buckets,
            metrics.handling_sum_ns / 1e9,
        )

    def _calls(self) -> Iterable[Metric]:
        metrics = self._metrics
        calls = CounterMetricFamily(
            "step_oracle_rpc", "Finished calls, streams of steps among them.", labels=["method", "code", "reason"]
        )
        rejected: dict[str, int] = {}
        for (method, code, reason), count in list(metrics.calls.items()):
            calls.add_metric([method, code, reason], count)
            if reason == QuotaExceeded.reason:
                rejected[method] = rejected.get(method, 0) + count
        yield calls
        yield _counter("step_oracle_quota_rejected", "Calls refused by a quota or a size limit.", "method", rejected)
        durations = HistogramMetricFamily(
            "step_oracle_rpc_duration_seconds", "How long unary calls took.", labels=["method"]
        )
        for method, counts in list(metrics.call_buckets.items()):
            sum_seconds = metrics.call_sum_ns.get(method, 0) / 1e9
            durations.add_metric([method], _cumulative(CALL_BOUNDS_SECONDS, counts), sum_seconds)
        yield durations

    def _shims(self) -> Iterable[Metric]:
        metrics = self._metrics
        for name, text, value in (
            ("steps", "Steps the shims report.", metrics.shim_steps),
            ("leased_steps", "Steps the shims answered from leases.", metrics.shim_leased_steps),
            (
                "late_answer_seconds",
                "By how much answers came after their deadlines.",
                metrics.shim_late_answer_ns / 1e9,
            ),
            ("reconnects", "Streams the shims opened again.", metrics.shim_reconnects),
        ):
            yield CounterMetricFamily(f"step_oracle_shim_{name}", text, value=value)
        late: dict[str, int] = {}
        for tenant, count in list(metrics.shim_late_answers.items()):
            label = self._tenants.of(tenant)
            late[label] = late.get(label, 0) + count
        yield _counter("step_oracle_shim_late_answers", "Answers that came after their deadline.", "tenant", late)
        yield _histogram(
            "step_oracle_shim_lateness_seconds",
            "How far after its deadline a step resolved.",
            LATENESS_BOUNDS_SECONDS,
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
            "step_oracle_pack_info",
            "1 for each pack a current binding names.",
            labels=["experiment", "digest", "pack", "model", "device"],
        )
        # The event loop may add an experiment meanwhile: list() copies in one step.
        experiments = list(self._experiments.all())
        self._names.keep(live.name for live in experiments)
        others = [0, 0]
        for live in experiments:
            records = list(live.engines.values())
            streams = sum(record.stream is not None for record in records)
            beyond = sum(record.counts.extrapolated_steps for record in records)
            if self._names.of(live.name) == OTHER:
                others[0] += streams
                others[1] += beyond
                continue
            snapshot = live.snapshot
            generation.add_metric([live.name], snapshot.generation)
            engines.add_metric([live.name], streams)
            extrapolated.add_metric([live.name], beyond)
            for digest, pack in snapshot.packs.items():
                manifest = pack.manifest
                names = [manifest.name, manifest.model.id, manifest.device.name]
                packs.add_metric([live.name, digest, *names], 1)
        if len(experiments) > MAX_LABELS:
            engines.add_metric([OTHER], others[0])
            extrapolated.add_metric([OTHER], others[1])
        yield from (generation, engines, extrapolated, packs)


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in list(counts.items()):
        family.add_metric([value], count)
    return family


def _histogram(
    name: str, text: str, bounds_seconds: Sequence[float], counts: Sequence[int], sum_seconds: float
) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, buckets=_cumulative(bounds_seconds, counts), sum_value=sum_seconds)


def _cumulative(bounds_seconds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    cumulative = 0
    buckets = []
    for bound, count in zip([*map(repr, bounds_seconds), "+Inf"], counts, strict=True):
        cumulative += count
        buckets.append((bound, float(cumulative)))
    return buckets
