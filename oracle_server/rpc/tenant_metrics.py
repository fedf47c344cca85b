"""What Prometheus reads of the tenants that have a step quota."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from oracle_server.state.rates import StepRates

MAX_TENANT_LABELS = 100


class TenantCollector(Collector):
    """Turns the step rates into metric families at each scrape, on the scrape's thread."""

    def __init__(self, rates: StepRates) -> None:
        self._rates = rates

    def collect(self) -> Iterable[Metric]:
        """All families; none where no tenant has a step quota."""
        over = GaugeMetricFamily(
            "step_oracle_tenant_over_rate", "1 while the tenant is over max_steps_per_second.", labels=["tenant"]
        )
        seconds = CounterMetricFamily(
            "step_oracle_tenant_over_rate_seconds", "Time over max_steps_per_second.", labels=["tenant"]
        )
        degraded = GaugeMetricFamily(
            "step_oracle_tenant_degraded_engines", "Engines marked degraded.", labels=["tenant"]
        )
        # The event loop may add a tenant meanwhile: list() copies in one step.
        rates = list(self._rates.rates.items())[:MAX_TENANT_LABELS]
        for tenant, rate in rates:
            over.add_metric([tenant], rate.over)
            seconds.add_metric([tenant], rate.over_seconds)
            degraded.add_metric([tenant], self._rates.degraded(tenant))
        if rates:
            yield from (over, seconds, degraded)
