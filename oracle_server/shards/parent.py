"""The process of `serve --shards N`: owns the state, answers the control plane for its shards, answers no step."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc

from oracle_server.config import ServerConfig
from oracle_server.errors import StoreFailed
from oracle_server.logs import configure
from oracle_server.operator_file import OperatorFile
from oracle_server.rpc.gate import Gate
from oracle_server.rpc.loop_lag import watch_loop
from oracle_server.rpc.metrics import Metrics, total_steps
from oracle_server.rpc.spans import open_spans
from oracle_server.rpc.tenant_metrics import TenantCollector
from oracle_server.scheduling import take_scheduling
from oracle_server.server import (
    METHODS,
    add_services,
    address_of,
    bind,
    guard,
    open_registry,
    options,
    serve_metrics,
    shared_state,
    started,
)
from oracle_server.service_manager import tell_ready, tell_stopping
from oracle_server.shards.addresses import Reservation
from oracle_server.shards.calls import SERVICE, handler_of
from oracle_server.shards.counts import SummedCollector, add_counts, counts_of
from oracle_server.shards.messages import CATCH_UP, CLOSE_STREAM, FIND_EXPERIMENT, OPEN_STREAM, ShardTask
from oracle_server.shards.pool import ShardPool
from oracle_server.shards.streams import ShardStreams
from oracle_server.state.node import Node
from oracle_server.tls import Certificates

# Length of a Unix socket's path, its closing zero apart.
_PATH_BYTES = 107


async def serve_sharded(config: ServerConfig) -> int:
    """Run until SIGTERM or SIGINT; the exit status. StoreFailed where it cannot start."""
    refused = take_scheduling(config.scheduling)
    metrics = Metrics()
    metrics.processes = 1
    events, log_writer = configure(metrics.count_dropped_line)
    operator = OperatorFile(config.operator_token_file) if config.operator_token_file else None
    if config.tls:
        # Each shard reads the files itself; what is wrong with them is said here, once.
        Certificates(config.tls)
    socket = _socket_path(config)
    reservation = Reservation(config.listen)

    def task_of(shard: int, process: int) -> ShardTask:
        listen, state_dir = reservation.of_shard(shard), str(config.state_dir)
        return ShardTask(
            shard,
            process,
            os.getpid(),
            listen,
            state_dir,
            config.leases,
            config.max_stream_age_seconds,
            f"unix:{socket}",
            f"unix:{_of_shard(socket, shard)}",
            config.tls,
            operator is not None,
        )

    async def total() -> Metrics:
        await pool.count()
        total = Metrics()
        add_counts(total, counts_of(metrics))
        pool.add_to(total)
        return total

    pool = ShardPool(config.shards, task_of, events, metrics)
    # Shards map packs from the parent's folder, so it alone brings them.
    registry = open_registry(config)
    node = Node(config.state_dir, followers=pool, **shared_state(config, registry))
    streams = ShardStreams(node)
    spans = open_spans(os.environ, events)
    traced = () if spans is None else spans.interceptors(METHODS)
    gates = () if operator is None else (Gate(node.credentials, metrics, open_services=(SERVICE,)),)
    server = grpc.aio.server(interceptors=(*traced, *gates), options=options())
    add_services(server, node, metrics, events, leases=config.leases)
    server.add_generic_rpc_handlers(
        (
            handler_of(
                [
                    (OPEN_STREAM, streams.open),
                    (CLOSE_STREAM, streams.close),
                    (FIND_EXPERIMENT, streams.find_experiment),
                    (CATCH_UP, streams.catch_up),
                ]
            ),
        )
    )
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics_server = None
    guards: list[asyncio.Task[None]] = []
    lag = asyncio.create_task(watch_loop(metrics))
    try:
        metrics_server = serve_metrics(
            config, SummedCollector(total, node.experiments, loop), TenantCollector(node.rates)
        )
        bind(server, (f"unix:{socket}",))
        await server.start()
        pool.start()
        started(config, events, reservation.addresses, refused)
        compiled = await node.open(() if operator is None else operator.hashes)
        addresses = ", ".join(await pool.join(node, streams))
        guards = guard(node, operator)
        metrics_address = "off" if metrics_server is None else address_of(metrics_server[0])
        events.info("ready", listen=addresses, metrics=metrics_address, compiled=len(compiled), shards=config.shards)
        print(f"step-oracle: ready at {addresses}; metrics {metrics_address}; state {config.state_dir}", flush=True)
        metrics.ready = 1
        tell_ready(events, f"ready at {addresses}")
        await stop.wait()
        tell_stopping(events, f"draining for up to {config.drain_seconds:g} s")
    finally:
        metrics.ready = 0
        lag.cancel()
        for task in guards:
            task.cancel()
        node.experiments.drain()
        if registry is not None:
            loop.call_later(config.drain_seconds, registry.close)
        await pool.drain(config.drain_seconds)
        await server.stop(0)
        # While the folder is ours: a successor binds the same paths as soon as it is not.
        for path in (socket, *(_of_shard(socket, shard) for shard in range(config.shards))):
            path.unlink(missing_ok=True)
        if registry is not None:
            registry.close()
        await node.close()
        reservation.close()
        if metrics_server is not None:
            metrics_server[0].shutdown()
    if spans is not None:
        await asyncio.to_thread(spans.close)
    events.info("drained", steps=total_steps(await total()))
    await asyncio.to_thread(log_writer.close)
    return 0


def _socket_path(config: ServerConfig) -> Path:
    """Where the parent answers its shards: in the state folder, which has one parent at a time."""
    path = config.state_dir.absolute() / "parent.sock"
    length = len(os.fsencode(_of_shard(path, config.shards)))
    if length > _PATH_BYTES:
        raise StoreFailed(
            f"the path {path} is too long for the sockets of the shards ({length} bytes, allowed: {_PATH_BYTES}); give "
            "a shorter --state-dir, or no --shards"
        )
    return path


def _of_shard(path: Path, shard: int) -> Path:
    return path.with_name(f"{path.name}.{shard}")
