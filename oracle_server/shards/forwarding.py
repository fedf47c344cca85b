"""Calls a shard hands to its parent as they are: whatever changes the state, or reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc.aio import EOF  # type: ignore[attr-defined]

from oracle_server.shards.calls import CHANNEL_OPTIONS


class Forwarding(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Answers the methods of some services by asking the parent: bytes, metadata, deadline and status pass unread."""

    def __init__(self, parent: str, services: Iterable[str], own: Iterable[str]) -> None:
        self._own = frozenset(own)
        self._channel = grpc.aio.insecure_channel(parent, options=CHANNEL_OPTIONS)
        self._uploads = grpc.insecure_channel(parent, options=CHANNEL_OPTIONS)
        find = descriptor_pool.Default().FindServiceByName
        methods = [(f"/{name}/{method.name}", method) for name in services for method in find(name).methods]
        self._methods = {path: method.client_streaming for path, method in methods}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method; None for those the shard answers itself."""
        path = handler_call_details.method
        if path in self._own or path not in self._methods:
            return None
        if self._methods[path]:
            stub: Any = self._uploads.stream_unary(path, None, None)
            return grpc.stream_unary_rpc_method_handler(_upload(stub))
        stub = self._channel.unary_stream(path, None, None)
        # On the wire one response is a stream of one.
        return grpc.unary_stream_rpc_method_handler(_call(stub))


def _call(stub: Any) -> Callable[[bytes, Any], AsyncIterator[bytes]]:
    async def forward(request: bytes, context: Any) -> AsyncIterator[bytes]:
        call = stub(request, metadata=_metadata(context), timeout=context.time_remaining())
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata()))
        finally:
            call.cancel()

    return forward


def _upload(stub: Any) -> Callable[[Any, Any], Any]:
    """Through grpc's blocking client: the other one answers INTERNAL where the parent decides before all is sent
    (grpcio 1.85: a write that fails hides the status).
    """

    async def forward(_: object, context: Any) -> Any:
        loop = asyncio.get_running_loop()

        def requests() -> Iterator[bytes]:
            # On a thread of grpc's. A read fails once the call is over.
            with suppress(grpc.aio.BaseError):
                while (data := asyncio.run_coroutine_threadsafe(context.read(), loop).result()) is not EOF:
                    yield data

        call = stub.future(requests(), metadata=_metadata(context), timeout=context.time_remaining())
        ended = asyncio.Event()
        call.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
        try:
            await ended.wait()
        finally:
            call.cancel()
        if call.code() is not grpc.StatusCode.OK:
            await context.abort(call.code(), call.details() or "", tuple(call.trailing_metadata()))
        return call.result()

    return forward


def _metadata(context: Any) -> tuple[tuple[str, str | bytes], ...]:
    """What the caller sent, but for what belongs to its connection."""
    pairs = context.invocation_metadata() or ()
    return tuple((key, value) for key, value in pairs if key != "user-agent" and not key.startswith("grpc-"))
