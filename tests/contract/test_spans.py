"""OpenTelemetry: which calls make spans, what they say, and that they reach a collector."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from oracle_calls import EXPERIMENT, Calls, decode, identity
from oracle_process import OracleProcess
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.spans import Spans
from oracle_server.server import METHODS, add_services, options
from oracle_server.state.node import Node
from sharded_server import wait_for
from step_oracle.v1 import experiment_pb2

Dirs = dict[str, Path]
PREFIX = "step_oracle.v1."


class Quiet:
    """Takes events and forgets them."""

    def info(self, event: str, **values: Any) -> None:
        """Forget it."""


@asynccontextmanager
async def traced_server(folder: Path, provider: TracerProvider) -> AsyncIterator[str]:
    """A server in this process with spans of this provider; its address."""
    node = Node(folder)
    server = grpc.aio.server(interceptors=Spans(provider).interceptors(METHODS), options=options())
    add_services(server, node, Metrics(), Quiet(), leases=True)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await node.open()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        node.experiments.drain()
        await server.stop(5)
        await node.close()


async def spans_of(folder: Path, talk: Callable[[Calls], None]) -> list[ReadableSpan]:
    """The spans of what is said to a fresh server."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))

    def run(target: str) -> None:
        with Calls(target) as calls:
            talk(calls)

    async with traced_server(folder, provider) as target:
        await asyncio.to_thread(run, target)
    provider.shutdown()
    return list(memory.get_finished_spans())


def named(spans: list[ReadableSpan], method: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == PREFIX + method]


async def test_control_plane_calls_and_openings_are_spans_and_steps_are_not(tmp_path: Path, pack_dirs: Dirs) -> None:
    def talk(calls: Calls) -> None:
        calls.create(calls.upload(pack_dirs["constant"]))
        stream = calls.join("e")
        for i in range(50):
            stream.ask(decode(i))
        calls.sample(identity("e"), [decode(0)])
        watch = calls.experiments.WatchExperiment(experiment_pb2.WatchExperimentRequest(name=EXPERIMENT))
        next(watch)
        watch.cancel()
        stream.close()

    spans = await spans_of(tmp_path, talk)
    assert sorted(span.name.removeprefix(PREFIX) for span in spans) == [
        "ExperimentService/CreateExperiment",
        "ExperimentService/WatchExperiment",
        "OracleService/AttachEngine",
        "OracleService/StreamSteps",
        "ProfilePackService/UploadPack",
    ]
    assert {span.kind for span in spans} == {SpanKind.SERVER}
    (opening,) = named(spans, "OracleService/StreamSteps")
    assert opening.attributes is not None
    assert {key: opening.attributes[f"step_oracle.{key}"] for key in ("experiment", "engine", "generation")} == {
        "experiment": EXPERIMENT,
        "engine": "e",
        "generation": 1,
    }
    # It ends with the opening: before the stream does, and before the calls that came after.
    (watched,) = named(spans, "ExperimentService/WatchExperiment")
    assert opening.end_time is not None
    assert watched.start_time is not None
    assert opening.end_time < watched.start_time


async def test_a_refused_call_says_why(tmp_path: Path, pack_dirs: Dirs) -> None:
    def talk(calls: Calls) -> None:
        calls.create(calls.upload(pack_dirs["constant"]))
        for refused in (
            lambda: calls.activate("sha256:" + "0" * 64),
            lambda: calls.open(identity("never"), 0),
        ):
            with pytest.raises(grpc.RpcError):
                refused()

    spans = await spans_of(tmp_path, talk)
    for method, code, reason in (
        ("ExperimentService/ActivateExperiment", grpc.StatusCode.NOT_FOUND, "PACK_NOT_FOUND"),
        ("OracleService/StreamSteps", grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    ):
        (span,) = named(spans, method)
        assert span.attributes is not None
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description
        assert span.attributes["rpc.grpc.status_code"] == code.value[0]
        assert span.attributes["step_oracle.reason"] == reason
    (created,) = named(spans, "ExperimentService/CreateExperiment")
    assert created.status.status_code is StatusCode.UNSET
    assert created.attributes is not None
    assert created.attributes["step_oracle.parent"] == "tenants/default"


async def test_a_span_belongs_to_the_trace_of_its_caller(tmp_path: Path) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    def talk(calls: Calls) -> None:
        request = experiment_pb2.ListExperimentsRequest(parent="tenants/default")
        metadata = (("traceparent", f"00-{trace}-{parent}-01"),)
        calls.experiments.ListExperiments(request, timeout=20, metadata=metadata)

    (span,) = await spans_of(tmp_path, talk)
    assert span.context is not None
    assert span.parent is not None
    assert (format(span.context.trace_id, "032x"), format(span.parent.span_id, "016x")) == (trace, parent)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector on loopback that keeps what it gets."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        """Keep it."""
        self.received.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def names(self) -> set[str]:
        """The names of the spans so far."""
        return {
            span.name.removeprefix(PREFIX)
            for request in self.received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }

    def services(self) -> set[str]:
        """What the senders call themselves."""
        resources = [resource.resource for request in self.received for resource in request.resource_spans]
        return {a.value.string_value for r in resources for a in r.attributes if a.key == "service.name"}

    def stop(self) -> None:
        """Take no more."""
        self._server.stop(0)


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that ends with the test."""
    running = Collector()
    yield running
    running.stop()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_server_sends_its_spans_where_the_environment_says(
    shards: int, collector: Collector, new_server: Callable[..., OracleProcess], pack_dirs: Dirs
) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_TRACES_SAMPLER": "always_on",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    server = new_server(arguments=() if shards == 1 else ("--shards", str(shards)), extra_env=variables)
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        stream = calls.join("e")
        stream.ask(decode(0))
        wait_for(lambda: {"OracleService/StreamSteps", "ExperimentService/CreateExperiment"} <= collector.names())
        stream.close()
    assert collector.services() == {"step-oracle"}
    # What happened last is sent before the process ends.
    with Calls(server.target) as calls, pytest.raises(grpc.RpcError):
        calls.activate("sha256:" + "0" * 64)
    assert server.terminate() == 0
    assert "ExperimentService/ActivateExperiment" in collector.names()


def test_a_collector_that_is_away_keeps_no_step_and_no_end_waiting(
    new_server: Callable[..., OracleProcess], pack_dirs: Dirs
) -> None:
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_SAMPLER": "always_on"}
    server = new_server(extra_env=variables)
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        assert calls.sample(identity("e"), [decode(0)])
    assert server.terminate() == 0
