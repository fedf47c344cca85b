"""Calls between the parent and its shards: msgspec values over gRPC on a Unix socket.

Both ends are processes of one server, so these messages are no part of the wire contract and carry no version. An error
arrives as the OracleError it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Generic, TypeVar

import grpc
import msgspec

from oracle_server.errors import InvalidArgument, OracleError, Unavailable
from oracle_server.rpc.status import internal

SERVICE = "step_oracle.shards"
# A shard that dies is another process at the same path: connect anew without delay.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)

# What is said between the processes is as large as it is: the limits are those of the state (state/binding.py).
SERVER_OPTIONS = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1))

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Method(Generic[_Request, _Response]):
    """One call: its name and what travels."""

    def __init__(self, name: str, request: type[_Request], response: type[_Response]) -> None:
        self.name = name
        self.path = f"/{SERVICE}/{name}"
        self.request: msgspec.msgpack.Decoder[_Request] = msgspec.msgpack.Decoder(request)
        self.response: msgspec.msgpack.Decoder[_Response] = msgspec.msgpack.Decoder(response)


class Failure(msgspec.Struct, frozen=True):
    """An OracleError on its way."""

    code: str
    reason: str
    message: str
    metadata: dict[str, str]


class _Reply(msgspec.Struct, frozen=True):
    value: msgspec.Raw = msgspec.Raw(msgspec.msgpack.encode(None))
    failure: Failure | None = None


_replies = msgspec.msgpack.Decoder(_Reply)


class Peer:
    """The other process, as its calls see it. Event loop only."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._closed = False

    async def call(
        self, method: Method[_Request, _Response], request: _Request, timeout_seconds: float, *, wait: bool = False
    ) -> _Response:
        """The response, or the OracleError the other process raised; Unavailable where it does not answer.

        `wait`: for its start.
        """
        gone = f"{method.name}: a process of this server does not answer"
        if self._closed:
            raise Unavailable(f"{gone}; retry")
        stub: Any = self._channel.unary_unary(method.path, None, None)
        try:
            data = await stub(msgspec.msgpack.encode(request), timeout=timeout_seconds, wait_for_ready=wait)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"{gone} ({error.code().name}); retry") from error
        except asyncio.CancelledError:
            # So a call ends whose channel is closed (grpcio 1.85), too.
            if self._closed:
                raise Unavailable(f"{gone}; retry") from None
            raise
        reply = _replies.decode(data)
        if reply.failure is not None:
            raise read_failure(reply.failure)
        return method.response.decode(reply.value)

    async def close(self) -> None:
        """End the connection; calls under way fail."""
        self._closed = True
        await self._channel.close(None)


def handler_of(
    methods: Iterable[tuple[Method[Any, Any], Callable[[Any], Awaitable[Any]]]],
) -> grpc.GenericRpcHandler[bytes, bytes]:
    """What a server needs to answer these methods."""
    handlers = {method.name: grpc.unary_unary_rpc_method_handler(_answer(method, act)) for method, act in methods}
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def write_failure(error: OracleError) -> Failure:
    """An error as it travels."""
    return Failure(error.code, error.reason, error.message, error.metadata)


def read_failure(failure: Failure) -> OracleError:
    """The inverse of write_failure: an error of the same class, as far as a status is made from it."""
    kind = _kinds().get((failure.code, failure.reason), OracleError)
    error = kind.__new__(kind)
    OracleError.__init__(error, failure.message, metadata=failure.metadata)
    if isinstance(error, InvalidArgument):
        error.field = failure.metadata.get("field", "")
    return error


def _answer(method: Method[Any, Any], act: Callable[[Any], Awaitable[Any]]) -> Any:
    async def answer(data: bytes, _: object) -> bytes:
        try:
            value = await act(method.request.decode(data))
        except OracleError as error:
            return msgspec.msgpack.encode(_Reply(failure=write_failure(error)))
        except Exception as error:  # noqa: BLE001 - the edge: it is logged with its trace and answered
            return msgspec.msgpack.encode(_Reply(failure=write_failure(internal(method.name, error))))
        return msgspec.msgpack.encode(_Reply(msgspec.Raw(msgspec.msgpack.encode(value))))

    return answer


def _kinds() -> dict[tuple[str, str], type[OracleError]]:
    """The classes of the tree by (code, reason); a class that has both from its parent stands behind it."""
    kinds: dict[tuple[str, str], type[OracleError]] = {}
    ahead: list[type[OracleError]] = [OracleError]
    for kind in ahead:
        kinds.setdefault((kind.code, kind.reason), kind)
        ahead += kind.__subclasses__()
    return kinds
