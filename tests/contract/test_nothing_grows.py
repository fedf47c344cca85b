"""What comes and goes leaves nothing behind: after as many cycles again the server holds what it held before."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from weakref import ReferenceType

import grpc
import pytest

from oracle_calls import EXPERIMENT, decode, identity, prefill
from oracle_server.rpc.metrics import Metrics
from oracle_server.server import add_services
from oracle_server.state.binding import Binding, Overlay
from oracle_server.state.node import Node
from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import oracle_service_pb2_grpc

# Multiples of the ways of `cycle` and `activate`; the warm-up fills the books of shadows that are kept.
WARM_UP, CYCLES = 18, 18
# Of these modules every object counts; of all others the sum, which a leak of one object per cycle moves.
OURS = ("oracle_server.", "step_oracle.v1.", "asyncio", "_asyncio", "grpc", "weakref")


class Silence:
    """Takes events."""

    def info(self, event: str, **values: Any) -> None:
        """Says nothing."""


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    opened = Node(tmp_path / "state")
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
async def digests(node: Node, pack_dirs: dict[str, Path]) -> list[str]:
    """Three kinds of packs, stored; the experiment `default` answers from the first."""
    stored = []
    for name in ("composed", "sampled", "hybrid"):
        directory = pack_dirs[name]
        async with node.packs.upload("default", (directory / "manifest.json").read_bytes()) as upload:
            for entry in upload.manifest.files:
                await node.packs.write(upload, entry.name, (directory / entry.name).read_bytes())
            row, _, _ = await node.packs.keep("default", upload, check_only=False)
        stored.append(row.digest)
    await node.experiments.create("default", "default", Binding(default_pack_digest=stored[0], seed=1))
    return stored


@pytest.fixture
async def stub(node: Node, tmp_path: Path) -> AsyncIterator[Any]:
    """A real channel to the services of the node, in this process."""
    server = grpc.aio.server()
    add_services(server, node, Metrics(), Silence(), leases=True)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        yield oracle_service_pb2_grpc.OracleServiceStub(channel)
    await server.stop(1)


async def cycle(stub: Any, node: Node, digests: list[str], number: int) -> None:
    """Engines come, are answered, swapped under, refused and go, each in a way of its own."""
    engine = identity(f"vllm-{number % 3}")
    attached = await stub.AttachEngine(pb.AttachEngineRequest(engine=engine))
    call = stub.StreamSteps()
    opening = pb.StreamOpen(engine=engine, incarnation=attached.incarnation, leases=True)
    await call.write(pb.StreamStepsRequest(open=opening))
    assert (await call.read()).opened.incarnation == attached.incarnation
    generation = 0
    for step in range(6):
        if step == 3:
            generation = await activate(node, digests, number)
        request = decode(step, requests=1 + step, context=400 * (1 + step)) if step else prefill(step, (64, 0))
        counts = pb.ShimCounts(steps=step, leased_steps=1, lateness_buckets=[1, 0, 2])
        await call.write(pb.StreamStepsRequest(steps=[request], counts=counts, min_generation=generation))
        while not (message := await call.read()).replies:
            pass
        assert message.replies[0].generation >= generation
    await stub.SampleStep(pb.SampleStepRequest(engine=engine, steps=[decode(7)]))
    if number % 3 == 0:
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF  # type: ignore[attr-defined]
    elif number % 3 == 1:
        call.cancel()
    else:
        await call.write(pb.StreamStepsRequest(open=opening))
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError, match="no experiment"):
        await stub.SampleStep(pb.SampleStepRequest(engine=identity("e", f"{EXPERIMENT}-that-is-not")))
    await gone(node)


async def activate(node: Node, digests: list[str], number: int) -> int:
    """Another pack, now and then with an overlay or a shadow."""
    binding = Binding(
        default_pack_digest=digests[number % 3],
        seed=number,
        overlays=(Overlay(slow_down_factor=1.5),) if number % 3 == 0 else (),
        shadow_pack_digest=digests[(number + 1) % 3] if number % 2 else "",
    )
    activation = await node.experiments.activate(EXPERIMENT, binding, 0, frozenset(), validate_only=False)
    return activation.record.generation


async def gone(node: Node) -> None:
    """Wait until no engine has a stream."""
    live = node.experiments.find(EXPERIMENT)
    async with asyncio.timeout(20):
        while any(e.stream is not None for e in live.engines.values()):  # noqa: ASYNC110 - nobody is told of it
            await asyncio.sleep(0.005)


def held() -> tuple[Counter[str], int, int]:
    """(Objects of ours by type, all objects, open files)."""
    gc.collect()
    # A sqlite3 connection keeps up to 200 dead references to cursors before it drops them (CPython 3.11).
    objects = [o for o in gc.get_objects() if type(o) is not ReferenceType or o() is not None]
    kinds = Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in objects)
    ours = Counter({kind: count for kind, count in kinds.items() if kind.startswith(OURS)})
    return ours, len(objects), len(list(Path("/proc/self/fd").iterdir()))


async def settled() -> tuple[Counter[str], int, int]:
    """The same, once what the last call left to the loop is done: the least of a few looks."""
    looks = []
    for _ in range(5):
        await asyncio.sleep(0.02)
        looks.append(held())
    return min(looks, key=lambda look: (look[0].total(), look[1]))


async def test_engines_steps_and_activations_leave_nothing(stub: Any, node: Node, digests: list[str]) -> None:
    for number in range(WARM_UP):
        await cycle(stub, node, digests, number)
    # The first look leaves something itself: whether a generator is a Mapping, in the cache of every class asked.
    held()
    before, all_before, files_before = await settled()
    for number in range(WARM_UP, WARM_UP + CYCLES):
        await cycle(stub, node, digests, number)
    after, all_after, files_after = await settled()
    grown = {kind: (before[kind], count) for kind, count in after.items() if count > before[kind]}
    assert grown == {}
    assert all_after - all_before < CYCLES
    assert files_after == files_before
