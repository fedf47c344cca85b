"""Step quotas: which tenants are over max_steps_per_second.

The counts of the engines are there anyway, leased steps in them; they are read once a second and nothing is done per
step. What a tenant took beyond its rate is its excess: it grows by the steps taken, falls by what is allowed, and never
below zero. A tenant is over its rate from the moment its excess passes BURST_SECONDS' worth until it is back at zero.
Two seconds, because shims report leased steps once a second: a fleet at its limit is never over it by the rhythm of its
reports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oracle_server.errors import QuotaExceeded
from oracle_server.state import names
from oracle_server.state.engines import EngineRecord
from oracle_server.state.experiments import Experiments, Followers, LiveExperiment
from oracle_server.state.store import OVER_RATE_DETACH, TenantRow

BURST_SECONDS = 2.0


@dataclass(slots=True)
class Rate:
    """One limited tenant. Written by the event loop only."""

    limit: int
    detach: bool
    excess: float = 0.0
    over: bool = False
    over_seconds: float = 0.0


class StepRates:
    """Owns the rates of the tenants that have a limit. Event loop only; a scrape on another thread reads."""

    def __init__(self, experiments: Experiments, *, monotonic: Callable[[], float], followers: Followers) -> None:
        self._experiments = experiments
        self._followers = followers
        self._monotonic = monotonic
        self._checked = monotonic()
        self.rates: dict[str, Rate] = {}
        # The tenants over their rate whose policy is to detach.
        self.refused: frozenset[str] = frozenset()

    def limit(self, row: TenantRow) -> None:
        """Hold a tenant to its quota from now on."""
        known = self.rates.get(row.tenant)
        detach = row.over_rate == OVER_RATE_DETACH
        if not row.max_steps_per_second:
            if self.rates.pop(row.tenant, None) is not None:
                self._clear(row.tenant)
        elif known is not None:
            known.limit, known.detach = row.max_steps_per_second, detach
        else:
            self.rates[row.tenant] = Rate(row.max_steps_per_second, detach)
            # What was taken before there was a limit does not count.
            self._take(row.tenant)
        self._refuse()

    def check_tenant(self, tenant: str) -> None:
        """QuotaExceeded where the tenant's steps are refused for now."""
        if tenant in self.refused:
            raise over_rate(tenant)

    async def check(self) -> None:
        """Add up what was taken since the last check; mark, and by policy detach, the engines of who is over."""
        if not self.rates:
            self._checked = self._monotonic()
            return
        await self._followers.count()
        now = self._monotonic()
        seconds, self._checked = now - self._checked, now
        for tenant, rate in list(self.rates.items()):
            steps, active = self._take(tenant)
            allowance = rate.limit * BURST_SECONDS
            # Bounded, so that falling back takes as long as running ahead was allowed, not as long as it lasted.
            rate.excess = min(max(0.0, rate.excess + steps - rate.limit * seconds), 2 * allowance)
            if rate.over:
                rate.over_seconds += seconds
            rate.over = rate.excess > (0.0 if rate.over else allowance)
            if not rate.over:
                self._clear(tenant)
                continue
            for engine in active:
                engine.degraded = True
                if rate.detach and engine.stream is not None:
                    engine.stream.end(over_rate(tenant))
        self._refuse()

    def degraded(self, tenant: str) -> int:
        """How many of its engines are marked; called on any thread."""
        return sum(engine.degraded for live in self._of(tenant) for engine in list(live.engines.values()))

    def _take(self, tenant: str) -> tuple[int, list[EngineRecord]]:
        """(steps since the last call, the engines that took some)."""
        total, active = 0, []
        for live in self._of(tenant):
            sampled = live.sampled_steps + live.sampled_elsewhere
            total += sampled - live.rated_steps
            live.rated_steps = sampled
            for engine in live.engines.values():
                steps = engine.counts.steps - engine.rated_steps
                engine.rated_steps = engine.counts.steps
                if steps > 0:
                    total += steps
                    active.append(engine)
        return total, active

    def _clear(self, tenant: str) -> None:
        for live in self._of(tenant):
            for engine in live.engines.values():
                engine.degraded = False

    def _refuse(self) -> None:
        self.refused = frozenset(tenant for tenant, rate in self.rates.items() if rate.over and rate.detach)

    def _of(self, tenant: str) -> list[LiveExperiment]:
        return [live for live in list(self._experiments.all()) if live.tenant == tenant]


def over_rate(tenant: str) -> QuotaExceeded:
    """The refusal of a step."""
    return QuotaExceeded(
        f"{names.tenant_name(tenant)} is over its max_steps_per_second and its policy is to detach; start fewer "
        "engines, or have the quota raised (`step-oracle tenant update`)"
    )
