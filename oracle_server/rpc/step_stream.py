"""One StreamSteps call: the hot path.

Per step: read the experiment's snapshot once, check the step, draw, fill the reply. No logging, parsing, compiling or
thread hop. One task reads, answers and writes; an activation pushes the new generation through the same writer, under
its lock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from time import perf_counter_ns
from typing import Any, Protocol

import grpc
from grpc.aio import EOF  # type: ignore[attr-defined]

from oracle_server.errors import InvalidArgument, NotFound, OracleError
from oracle_server.rpc import spans, wire
from oracle_server.rpc.leases import Leases
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.shadowing import Shadowing, shadowing_of
from oracle_server.rpc.status import abort, internal
from oracle_server.sampling.answer import SUPPORT_EXTRAPOLATED
from oracle_server.sampling.shape import StepQuery
from oracle_server.state.engines import EngineRecord
from oracle_server.state.experiments import LiveExperiment, not_here_yet
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.node import Node
from oracle_server.state.snapshot import EnginePlan, StepAnswer
from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import step_pb2

BREAK_SECONDS = 0.005
CLOSED = "closed by the engine"
AGED = "old"
# What an engine without leases may wait for a message of its own that tells a new generation.
UNHURRIED_SECONDS = 0.005
# How much the ages of streams differ: those that were opened together do not end together.
AGE_SPREAD = 0.2


class Events(Protocol):
    """Where bounded events go; never blocks."""

    def info(self, event: str, **values: Any) -> Any:
        """Say that something happened."""


class StepStream:
    """Owned by its handler task; `announce` and `end` are called by other tasks of the same loop."""

    def __init__(
        self,
        node: Node,
        metrics: Metrics,
        events: Events,
        context: grpc.aio.ServicerContext[Any, Any],
        *,
        pushes: asyncio.Semaphore,
        leases: bool,
        max_age_seconds: float = 0.0,
    ) -> None:
        """`pushes`: so many of the loop's streams tell a new generation in one turn of it. `max_age_seconds` 0: the
        stream lasts as long as its engine wants.
        """
        self._node = node
        self._metrics = metrics
        self._events = events
        self._context = context
        self._writing = asyncio.Lock()
        # The handler's task; it may be cancelled only while it waits for the engine's next message.
        self._task: asyncio.Task[Any] | None = None
        self._is_reading = False
        self._ending: OracleError | None = None
        self._max_age_seconds = max_age_seconds
        self._aged = False
        self._plan: EnginePlan | None = None
        # The engine's steps beside those of the generation's shadow pack, where it has one.
        self._shadowing: Shadowing | None = None
        self._said_error = False
        # The steps of its tenant by support, once it is open.
        self._steps_by_support: list[int] = []
        # None: this engine, or this server, goes without.
        self._leases = Leases() if leases else None
        # The newest generation that is to be told, and the one that a reply or a push tells.
        self._announced = self._told = 0
        self._pushes = pushes
        self._pushing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Answer until the engine closes its side, an error or the server's end."""
        metrics = self._metrics
        metrics.streams += 1
        # Once: asking for the running loop asks the kernel for the process's number (CPython 3.11).
        self._task = asyncio.current_task()
        code, reason = "CANCELLED", ""
        try:
            await self._serve()
            code = "OK"
        except OracleError as error:
            code, reason = error.code, error.reason
            await abort(self._context, error)
        except Exception as error:  # noqa: BLE001 - the edge: it is logged with its trace and answered
            failure = internal("StreamSteps", error)
            code, reason = failure.code, failure.reason
            await abort(self._context, failure)
        finally:
            metrics.streams -= 1
            metrics.count_call("StreamSteps", code, reason)
            if self._pushing is not None:
                self._pushing.cancel()

    def announce(self, generation: int) -> None:
        """Push the new generation, unless a reply tells it before; several in a row become one message."""
        self._announced = generation
        if self._pushing is None or self._pushing.done():
            self._pushing = asyncio.create_task(self._push())

    def end(self, error: OracleError) -> None:
        """End the stream with the error: at once while it waits for the engine, else after the message in work."""
        if self._ending is None:
            self._ending = error
        self._stop_reading()

    def _retire(self) -> None:
        """End the stream between two messages, without an error: its engine opens another, here or at a replica."""
        self._aged = True
        self._stop_reading()

    def _stop_reading(self) -> None:
        if self._is_reading and self._task is not None:
            self._task.cancel()

    async def _serve(self) -> None:
        first = await self._read()
        if first is EOF:
            raise InvalidArgument("the stream ended before its first message, which carries `open`", field="open")
        if not first.HasField("open"):
            raise InvalidArgument(
                "the first message of a stream carries `open`; nothing is answered before", field="open"
            )
        if not first.open.leases:
            self._leases = None
        identity = wire.read_identity(first.open.engine)
        live, record = await self._open(first, identity)
        self._steps_by_support = self._metrics.steps_of(live.tenant)
        why = "cancelled"
        aging = self._age()
        try:
            opened = pb.StreamOpened(incarnation=record.incarnation, generation=live.snapshot.generation)
            await self._answer(first, live, record, identity, pb.StreamStepsResponse(opened=opened))
            spans.opened(live.name, identity.engine_id, opened.generation)
            while (request := await self._read()) is not EOF:
                if request.HasField("open"):
                    raise InvalidArgument("`open` belongs to the first message of a stream only", field="open")
                if live.snapshot.generation < request.min_generation:
                    await self._node.catch_up(live, request.min_generation)
                await self._answer(request, live, record, identity, pb.StreamStepsResponse())
            if self._aged:
                why = AGED
                return
            # A broken connection reads as the end too (grpcio 1.85); its cancellation follows with the next turns.
            await asyncio.sleep(BREAK_SECONDS)
            why = CLOSED
        except OracleError as error:
            why = error.reason
            raise
        finally:
            if aging is not None:
                aging.cancel()
            await self._node.attachments.close_stream(record, self, by_engine=why == CLOSED)
            # Old ones end all the time.
            if why != AGED:
                self._events.info(
                    "stream closed", experiment=live.name, engine=identity.engine_id, why=why, steps=record.counts.steps
                )

    def _age(self) -> asyncio.TimerHandle | None:
        if not self._max_age_seconds:
            return None
        spread = random.uniform(1 - AGE_SPREAD, 1 + AGE_SPREAD)  # noqa: S311
        return asyncio.get_running_loop().call_later(self._max_age_seconds * spread, self._retire)

    async def _open(
        self, first: pb.StreamStepsRequest, identity: EngineIdentity
    ) -> tuple[LiveExperiment, EngineRecord]:
        """Its experiment and its record. What this server may not know yet is no reason to end an engine."""
        seen = first.min_generation
        try:
            await self._node.tenant_of(identity.experiment)
            # Before anything is compared with the engine: the rules and packs of an older generation do not bind it.
            await self._node.catch_up(self._node.experiments.find(identity.experiment), seen)
            return await self._node.attachments.open_stream(
                identity,
                wire.read_facts(first.open.config),
                first.open.incarnation,
                frozenset(first.open.allow_mismatch),
                self,
            )
        except NotFound as error:
            raise not_here_yet(error, seen) from None

    async def _read(self) -> Any:
        """The engine's next message; EOF where it closes its side, or where the stream is old."""
        self._raise_ending()
        if self._aged:
            return EOF
        self._is_reading = True
        try:
            return await self._context.read()
        except asyncio.CancelledError:
            if (self._ending is None and not self._aged) or self._task is None:
                raise
            self._task.uncancel()
        finally:
            self._is_reading = False
        self._raise_ending()
        return EOF

    def _raise_ending(self) -> None:
        if self._ending is not None:
            raise self._ending

    async def _answer(
        self,
        request: pb.StreamStepsRequest,
        live: LiveExperiment,
        record: EngineRecord,
        identity: EngineIdentity,
        response: pb.StreamStepsResponse,
    ) -> None:
        """Answer one message. What comes before a step that cannot be answered is sent before the error."""
        if request.HasField("counts"):
            self._count(request.counts, live.tenant, record)
        failure: OracleError | None = None
        if steps := request.steps:
            begin = perf_counter_ns()
            try:
                self._answer_steps(steps, request.min_generation, live, record, identity, response)
            except OracleError as error:
                failure = error
            self._metrics.count_message(perf_counter_ns() - begin)
        elif request.HasField("counts") and not response.HasField("opened"):
            # The engine lives from its leases: so it hears that this server does, and at which generation.
            response.new_generation = self._told = live.snapshot.generation
        if response.replies or response.HasField("opened") or response.new_generation:
            async with self._writing:
                await self._context.write(response)
        if self._shadowing is not None:
            self._shadowing.compare()
        if failure is not None:
            raise failure

    def _answer_steps(
        self,
        steps: Iterable[step_pb2.StepRequest],
        min_generation: int,
        live: LiveExperiment,
        record: EngineRecord,
        identity: EngineIdentity,
        response: pb.StreamStepsResponse,
    ) -> None:
        counts = record.counts
        steps_by_support = self._steps_by_support
        leases = self._leases
        replies = response.replies
        for step in steps:
            snapshot = live.snapshot
            plan = self._plan
            if plan is None or plan.snapshot is not snapshot:
                plan = self._plan = snapshot.plan(identity)
                self._told = plan.generation
                self._shadowing = shadowing_of(live, snapshot, identity)
            if plan.generation < min_generation:
                snapshot.check_generation(min_generation)
            query, drafts, new_requests = wire.read_step(step)
            step_index, device_time_ns = step.step_index, step.device_time_ns
            answer = plan.answer(step_index, query, drafts, new_requests, device_time_ns, step.device_idle_ns)
            reply = replies.add()
            wire.write_reply(reply, step_index, plan.generation, answer)
            if not plan.leasable:
                self._watch(record, step_index, query, device_time_ns, answer)
            elif leases is not None and not query.chunk_tokens and not drafts:
                leases.grant(reply, plan, query)
            counts.steps += 1
            steps_by_support[answer.support] += 1
            if answer.support == SUPPORT_EXTRAPOLATED:
                counts.extrapolated_steps += 1

    def _watch(
        self, record: EngineRecord, step_index: int, query: StepQuery, device_time_ns: int, answer: StepAnswer
    ) -> None:
        """A step of an engine without leases: its faults are counted, and its shadow comes after the reply."""
        if self._shadowing is not None:
            self._shadowing.take(step_index, query, device_time_ns, answer)
        if answer.stall_ns:
            self._metrics.injected_stalls += 1
        if answer.is_error:
            self._metrics.injected_errors += 1
            identity = record.identity
            # An engine ends by its first one; whoever goes on asking fills no log.
            if not self._said_error:
                self._said_error = True
                self._events.info(
                    "injected error", experiment=identity.experiment, engine=identity.engine_id, step=step_index
                )

    def _count(self, counts: pb.ShimCounts, tenant: str, record: EngineRecord) -> None:
        metrics = self._metrics
        steps_by_support = self._steps_by_support
        # Steps this server did not see: with them its own counts are complete.
        record.counts.steps += counts.leased_steps
        for support, steps in enumerate(counts.leased_steps_by_support[: len(steps_by_support)]):
            steps_by_support[support] += steps
            if support == SUPPORT_EXTRAPOLATED:
                record.counts.extrapolated_steps += steps
        record.counts.late_answers += counts.late_answers
        record.counts.leased_steps += counts.leased_steps
        record.counts.reconnects += counts.reconnects
        metrics.shim_steps += counts.steps
        metrics.shim_leased_steps += counts.leased_steps
        metrics.count_late_answers(tenant, counts.late_answers, counts.late_answer_ns)
        metrics.shim_reconnects += counts.reconnects
        metrics.shim_lateness_sum_ns += counts.lateness_sum_ns
        # An older shim may know fewer buckets, a newer one more: what does not fit is left out.
        buckets = counts.lateness_buckets[: len(metrics.shim_lateness_buckets)]
        for i, count in enumerate(buckets):
            metrics.shim_lateness_buckets[i] += count
        record.counts.add_lateness(buckets)
        record.counts.lateness_sum_ns += counts.lateness_sum_ns
        record.counts.saturate()

    async def _push(self) -> None:
        while self._told < self._announced:
            if self._leases is None:
                # The reply to its next step tells it, unless that is long.
                await asyncio.sleep(UNHURRIED_SECONDS)
            # A few streams in each turn of the loop, as answers come before: not longer, one may not take its message.
            async with self._pushes:
                await asyncio.sleep(0)
            async with self._writing:
                if self._told < self._announced:
                    self._told = self._announced
                    await self._context.write(pb.StreamStepsResponse(new_generation=self._told))
