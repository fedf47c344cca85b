"""How open streams hear of a new generation: by a reply, else by a push that lets answers go first."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from oracle_calls import decode
from oracle_server.rpc.step_stream import StepStream
from oracle_server.state.snapshot import StepAnswer
from step_oracle.v1 import oracle_service_pb2 as pb


class Context:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.generations: list[int] = []

    async def write(self, response: pb.StreamStepsResponse) -> None:
        self.generations.append(response.new_generation)


def stream_of(context: Context, pushes: asyncio.Semaphore, *, leases: bool = True) -> StepStream:
    """One that is open, on nothing but its context."""
    unused: Any = None
    stream = StepStream(unused, unused, unused, context, pushes=pushes, leases=True)  # type: ignore[arg-type]
    if not leases:
        stream._leases = None
    return stream


async def all_pushed(*streams: StepStream) -> None:
    for stream in streams:
        if stream._pushing is not None:
            await stream._pushing


def test_several_generations_in_a_row_become_one_message() -> None:
    async def told() -> list[int]:
        context = Context()
        stream = stream_of(context, asyncio.Semaphore(4))
        stream.announce(2)
        stream.announce(3)
        await all_pushed(stream)
        stream.announce(4)
        await all_pushed(stream)
        return context.generations

    assert asyncio.run(told()) == [3, 4]


def test_what_a_reply_has_told_is_not_pushed() -> None:
    async def told() -> list[int]:
        context = Context()
        stream = stream_of(context, asyncio.Semaphore(4), leases=False)
        live = experiment_at(2)
        stream.announce(2)
        # A step comes before the push.
        await answer(stream, live, pb.StreamStepsRequest(steps=[decode(7)]))
        await all_pushed(stream)
        stream.announce(3)
        await all_pushed(stream)
        return context.generations

    # The reply to the step is the first message; it has no new_generation of its own.
    assert asyncio.run(told()) == [0, 3]


def experiment_at(generation: int) -> Any:
    """An experiment whose snapshot answers each step alike."""
    snapshot = SimpleNamespace(generation=generation, experiment="e", binding=SimpleNamespace(shadow_pack_digest=""))
    step = StepAnswer(1, 0, 0, 0, (), (), 0, 0, 0.0, 0, False, 0)
    plan = SimpleNamespace(
        snapshot=snapshot, generation=generation, leasable=True, answer=lambda *_: step, key=0, residual_pool=()
    )
    snapshot.plan = lambda _: plan
    snapshot.shadow_plan = lambda _: None
    return SimpleNamespace(snapshot=snapshot)


async def answer(stream: StepStream, live: Any, request: pb.StreamStepsRequest) -> None:
    record: Any = SimpleNamespace(counts=SimpleNamespace(steps=0, extrapolated_steps=0))
    stream._steps_by_support = [0] * 4
    stream._metrics = SimpleNamespace(count_message=lambda _: None)  # type: ignore[assignment]
    identity: Any = None
    await stream._answer(request, live, record, identity, pb.StreamStepsResponse())


def test_answers_go_between_the_pushes_of_many_streams() -> None:
    async def written() -> tuple[int, int]:
        context, pushes = Context(), asyncio.Semaphore(4)
        streams = [stream_of(context, pushes) for _ in range(40)]
        for stream in streams:
            stream.announce(2)
        turns = 0
        while len(context.generations) < len(streams) // 2:
            await asyncio.sleep(0)
            turns += 1
        in_half = len(context.generations)
        await all_pushed(*streams)
        return turns, in_half

    turns, in_half = asyncio.run(written())
    # Four in a turn at most: whatever else is ready has its turn too.
    assert turns >= 5
    assert in_half <= 24


def test_a_stream_that_takes_no_message_holds_no_other_back() -> None:
    class Stuck(Context):
        async def write(self, response: pb.StreamStepsResponse) -> None:
            await asyncio.Event().wait()

    async def told() -> list[int]:
        pushes, context = asyncio.Semaphore(1), Context()
        stuck, other = stream_of(Stuck(), pushes), stream_of(context, pushes)
        stuck.announce(2)
        other.announce(2)
        await asyncio.wait_for(all_pushed(other), 30)
        assert stuck._pushing is not None
        stuck._pushing.cancel()
        return context.generations

    assert asyncio.run(told()) == [2]
