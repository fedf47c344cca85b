"""The counts of all processes of a server, summed at each scrape."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from oracle_server.rpc.exposition import Labels, MetricsCollector
from oracle_server.rpc.metrics import Metrics
from oracle_server.state.engines import COUNT_LIMIT
from oracle_server.state.experiments import Experiments

SCRAPE_SECONDS = 2.0


class SummedCollector(Collector):
    """Asks for the sum of all processes and turns it into metric families. Called on the scrape's thread."""

    def __init__(
        self,
        total: Callable[[], Coroutine[Any, Any, Metrics]],
        experiments: Experiments,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._total = total
        self._experiments = experiments
        self._loop = loop
        self._tenants, self._names = Labels(), Labels()

    def collect(self) -> Iterable[Metric]:
        """All families."""
        metrics = asyncio.run_coroutine_threadsafe(self._total(), self._loop).result(SCRAPE_SECONDS)
        return MetricsCollector(metrics, self._experiments, self._tenants, self._names).collect()


def counts_of(metrics: Metrics) -> dict[str, Any]:
    """The counts by name, as they are now; what shims say may be larger than a message between processes can hold."""
    return {name: _bounded(value) for name, value in vars(metrics).items()}


def _bounded(value: Any) -> Any:
    """A copy, its numbers at most COUNT_LIMIT."""
    if isinstance(value, dict):
        return {key: _bounded(part) for key, part in value.items()}
    return [min(part, COUNT_LIMIT) for part in value] if isinstance(value, list) else min(value, COUNT_LIMIT)


def add_counts(total: Metrics, part: Mapping[str, Any]) -> None:
    """Add numbers, lists element by element, tables key by key."""
    for name, value in part.items():
        setattr(total, name, _sum(getattr(total, name), value))


def _sum(known: Any, value: Any) -> Any:
    """The sum; tables and lists are added to in place."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            known[key] = _sum(known[key], part) if key in known else copy.copy(part)
        return known
    if isinstance(value, list):
        known[:] = [count + part for count, part in zip(known, value, strict=True)]
        return known
    return known + value
