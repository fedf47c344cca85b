"""`step-oracle serve`: opens the state, answers over gRPC, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict

import grpc
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2  # noqa: F401 - reflection then describes the details of an error too
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

from oracle_server import event_loop
from oracle_server.config import ServerConfig
from oracle_server.errors import InvalidArgument, OracleError, StoreFailed
from oracle_server.logs import configure
from oracle_server.operator_file import OperatorFile
from oracle_server.rpc.experiment_service import ExperimentService
from oracle_server.rpc.exposition import MetricsCollector
from oracle_server.rpc.gate import Gate
from oracle_server.rpc.loop_lag import watch_loop
from oracle_server.rpc.metrics import Metrics, total_steps
from oracle_server.rpc.oracle_service import OracleService
from oracle_server.rpc.pack_service import ProfilePackService
from oracle_server.rpc.spans import open_spans
from oracle_server.rpc.tenant_metrics import TenantCollector
from oracle_server.rpc.tenant_service import TenantService
from oracle_server.scheduling import scheduling, take_scheduling
from oracle_server.service_manager import tell_ready, tell_stopping
from oracle_server.state.database_file import DatabaseFile
from oracle_server.state.node import Node
from oracle_server.state.pack_folder import PackFolder
from oracle_server.state.pack_remote import PackRemote
from oracle_server.tls import Certificates
from step_oracle.v1 import (
    experiment_pb2,
    experiment_pb2_grpc,
    oracle_service_pb2,
    oracle_service_pb2_grpc,
    pack_pb2,
    pack_pb2_grpc,
    tenant_pb2,
    tenant_pb2_grpc,
)

if TYPE_CHECKING:
    from oracle_server.state.pack_registry import PackRegistry


class SharedState(TypedDict):
    """Arguments of a Node."""

    database: DatabaseFile | None
    pack_remote: PackRemote | None


SERVICES = (
    oracle_service_pb2.DESCRIPTOR.services_by_name["OracleService"].full_name,
    pack_pb2.DESCRIPTOR.services_by_name["ProfilePackService"].full_name,
    experiment_pb2.DESCRIPTOR.services_by_name["ExperimentService"].full_name,
    tenant_pb2.DESCRIPTOR.services_by_name["TenantService"].full_name,
)
METHODS = tuple(
    f"/{service}/{method.name}"
    for service in SERVICES
    for method in descriptor_pool.Default().FindServiceByName(service).methods
)
# How often the steps of tenants with a quota are added up.
RATE_SECONDS = 1.0
# How often packs are asked for that could not be had when their experiment wanted them.
COMPLETE_SECONDS = 5.0
# Of a stream's age. gRPC takes 10 % off at most: no connection is too old before the stream it was opened for is.
_CONNECTION_AGES = 1.5
# Shims ping each 30 s, and gRPC itself to measure a connection; the server tolerates one per second, with or without a
# call (grpc's default is one per 300 s, and a GOAWAY for whoever pings more often a few times in a row). Far below
# 30 s: on a machine so busy that pings are sent late they come close together.
_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


def serve(config: ServerConfig) -> int:
    """Run until SIGTERM or SIGINT; the exit status. StoreFailed and InvalidArgument where it cannot start."""
    if config.shards > 1:
        from oracle_server.shards.parent import serve_sharded

        return event_loop.run(serve_sharded(config))
    return event_loop.run(_serve(config))


async def _serve(config: ServerConfig) -> int:
    refused = take_scheduling(config.scheduling)
    metrics = Metrics()
    metrics.processes = 1
    events, log_writer = configure(metrics.count_dropped_line)
    spans = open_spans(os.environ, events)
    operator = OperatorFile(config.operator_token_file) if config.operator_token_file else None
    certificates = Certificates(config.tls) if config.tls else None
    registry = open_registry(config)
    node = Node(config.state_dir, **shared_state(config, registry))
    traced = () if spans is None else spans.interceptors(METHODS)
    gates = () if operator is None else (Gate(node.credentials, metrics),)
    age = config.max_stream_age_seconds
    server = grpc.aio.server(interceptors=(*traced, *gates), options=options(max_stream_age_seconds=age))
    health = HealthServicer()
    add_services(server, node, metrics, events, leases=config.leases, max_stream_age_seconds=age)
    add_health(server, health)
    try:
        addresses = bind(server, config.listen, certificates)
        metrics_server = serve_metrics(config, MetricsCollector(metrics, node.experiments), TenantCollector(node.rates))
    except OracleError:
        await node.close()
        raise
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for service in ("", *SERVICES):
        await health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
    await server.start()
    started(config, events, addresses, refused)
    try:
        compiled = await node.open(() if operator is None else operator.hashes)
    except OracleError:
        await server.stop(0)
        await node.close()
        raise
    guards = guard(node, operator)
    # Nothing of the start is garbage any more: the collector need not look at it while steps are answered.
    gc.collect()
    gc.freeze()
    for service in ("", *SERVICES):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    metrics.ready = 1
    lag = asyncio.create_task(watch_loop(metrics))
    metrics_address = "off" if metrics_server is None else address_of(metrics_server[0])
    events.info("ready", listen=addresses, metrics=metrics_address, compiled=len(compiled))
    print(
        f"step-oracle: ready at {', '.join(addresses)}; metrics {metrics_address}; state {config.state_dir}", flush=True
    )
    tell_ready(events, f"ready at {', '.join(addresses)}")
    await stop.wait()
    metrics.ready = 0
    lag.cancel()
    tell_stopping(events, f"draining for up to {config.drain_seconds:g} s")
    # A peer that watches its health and does not read must not hold up the end.
    with suppress(TimeoutError):
        await asyncio.wait_for(health.enter_graceful_shutdown(), 1.0)
    for task in guards:
        task.cancel()
    node.experiments.drain()
    if registry is not None:
        # A registry that hangs holds up the end no longer than any other call.
        loop.call_later(config.drain_seconds, registry.close)
    await server.stop(config.drain_seconds)
    if registry is not None:
        registry.close()
    await node.close()
    if metrics_server is not None:
        metrics_server[0].shutdown()
    if spans is not None:
        await asyncio.to_thread(spans.close)
    events.info("drained", steps=total_steps(metrics))
    await asyncio.to_thread(log_writer.close)
    return 0


def shared_state(config: ServerConfig, registry: PackRegistry | None) -> SharedState:
    """What a server of a fleet shares with the others, as arguments of its Node; nothing for one that is alone."""
    database = DatabaseFile(config.database) if config.database else None
    return {"database": database, "pack_remote": PackFolder(config.pack_folder) if config.pack_folder else registry}


def started(config: ServerConfig, events: Any, addresses: Sequence[str], refused: str) -> None:
    """Log that the process takes connections, and under which policy; `refused`: why not under the one it should."""
    where = {"listen": list(addresses), "state_dir": str(config.state_dir)}
    events.info("started", **where, pid=os.getpid(), scheduling=scheduling())
    if refused:
        events.info("scheduling refused", why=refused)


def guard(node: Node, operator: OperatorFile | None) -> list[asyncio.Task[None]]:
    """The tasks that go on looking at the step rates and at the operator's file."""
    tasks = [asyncio.create_task(_check_rates(node)), asyncio.create_task(_complete_packs(node))]
    if operator is not None:
        tasks.append(asyncio.create_task(operator.watch(node.tenants.trust_operator)))
    return tasks


async def _check_rates(node: Node) -> None:
    while True:
        await asyncio.sleep(RATE_SECONDS)
        await node.tenants.check_rates()


async def _complete_packs(node: Node) -> None:
    while True:
        await asyncio.sleep(COMPLETE_SECONDS)
        await node.experiments.complete()


def open_registry(config: ServerConfig) -> PackRegistry | None:
    """The registry of the fleet's packs; None where none is configured. InvalidArgument, PackRegistryUnavailable."""
    if config.pack_registry is None:
        return None
    try:
        from oracle_server.state.pack_registry import PackRegistry
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            f"--pack-registry needs the extra oci ({error.name} is not installed): pip install 'step-oracle[oci]'",
            field="pack_registry",
        ) from error
    place = config.pack_registry.repository
    registry = PackRegistry(
        place.authority,
        place.repository,
        plaintext=place.plaintext,
        credentials=config.pack_registry.credentials,
        ca=config.pack_registry.ca,
    )
    registry.check_files()
    return registry


def options(*, shared_port: bool = False, max_stream_age_seconds: float = 0.0) -> tuple[tuple[str, int], ...]:
    """Options of a server; `shared_port`: other processes listen at the same TCP address.

    A connection takes no new call after `_CONNECTION_AGES` times `max_stream_age_seconds` (gRPC adds up to 10 % either
    way), so that its client looks its name up again; what is open stays open. 0: for ever. An engine of one target is
    gone before: it ends its connection with its stream.
    """
    milliseconds = int(1e3 * _CONNECTION_AGES * max_stream_age_seconds)
    age = (("grpc.max_connection_age_ms", milliseconds),) if max_stream_age_seconds else ()
    return (("grpc.so_reuseport", int(shared_port)), *age, *_OPTIONS)


def add_services(
    server: grpc.aio.Server,
    node: Node,
    metrics: Metrics,
    events: Any,
    *,
    leases: bool,
    max_stream_age_seconds: float = 0.0,
) -> None:
    """The four services of step_oracle.v1."""
    oracle = OracleService(node, metrics, events, leases=leases, max_stream_age_seconds=max_stream_age_seconds)
    oracle_service_pb2_grpc.add_OracleServiceServicer_to_server(oracle, server)
    pack_pb2_grpc.add_ProfilePackServiceServicer_to_server(ProfilePackService(node, metrics, events), server)
    experiment_pb2_grpc.add_ExperimentServiceServicer_to_server(ExperimentService(node, metrics, events), server)
    tenant_pb2_grpc.add_TenantServiceServicer_to_server(TenantService(node, metrics, events), server)


def add_health(server: grpc.aio.Server, health: HealthServicer) -> None:
    """Health and reflection."""
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
    )


def bind(server: grpc.aio.Server, listen: tuple[str, ...], certificates: Certificates | None = None) -> list[str]:
    """Bind every address, the TCP ones with TLS where there is a certificate; the addresses with their real ports."""
    bound = []
    for address in listen:
        try:
            if certificates is None or address.startswith("unix:"):
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, certificates.credentials())
        except RuntimeError as error:
            raise StoreFailed(
                f"the address {address} cannot be bound: {error}; is another server there? Give another --listen"
            ) from error
        bound.append(address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}")
    return bound


def serve_metrics(config: ServerConfig, *collectors: Collector) -> tuple[Any, Any] | None:
    """(server, thread) of the metrics endpoint; None where it is off. StoreFailed."""
    if config.metrics == "off":
        return None
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    ProcessCollector(registry=registry)
    host, _, port = config.metrics.rpartition(":")
    try:
        return start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except OSError as error:
        raise StoreFailed(
            f"the metrics address {config.metrics} cannot be bound: {error}; give another --metrics, or --metrics off"
        ) from error


def address_of(http_server: Any) -> str:
    """Its URL."""
    host, port = http_server.server_address[:2]
    return f"http://{host}:{port}/metrics"
