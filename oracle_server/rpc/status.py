"""OracleError -> google.rpc.Status: always ErrorInfo, BadRequest with a field at fault, RetryInfo if retrying helps."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from time import perf_counter_ns
from typing import Any, NoReturn, TypeVar

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from oracle_server.errors import InvalidArgument, OracleError, Unavailable
from oracle_server.rpc.metrics import Metrics

DOMAIN = "step-oracle"
RETRY_SECONDS = 0.2
# gRPC peers refuse more than 8 KiB of metadata by default; the status travels there as base64, the message once more.
_MAX_MESSAGE = 1500
_MAX_ITEMS_BYTES = 2000

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_log = logging.getLogger("step_oracle.rpc")


def to_status(error: OracleError) -> status_pb2.Status:
    """The error as it travels."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=_cut(error.message, _MAX_MESSAGE))
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_bounded(error.metadata))
    ]
    if isinstance(error, InvalidArgument) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(error.field, 200), description=_cut(error.message, 200)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Unavailable):
        delay = duration_pb2.Duration(nanos=int(RETRY_SECONDS * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: Any, error: OracleError) -> NoReturn:
    """End the call with the error."""
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError("abort raises")


def unary(
    handler: Callable[[Any, _Request, Any], Awaitable[_Response]],
) -> Callable[[Any, _Request, Any], Awaitable[_Response]]:
    """A unary (or client-streaming) handler whose errors travel and whose calls are counted. `self.metrics` counts."""

    @functools.wraps(handler)
    async def answer(self: Any, request: _Request, context: Any) -> _Response:
        metrics: Metrics = self.metrics
        begin = perf_counter_ns()
        try:
            response = await handler(self, request, context)
        except OracleError as error:
            metrics.count_call(handler.__name__, error.code, error.reason)
            await abort(context, error)
        except Exception as error:  # noqa: BLE001 - the edge: it is logged with its trace and answered
            failure = internal(handler.__name__, error)
            metrics.count_call(handler.__name__, failure.code, failure.reason)
            await abort(context, failure)
        finally:
            metrics.time_call(handler.__name__, perf_counter_ns() - begin)
        metrics.count_call(handler.__name__, "OK", "")
        return response

    return answer


def streaming(
    handler: Callable[[Any, _Request, Any], AsyncIterator[_Response]],
) -> Callable[[Any, _Request, Any], AsyncIterator[_Response]]:
    """A server-streaming handler whose errors travel and whose calls are counted."""

    @functools.wraps(handler)
    async def answer(self: Any, request: _Request, context: Any) -> AsyncIterator[_Response]:
        metrics: Metrics = self.metrics
        try:
            async for response in handler(self, request, context):
                yield response
        except OracleError as error:
            metrics.count_call(handler.__name__, error.code, error.reason)
            await abort(context, error)
        except asyncio.CancelledError:
            metrics.count_call(handler.__name__, "CANCELLED", "")
            raise
        except Exception as error:  # noqa: BLE001 - the edge: it is logged with its trace and answered
            failure = internal(handler.__name__, error)
            metrics.count_call(handler.__name__, failure.code, failure.reason)
            await abort(context, failure)
        metrics.count_call(handler.__name__, "OK", "")

    return answer


def internal(method: str, error: Exception) -> OracleError:
    """A defect of the server, logged with its trace; or what a client sent that is no message."""
    if isinstance(error, DecodeError):
        return InvalidArgument(
            f"a message of {method} cannot be decoded: its bytes are no message of step_oracle.v1; make it with the "
            "code generated from the .proto files"
        )
    _log.error("the handler of %s failed", method, exc_info=error)
    return OracleError(
        f"the server failed in {method}: {type(error).__name__}; its log has the trace, please report it"
    )


def _bounded(metadata: dict[str, str]) -> dict[str, str]:
    """Whole entries up to a number of bytes; `omitted` says how many there are more."""
    bounded: dict[str, str] = {}
    left = _MAX_ITEMS_BYTES
    for key, value in metadata.items():
        shown = _cut(value, 500)
        left -= len(key.encode()) + len(shown.encode())
        if left < 0:
            bounded["omitted"] = str(len(metadata) - len(bounded))
            break
        bounded[key] = shown
    return bounded


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
