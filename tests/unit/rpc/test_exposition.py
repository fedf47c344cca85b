"""Counts into families: labels with a bound, and no counter that goes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from oracle_server.rpc import exposition
from oracle_server.rpc.exposition import Labels, MetricsCollector
from oracle_server.rpc.loop_lag import PERIOD_SECONDS, watch_loop
from oracle_server.rpc.metrics import LAG_BOUNDS_SECONDS, Metrics
from oracle_server.shards.counts import add_counts, counts_of


@dataclass
class Live:
    """What the collector reads of an experiment."""

    name: str
    engines: dict[str, Any] = field(default_factory=dict)
    snapshot: Any = None


@dataclass
class Snapshot:
    generation: int = 1
    packs: dict[str, Any] = field(default_factory=dict)


class Experiments:
    def __init__(self, names: list[str]) -> None:
        self.live = [Live(name, snapshot=Snapshot()) for name in names]

    def all(self) -> list[Live]:
        return self.live


def samples(collector: MetricsCollector, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
        if sample.name == name
    }


def collector_of(metrics: Metrics, names: list[str] | None = None, *labels: Labels) -> MetricsCollector:
    return MetricsCollector(metrics, Experiments(names or []), *labels)  # type: ignore[arg-type]


def test_tenants_beyond_the_cap_share_one_label_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MAX_LABELS", 3)
    metrics = Metrics()
    for i, tenant in enumerate("abcde"):
        metrics.steps_of(tenant)[2] += i + 1
        metrics.count_late_answers(tenant, 1, 5)
    collector = collector_of(metrics)
    steps = {key[0]: count for key, count in samples(collector, "step_oracle_steps_total").items() if count}
    assert steps == {"a": 1, "b": 2, "c": 3, "other": 9}
    assert samples(collector, "step_oracle_shim_late_answers_total") == {("a",): 1, ("b",): 1, ("c",): 1, ("other",): 2}


def test_a_tenant_called_other_makes_no_series_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MAX_LABELS", 1)
    metrics = Metrics()
    for tenant in ("other", "x", "y"):
        metrics.steps_of(tenant)[1] += 1
    collector = collector_of(metrics)
    (family,) = [each for each in collector.collect() if each.name == "step_oracle_steps"]
    assert [s.value for s in family.samples if s.labels["support"] == "exact"] == [3]


def test_a_label_outlives_scrapes_whatever_order_the_processes_report_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MAX_LABELS", 1)
    tenants, names = Labels(), Labels()
    for order in ("ab", "ba"):
        metrics = Metrics()
        for tenant in order:
            metrics.steps_of(tenant)[1] = 1 if tenant == "a" else 10
        steps = samples(collector_of(metrics, [], tenants, names), "step_oracle_steps_total")
        assert {key[0]: count for key, count in steps.items() if count} == {"a": 1, "other": 10}


def test_an_experiment_that_is_deleted_gives_its_label_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MAX_LABELS", 2)
    labels = Labels(), Labels()
    for names, shown in ((["a", "b", "c"], {"a", "b"}), (["b", "c", "d"], {"b", "c"})):
        collector = collector_of(Metrics(), names, *labels)
        assert {key[0] for key in samples(collector, "step_oracle_experiment_generation")} == shown
        assert {key[0] for key in samples(collector, "step_oracle_experiment_streams")} == shown | {"other"}
        assert samples(collector, "step_oracle_experiments") == {(): 3}


def test_refusals_by_quota_are_those_calls_alone() -> None:
    metrics = Metrics()
    metrics.count_call("AttachEngine", "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    metrics.count_call("AttachEngine", "NOT_FOUND", "EXPERIMENT_NOT_FOUND")
    assert samples(collector_of(metrics), "step_oracle_quota_rejected_total") == {("AttachEngine",): 1}


def test_durations_fill_their_buckets() -> None:
    metrics = Metrics()
    for seconds in (0.0005, 0.004, 7, 90):
        metrics.time_call("UploadPack", int(seconds * 1e9))
    buckets = samples(collector_of(metrics), "step_oracle_rpc_duration_seconds_bucket")
    assert [buckets["UploadPack", bound] for bound in ("0.001", "0.005", "1.0", "30.0", "+Inf")] == [1, 2, 2, 3, 4]
    assert samples(collector_of(metrics), "step_oracle_rpc_duration_seconds_sum") == {("UploadPack",): 97.0045}


def test_the_sum_of_two_processes_is_the_sum_of_every_count() -> None:
    first, second = Metrics(), Metrics()
    for metrics, tenant in ((first, "a"), (second, "a"), (second, "b")):
        metrics.steps_of(tenant)[1] += 1
        metrics.time_call("GetDevice", 10)
        metrics.count_late_answers(tenant, 1, 10)
        metrics.count_call("GetDevice", "OK", "")
    total = Metrics()
    for metrics in (first, second):
        add_counts(total, counts_of(metrics))
    assert total.steps == {"a": [0, 2, 0, 0], "b": [0, 1, 0, 0]}
    assert (total.call_buckets["GetDevice"][0], total.call_sum_ns["GetDevice"]) == (3, 30)
    assert total.shim_late_answers == {"a": 2, "b": 1}
    # The parts are as they were: the next scrape adds them again.
    assert (first.steps, second.steps["a"]) == ({"a": [0, 1, 0, 0]}, [0, 1, 0, 0])


async def test_a_loop_that_wakes_up_late_is_counted_with_by_how_much() -> None:
    metrics = Metrics()
    now = 0
    delays = iter([0.0, 0.03])

    async def sleep(seconds: float) -> None:
        nonlocal now
        try:
            now += int((seconds + next(delays)) * 1e9)
        except StopIteration:
            raise asyncio.CancelledError from None

    with pytest.raises(asyncio.CancelledError):
        await watch_loop(metrics, lambda: now, sleep)
    assert PERIOD_SECONDS == 0.25
    assert metrics.lag_sum_ns == pytest.approx(30_000_000)
    assert metrics.lag_buckets[0] == 1
    assert metrics.lag_buckets[LAG_BOUNDS_SECONDS.index(50e-3)] == 1
