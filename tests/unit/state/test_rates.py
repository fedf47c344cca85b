"""Step quotas by a clock that tests move: who is over, who is marked, who is ended."""

from __future__ import annotations

from typing import Protocol

import pytest

from oracle_server.errors import OracleError, QuotaExceeded
from oracle_server.pack import EngineFacts
from oracle_server.state.engines import EngineRecord
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.node import Node
from oracle_server.state.store import TenantRow

NAME = "tenants/default/experiments/default"
LIMIT = 100


class Moves(Protocol):
    seconds: float


class Stream:
    def __init__(self) -> None:
        self.ended: list[OracleError] = []

    def announce(self, generation: int) -> None:
        """Nothing to tell."""

    def end(self, error: OracleError) -> None:
        self.ended.append(error)


async def join(node: Node, engine_id: str) -> tuple[EngineRecord, Stream]:
    engine, stream = EngineIdentity(NAME, engine_id, {}, "m", 1), Stream()
    attached = await node.attachments.attach(engine, EngineFacts(), 0, frozenset())
    _, record = await node.attachments.open_stream(engine, EngineFacts(), attached.incarnation, frozenset(), stream)
    return record, stream


async def second(node: Node, clock: Moves, **steps: EngineRecord | int) -> None:
    """One second in which each engine takes so many steps: a=record, a_steps=number."""
    for name, record in steps.items():
        if isinstance(record, EngineRecord):
            record.counts.steps += int(steps[f"{name}_steps"])  # type: ignore[arg-type]
    clock.seconds += 1
    await node.tenants.check_rates()


def marked(record: EngineRecord) -> bool:
    return record.degraded


async def limit(node: Node, per_second: int = LIMIT, over_rate: str = "mark") -> None:
    await node.tenants.update(TenantRow("default", max_steps_per_second=per_second, over_rate=over_rate))


async def test_a_tenant_at_its_limit_is_never_over_it_however_its_reports_bunch(
    node: Node, digest: str, clock: Moves
) -> None:
    record, _ = await join(node, "a")
    record.counts.steps = 10**6
    await limit(node)
    for i in range(60):
        # Leased steps are reported once a second: now two reports in a second, now none.
        await second(node, clock, a=record, a_steps=2 * LIMIT if i % 2 else 0)
        assert not record.degraded
        assert not node.rates.rates["default"].over


async def test_engines_that_take_steps_while_their_tenant_is_over_are_marked_until_it_has_fallen_back(
    node: Node, digest: str, clock: Moves
) -> None:
    busy, stream = await join(node, "a")
    idle, _ = await join(node, "b")
    await limit(node)
    for _ in range(3):
        await second(node, clock, a=busy, a_steps=2 * LIMIT - 34)
    assert not marked(busy)
    # 4 seconds at 166 of 100: 264 ahead, more than two seconds' worth.
    await second(node, clock, a=busy, a_steps=2 * LIMIT - 34)
    assert (busy.degraded, idle.degraded) == (True, False)
    assert node.rates.degraded("default") == 1
    await second(node, clock)
    await second(node, clock)
    assert marked(busy)
    await second(node, clock)
    assert not marked(busy)
    assert node.rates.rates["default"].over_seconds == 3
    # Marked, never ended, never slowed.
    assert stream.ended == []


async def test_by_policy_the_streams_of_who_is_over_are_ended_and_its_calls_refused_for_a_while(
    node: Node, digest: str, clock: Moves
) -> None:
    busy, stream = await join(node, "a")
    _, quiet = await join(node, "b")
    await limit(node, over_rate="detach")
    await second(node, clock, a=busy, a_steps=20 * LIMIT)
    assert [error.reason for error in stream.ended] == ["QUOTA_EXCEEDED"]
    assert quiet.ended == []
    with pytest.raises(QuotaExceeded, match="over its max_steps_per_second"):
        await node.tenant_of(NAME)
    # The control plane is there to mend it.
    await node.tenant("default")
    for _ in range(3):
        await second(node, clock)
        assert node.tenants.admission().over_rate == {"default"}
    await second(node, clock)
    await node.tenant_of(NAME)
    assert node.tenants.admission().over_rate == frozenset()


async def test_the_quota_is_the_tenants_not_the_engines_and_steps_without_a_stream_count(
    node: Node, digest: str, clock: Moves
) -> None:
    first, _ = await join(node, "a")
    other, _ = await join(node, "b")
    await limit(node)
    live = node.experiments.find(NAME)
    live.sampled_steps += LIMIT
    await second(node, clock, a=first, a_steps=LIMIT, b=other, b_steps=LIMIT)
    assert not node.rates.rates["default"].over
    live.sampled_steps += LIMIT
    await second(node, clock, a=first, a_steps=LIMIT, b=other, b_steps=LIMIT)
    assert (first.degraded, other.degraded) == (True, True)


async def test_a_limit_taken_away_marks_nobody_any_more(node: Node, digest: str, clock: Moves) -> None:
    record, _ = await join(node, "a")
    await limit(node)
    await second(node, clock, a=record, a_steps=20 * LIMIT)
    assert marked(record)
    await limit(node, 0)
    assert not marked(record)
    assert node.rates.rates == {}


async def test_max_streams_counts_engines_and_watches_and_a_replaced_stream_once(node: Node, digest: str) -> None:
    await node.tenants.update(TenantRow("default", max_streams=2))
    record, _ = await join(node, "a")
    watch = node.experiments.watch(NAME, 0)
    await anext(watch)
    with pytest.raises(QuotaExceeded, match="1 engine streams and 1 watches open; allowed together: 2"):
        await join(node, "b")
    with pytest.raises(QuotaExceeded):
        await anext(node.experiments.watch(NAME, 0))
    again = Stream()
    await node.attachments.open_stream(record.identity, EngineFacts(), record.incarnation, frozenset(), again)
    await watch.aclose()  # type: ignore[attr-defined]
    await join(node, "c")


async def test_an_engine_that_never_attached_is_bound_by_the_quota_of_engines(node: Node, digest: str) -> None:
    await node.tenants.update(TenantRow("default", max_engines=1))
    record, stream = await join(node, "a")
    stranger = EngineIdentity(NAME, "b", {}, "m", 1)
    with pytest.raises(QuotaExceeded, match="1 engines attached; allowed: 1"):
        await node.attachments.open_stream(stranger, EngineFacts(), 1, frozenset(), Stream())
    # One whose stream broke keeps its place.
    await node.attachments.close_stream(record, stream, by_engine=False)
    with pytest.raises(QuotaExceeded):
        await node.attachments.attach(stranger, EngineFacts(), 0, frozenset())
    await node.attachments.open_stream(record.identity, EngineFacts(), record.incarnation, frozenset(), Stream())
