"""One shard: answers steps from its mirror of the state, hands everything else to its parent, does what it is told."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import cast

import grpc
import msgspec
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer

from oracle_server import event_loop
from oracle_server.logs import configure
from oracle_server.rpc.gate import Gate
from oracle_server.rpc.loop_lag import watch_loop
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.oracle_service import OracleService
from oracle_server.rpc.spans import open_spans
from oracle_server.server import SERVICES, add_health, bind, options
from oracle_server.shards.calls import SERVER_OPTIONS, Peer, handler_of
from oracle_server.shards.counts import counts_of
from oracle_server.shards.forwarding import Forwarding
from oracle_server.shards.messages import (
    ADMIT,
    COMPARISONS,
    COUNT,
    DRAIN,
    END_STREAM,
    FOLLOW,
    FORGET,
    PREPARE,
    SERVE,
    SET_HEALTHY,
    EndStream,
    Report,
    Serve,
    Serving,
    ShardTask,
)
from oracle_server.shards.mirror import Mirror
from oracle_server.state.node import Node
from oracle_server.tls import Certificates
from step_oracle.v1 import oracle_service_pb2_grpc

# What a shard answers itself; every other method of SERVICES is the parent's.
OWN_METHODS = tuple(f"/{SERVICES[0]}/{name}" for name in ("GetDevice", "StreamSteps", "SampleStep"))
_LIFE_LINE = 0


def main(task: str) -> None:
    """Run until the parent ends."""
    decoded = msgspec.json.decode(task, type=ShardTask)
    # The kernel ends this process with its parent (__main__), unless the parent was gone before.
    if os.getppid() == decoded.parent_pid:
        event_loop.run(Shard(decoded).run())


class Shard:
    """Owns its servers. Event loop only. Takes no connection before the parent says `serve`."""

    def __init__(self, task: ShardTask) -> None:
        self._task = task
        self._metrics = Metrics()
        self._metrics.processes = 1
        events, self._log_writer = configure(self._metrics.count_dropped_line)
        self._events = events.bind(shard=task.shard)

    async def run(self) -> None:
        """Answer until the life line is cut: the parent has drained this shard, or has died."""
        task = self._task
        parent = Peer(task.parent)
        self._mirror = Mirror(Path(task.state_dir), parent, task.process)
        self._health = HealthServicer()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._spans = open_spans(os.environ, self._events)
        # What is forwarded has its span at the parent, which also asks itself who calls.
        traced = () if self._spans is None else self._spans.interceptors(OWN_METHODS)
        gates = (Gate(self._mirror.credentials, self._metrics, only=OWN_METHODS),) if task.gated else ()
        own = options(shared_port=True, max_stream_age_seconds=task.max_stream_age_seconds)
        self._server = grpc.aio.server(interceptors=(*traced, *gates), options=own)
        self._server.add_generic_rpc_handlers((Forwarding(task.parent, SERVICES, OWN_METHODS),))
        # AttachEngine, the one method that needs more of a node than a mirror has, is forwarded.
        oracle = OracleService(
            cast(Node, self._mirror),
            self._metrics,
            self._events,
            leases=task.leases,
            max_stream_age_seconds=task.max_stream_age_seconds,
        )
        oracle_service_pb2_grpc.add_OracleServiceServicer_to_server(oracle, self._server)
        add_health(self._server, self._health)
        control = grpc.aio.server(options=SERVER_OPTIONS)
        control.add_generic_rpc_handlers((self._control(),))
        bind(control, (task.control,))
        await control.start()
        asyncio.get_running_loop().add_reader(_LIFE_LINE, self._end)
        await asyncio.Event().wait()

    def _control(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        return handler_of(
            [
                (PREPARE, self._mirror.prepare),
                (FOLLOW, self._mirror.follow),
                (FORGET, self._mirror.forget),
                (ADMIT, self._mirror.admit),
                (SERVE, self._serve),
                (SET_HEALTHY, self._set_healthy),
                (END_STREAM, self._end_stream),
                (COUNT, self._count),
                (COMPARISONS, self._mirror.comparisons),
                (DRAIN, self._drain),
            ]
        )

    async def _serve(self, request: Serve) -> Serving:
        certificates = Certificates(self._task.tls) if self._task.tls else None
        addresses = bind(self._server, self._task.listen, certificates)
        # Nothing of the start is garbage any more: the collector need not look at it while steps are answered.
        gc.collect()
        gc.freeze()
        self._lag = asyncio.create_task(watch_loop(self._metrics))
        if request.healthy:
            await self._set_healthy(None)
        await self._server.start()
        return Serving(tuple(addresses))

    async def _set_healthy(self, _: None) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)

    async def _end_stream(self, request: EndStream) -> None:
        self._mirror.attachments.end(request)

    async def _count(self, _: None) -> Report:
        return Report(counts_of(self._metrics), self._mirror.attachments.counts(), self._mirror.sampled())

    async def _drain(self, drain_seconds: float) -> Report:
        # A peer that watches its health and does not read must not hold up the end.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._health.enter_graceful_shutdown(), 1.0)
        self._mirror.drain()
        await self._server.stop(drain_seconds)
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)
        return await self._count(None)

    def _end(self) -> None:
        """The life line has an end to read. An orphan must not answer: the next server may be at a newer generation."""
        if not os.read(_LIFE_LINE, 1):
            self._log_writer.close(0.2)
            sys.stderr.flush()
            os._exit(0)
