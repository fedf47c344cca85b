"""Engines come and go by a clock that tests move."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import pytest

from oracle_server.errors import EngineIdTaken, EngineMismatch, ExperimentNotFound, OracleError, QuotaExceeded
from oracle_server.pack import Device, EngineFacts
from oracle_server.state.binding import Binding
from oracle_server.state.engines import ATTACH_SECONDS, LINGER_SECONDS
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.node import Node
from oracle_server.state.store import TenantRow

NAME = "tenants/default/experiments/default"
ENGINE = EngineIdentity(NAME, "a", {}, "m", 1)
AddPack = Callable[..., Awaitable[str]]


class Moves(Protocol):
    seconds: float


class Stream:
    def __init__(self) -> None:
        self.announced: list[int] = []
        self.ended: list[OracleError] = []

    def announce(self, generation: int) -> None:
        self.announced.append(generation)

    def end(self, error: OracleError) -> None:
        self.ended.append(error)


async def attach(node: Node, engine: EngineIdentity = ENGINE, **facts: int) -> int:
    attached = await node.attachments.attach(engine, EngineFacts(**facts), 0, frozenset())  # type: ignore[arg-type]
    return attached.incarnation


async def lose_stream(node: Node) -> None:
    """An engine attaches, opens its stream and loses it."""
    stream = Stream()
    await attach(node)
    _, record = await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), stream)
    await node.attachments.close_stream(record, stream, by_engine=False)


def open_during(change: str, node: Node, stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine comes back while the store's thread makes this change."""
    loop, make = asyncio.get_running_loop(), getattr(node._records.store, change)

    def meanwhile(*arguments: object) -> object:
        opening = node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), stream)
        asyncio.run_coroutine_threadsafe(opening, loop).result(10)
        return make(*arguments)

    monkeypatch.setattr(node._records.store, change, meanwhile)


async def test_an_id_is_held_for_thirty_seconds_without_a_stream(node: Node, digest: str, clock: Moves) -> None:
    assert await attach(node) == 1
    clock.seconds += ATTACH_SECONDS - 0.1
    with pytest.raises(EngineIdTaken, match="attached 30 s ago"):
        await attach(node)
    clock.seconds += 0.2
    assert await attach(node) == 2


async def test_an_engine_that_hangs_up_while_its_stream_opens_leaves_its_id_free(node: Node, digest: str) -> None:
    await attach(node)
    # Something is to be checked: it waits for its turn.
    facts = EngineFacts(max_num_seqs=7)
    async with node._records.changing:
        opening = asyncio.create_task(node.attachments.open_stream(ENGINE, facts, 1, frozenset(), Stream()))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    # Changes are made one after another: this one comes after the opening, whose undoing takes some turns of the loop.
    await node.experiments.join(_nothing)
    for _ in range(10):
        await asyncio.sleep(0)
    record = node.experiments.find(NAME).engines["a"]
    assert (record.stream, record.ended, record.closed) == (None, True, False)
    assert await attach(node) == 2


async def _nothing(rows: object) -> None:
    """A follower that needs nothing."""


async def test_an_open_stream_holds_the_id_for_ever(node: Node, digest: str, clock: Moves) -> None:
    stream = Stream()
    await attach(node)
    live, record = await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), stream)
    clock.seconds += 1e6
    with pytest.raises(EngineIdTaken, match="has an open stream"):
        await attach(node)
    assert node.engines_of(live) == [record]
    await node.attachments.close_stream(record, stream, by_engine=False)
    assert node.engines_of(live) == []
    assert await attach(node) == 2


async def test_the_end_of_a_replaced_stream_does_not_free_the_id(node: Node, digest: str) -> None:
    old, new = Stream(), Stream()
    await attach(node)
    _, record = await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), old)
    await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), new)
    assert len(old.ended) == 1
    await node.attachments.close_stream(record, old, by_engine=False)
    assert record.stream is new


async def test_an_engine_that_comes_back_as_it_was_waits_for_no_change_and_no_database(
    node: Node, digest: str, clock: Moves
) -> None:
    stream = Stream()
    await attach(node)
    async with node._records.changing:
        live, record = await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), stream)
        assert (record.stream, record.facts.num_kv_blocks) == (stream, 10000)
        await node.attachments.close_stream(record, stream, by_engine=False)
        clock.seconds += ATTACH_SECONDS - 1
        for at, facts, incarnation, allowed in (
            (0, EngineFacts(max_num_seqs=7), 1, frozenset[str]()),
            (0, EngineFacts(), 2, frozenset[str]()),
            (0, EngineFacts(), 1, frozenset({"block_size"})),
            # Its place may be another's by now.
            (2, EngineFacts(), 1, frozenset[str]()),
        ):
            clock.seconds += at
            opening = node.attachments.open_stream(ENGINE, facts, incarnation, allowed, Stream())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(opening, 0.05)
            assert live.engines["a"].stream is None


async def test_an_activation_under_way_reaches_an_engine_that_comes_back_meanwhile(
    node: Node, digest: str, add_pack: AddPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream()
    other = await add_pack(20_000_000)
    await attach(node)
    open_during("add_generation", node, stream, monkeypatch)
    binding = Binding(default_pack_digest=other)
    await node.experiments.activate(NAME, binding, 0, frozenset(), validate_only=False)
    record = node.experiments.find(NAME).engines["a"]
    assert (stream.announced, record.stream, record.accepted_digest) == ([2], stream, other)


async def test_who_comes_back_while_its_id_is_given_away_is_ended(
    node: Node, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Stream()
    await lose_stream(node)
    open_during("attach_engine", node, late, monkeypatch)
    assert await attach(node) == 2
    (error,) = late.ended
    assert isinstance(error, EngineIdTaken)
    assert "attached again since (incarnation 2, yours is 1)" in str(error)
    assert node.experiments.find(NAME).engines["a"].stream is None


async def test_the_stream_of_an_engine_that_has_attached_again_at_another_server_is_ended_by_its_successor_s(
    node: Node, digest: str
) -> None:
    old, new = Stream(), Stream()
    await attach(node)
    await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), old)
    # Written there, and not heard of here.
    assert await node._records.call(node._records.store.attach_engine, "default", "default", "a", digest, "b", b"") == 2
    live, record = await node.attachments.open_stream(ENGINE, EngineFacts(), 2, frozenset(), new)
    assert "attached again since (incarnation 2, yours is 1)" in str(old.ended[0])
    assert (live.engines["a"], record.stream, new.ended) == (record, new, [])


async def test_who_comes_back_while_its_experiment_is_deleted_is_ended(
    node: Node, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Stream()
    await lose_stream(node)
    open_during("delete_experiment", node, late, monkeypatch)
    await node.experiments.delete(NAME)
    (error,) = late.ended
    assert isinstance(error, ExperimentNotFound)


async def test_engines_that_are_gone_are_forgotten_and_come_back_with_their_counts_before(
    node: Node, digest: str, clock: Moves
) -> None:
    stream = Stream()
    await attach(node)
    live, record = await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), stream)
    record.counts.steps = 5
    await node.attachments.close_stream(record, stream, by_engine=False)
    clock.seconds += 60
    _, again = await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), stream)
    assert again.counts.steps == 5
    await node.attachments.close_stream(again, stream, by_engine=True)
    clock.seconds += LINGER_SECONDS + 1
    await attach(node, EngineIdentity(NAME, "b", {}, "m", 1))
    assert set(live.engines) == {"b"}


async def test_kv_blocks_scaled_for_an_engine_do_not_refuse_its_own_pack(
    node: Node, digest: str, add_pack: AddPack
) -> None:
    """The blocks another pack would give this engine are compared, not the count in its manifest."""
    attached = await node.attachments.attach(
        ENGINE, EngineFacts(block_size=16, num_gpu_blocks_override=77), 0, frozenset()
    )
    assert (attached.kv_blocks.blocks, attached.kv_blocks.source) == (0, "engine_override")
    facts = EngineFacts(block_size=16, num_gpu_blocks_override=77, num_kv_blocks=77)
    await node.attachments.open_stream(ENGINE, facts, 1, frozenset(), Stream())
    other = await add_pack(20_000_000, kv_blocks=5)
    await node.experiments.activate(NAME, Binding(default_pack_digest=other), 0, frozenset(), validate_only=False)


async def test_blocks_a_running_engine_has_are_frozen(node: Node, digest: str, add_pack: AddPack) -> None:
    await attach(node, block_size=16)
    other = await add_pack(20_000_000, kv_blocks=5)
    with pytest.raises(EngineMismatch, match="num_kv_blocks: the pack has 5, the engine 10000"):
        await node.experiments.activate(NAME, Binding(default_pack_digest=other), 0, frozenset(), validate_only=False)
    allowed = frozenset({"num_kv_blocks"})
    done = await node.experiments.activate(NAME, Binding(default_pack_digest=other), 0, allowed, validate_only=False)
    assert done.record.generation == 2


async def test_a_device_changed_since_it_was_shown_is_told(node: Node, digest: str, add_pack: AddPack) -> None:
    other = await add_pack(20_000_000, device=Device(name="Other Device", memory_bytes=1 << 30))
    await node.experiments.activate(NAME, Binding(default_pack_digest=other), 0, frozenset(), validate_only=False)
    attached = await node.attachments.attach(ENGINE, EngineFacts(), 1, frozenset())
    (difference,) = attached.differences
    assert (difference.field, difference.severity) == ("device", "warn")
    assert "Other Device" in attached.warnings[0]
    engine = EngineIdentity(NAME, "b", {}, "m", 1)
    assert (await node.attachments.attach(engine, EngineFacts(), 2, frozenset())).differences == ()


async def test_an_activation_is_announced_to_open_streams(node: Node, digest: str) -> None:
    stream = Stream()
    await attach(node)
    await node.attachments.open_stream(ENGINE, EngineFacts(), 1, frozenset(), stream)
    binding = Binding(default_pack_digest=digest, seed=9)
    await node.experiments.activate(NAME, binding, 0, frozenset(), validate_only=True)
    assert stream.announced == []
    await node.experiments.activate(NAME, binding, 0, frozenset(), validate_only=False)
    assert stream.announced == [2]


async def test_quotas_of_the_tenant_hold(node: Node, digest: str, add_pack: AddPack) -> None:
    await node.tenants.update(TenantRow("default", max_engines=1, max_packs=1))
    await attach(node)
    with pytest.raises(QuotaExceeded, match="1 engines attached; allowed: 1"):
        await attach(node, EngineIdentity(NAME, "b", {}, "m", 1))
    with pytest.raises(QuotaExceeded, match="1 packs; allowed: 1"):
        await add_pack(20_000_000)
