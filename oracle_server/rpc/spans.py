"""OpenTelemetry spans of control-plane calls and stream openings, sampled: nothing per step, nothing where it is off.

They are on where the extra `otel` is installed and the standard environment names an exporter. Without a sampler there,
one trace of a hundred is kept, and those a caller has sampled.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from oracle_server.errors import InvalidArgument
from oracle_server.rpc.version import package_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from oracle_server.rpc.step_stream import Events

DEFAULT_RATIO = 0.01
FLUSH_SECONDS = 2.0
# They may be asked once per step.
_UNTRACED = ("SampleStep",)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}

# The span of the stream that is being opened by this task.
_opening: ContextVar[_Opening | None] = ContextVar("step_oracle_opening", default=None)


def opened(experiment: str, engine_id: str, generation: int) -> None:
    """The stream of this task is open: its span ends here, whatever the stream carries later."""
    opening = _opening.get()
    if opening is not None:
        opening.end(experiment, engine_id, generation)


class Spans:
    """Owns the tracer provider of a process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def interceptors(self, methods: Iterable[str]) -> list[grpc.aio.ServerInterceptor[Any, Any]]:
        """For a server: spans of these methods, given as /package.Service/Method, but for those asked once per step."""
        traced = frozenset(method for method in methods if method.rpartition("/")[2] not in _UNTRACED)
        return [_SpanInterceptor(self._provider.get_tracer("step_oracle"), traced)]

    def close(self) -> None:
        """Send what is left, for a moment at most. Blocks."""
        self._provider.force_flush(int(FLUSH_SECONDS * 1000))
        self._provider.shutdown()


def open_spans(environ: Mapping[str, str], events: Events) -> Spans | None:
    """The spans the environment asks for, None where it asks for none; InvalidArgument for what it cannot have."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    names = [name.strip() for name in environ.get("OTEL_TRACES_EXPORTER", "").split(",") if name.strip()]
    if not names and any(environ.get(name) for name in _ENDPOINTS):
        names = ["otlp"]
    if not names or names == ["none"]:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError:
        events.info("spans off", why="OTEL_* asks for traces; install them: pip install 'step-oracle[otel]'")
        return None
    attributes = {"service.version": package_version()}
    if not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = "step-oracle"
    # None: the SDK reads OTEL_TRACES_SAMPLER itself. Its own default would keep every trace.
    sampler = None
    if not environ.get("OTEL_TRACES_SAMPLER"):
        sampler = ParentBased(TraceIdRatioBased(_ratio(environ.get("OTEL_TRACES_SAMPLER_ARG", ""))))
    provider = TracerProvider(sampler=sampler, resource=Resource.create(attributes), shutdown_on_exit=False)
    for name in names:
        provider.add_span_processor(BatchSpanProcessor(_exporter(name, environ)))
    events.info("spans on", exporters=names, sampler=provider.sampler.get_description())
    return Spans(provider)


def _ratio(text: str) -> float:
    try:
        ratio = float(text or DEFAULT_RATIO)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise InvalidArgument(
            f"OTEL_TRACES_SAMPLER_ARG is {text!r}; allowed: the share of traces to keep, 0 to 1",
            field="OTEL_TRACES_SAMPLER_ARG",
        )
    return ratio


def _exporter(name: str, environ: Mapping[str, str]) -> Any:
    """An exporter by its standard name, as the SDK's own configuration finds them."""
    known: dict[str, EntryPoint] = {point.name: point for point in entry_points(group="opentelemetry_traces_exporter")}
    wanted = name
    if name == "otlp":
        protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        wanted = _PROTOCOLS.get(protocol or "grpc", protocol or "")
    if wanted not in known:
        raise InvalidArgument(
            f"the environment asks for the trace exporter {wanted!r}, which is not installed; there are "
            f"{', '.join(sorted(known))}",
            field="OTEL_TRACES_EXPORTER",
        )
    return known[wanted].load()()


class _SpanInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of some methods; the others pass untouched."""

    def __init__(self, tracer: Any, methods: frozenset[str]) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._methods = methods
        self._propagator = TraceContextTextMapPropagator()

    async def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """The handler, with a span around it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in self._methods:
            return handler
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._awaited(method, handler.unary_unary), **coders)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._awaited(method, handler.stream_unary), **coders)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._iterated(method, handler.unary_stream), **coders)
        return grpc.stream_stream_rpc_method_handler(self._opening(method, handler.stream_stream), **coders)

    def _awaited(self, method: str, handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def traced(request: Any, context: Any) -> Any:
            with self._span(method, request, context):
                return await handler(request, context)

        return traced

    def _iterated(self, method: str, handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def traced(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._span(method, request, context):
                async for response in handler(request, context):
                    yield response

        return traced

    def _opening(self, method: str, handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def traced(requests: Any, context: Any) -> None:
            opening = _Opening(self._start(method, None, context))
            _opening.set(opening)
            try:
                await handler(requests, context)
            finally:
                opening.give_up(context)

        return traced

    @contextmanager
    def _span(self, method: str, request: Any, context: Any) -> Iterator[None]:
        span = self._start(method, request, context)
        try:
            yield
        finally:
            _end(span, context)

    def _start(self, method: str, request: Any, context: Any) -> Span:
        from opentelemetry.trace import SpanKind

        metadata = {key: value for key, value in context.invocation_metadata() or () if key.startswith("trace")}
        service, _, name = method[1:].partition("/")
        span: Span = self._tracer.start_span(
            f"{service}/{name}",
            context=self._propagator.extract(metadata),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        if span.is_recording():
            for field in ("name", "parent"):
                if value := getattr(request, field, ""):
                    span.set_attribute(f"step_oracle.{field}", value)
        return span


class _Opening:
    """The span of one stream's opening. Owned by the task that serves the stream."""

    def __init__(self, span: Span) -> None:
        self._span: Span | None = span

    def end(self, experiment: str, engine_id: str, generation: int) -> None:
        """It is open."""
        span, self._span = self._span, None
        if span is not None:
            span.set_attribute("step_oracle.experiment", experiment)
            span.set_attribute("step_oracle.engine", engine_id)
            span.set_attribute("step_oracle.generation", generation)
            span.set_attribute("rpc.grpc.status_code", 0)
            span.end()

    def give_up(self, context: Any) -> None:
        """The stream has ended; where it never opened, its span says why."""
        span, self._span = self._span, None
        if span is not None:
            _end(span, context)


def _end(span: Span, context: Any) -> None:
    from opentelemetry.trace import Status, StatusCode

    if span.is_recording():
        if context.cancelled():
            code = grpc.StatusCode.CANCELLED.value[0]
        else:
            given = context.code()
            code = given.value[0] if isinstance(given, grpc.StatusCode) else int(given or 0)
        span.set_attribute("rpc.grpc.status_code", code)
        if code:
            details = context.details()
            span.set_status(Status(StatusCode.ERROR, details.decode() if isinstance(details, bytes) else details))
            if reason := _reason(context):
                span.set_attribute("step_oracle.reason", reason)
    span.end()


def _reason(context: Any) -> str:
    """google.rpc.ErrorInfo.reason of a call that was refused."""
    info = error_details_pb2.ErrorInfo()
    for key, value in context.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    return str(info.reason)
    return ""
