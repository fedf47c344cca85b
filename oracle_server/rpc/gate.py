"""The one interceptor that decides who may call what.

It authenticates a call by its bearer token and authorizes its method; the tenant of the call is authorized where its
names are read, by `Principal.check_tenant`. A method it does not know needs the rights of a tenant's administrator.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import grpc

from oracle_server.errors import CredentialRevoked, OracleError, PermissionDenied
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.status import abort
from oracle_server.state.credentials import Credentials
from oracle_server.state.principal import CALLER, SCOPE_ADMIN, SCOPE_ENGINE, SCOPE_OPERATOR, Principal

# Probes, and the description of the public protocol: without a credential.
OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
ENGINE_METHODS = frozenset(
    f"/step_oracle.v1.OracleService/{name}" for name in ("GetDevice", "AttachEngine", "StreamSteps", "SampleStep")
)
OPERATOR_METHODS = frozenset(
    f"/step_oracle.v1.TenantService/{name}" for name in ("CreateTenant", "UpdateTenant", "DeleteTenant")
)

_KINDS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Asks every call for a credential, but for the services that are open. Event loop only.

    A stream is ended when the credential it was opened with is revoked. Nothing is asked per message.
    """

    def __init__(
        self,
        credentials: Credentials,
        metrics: Metrics,
        *,
        only: Collection[str] | None = None,
        open_services: Collection[str] = (),
    ) -> None:
        """`only`: the methods this process answers itself; `open_services`: more that need no credential."""
        self._credentials = credentials
        self._metrics = metrics
        self._only = only
        self._open = frozenset((*OPEN_SERVICES, *open_services))

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's handler, or one that refuses."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.split("/")[1] in self._open:
            return handler
        if self._only is not None and method not in self._only:
            return handler
        try:
            caller = self._credentials.find(_authorization(handler_call_details.invocation_metadata or ()))
            _authorize(caller, method)
        except OracleError as error:
            self._metrics.count_call(method.rpartition("/")[2], error.code, error.reason)
            return _refusal(error)
        # Calls are answered in this task (grpcio 1.85), so the handler sees it.
        CALLER.set(caller)
        return self._held(handler, caller) if handler.request_streaming or handler.response_streaming else handler

    def _held(self, handler: Any, caller: Principal) -> Any:
        """The handler of a stream, which ends with the credential."""
        kind = _KINDS[handler.request_streaming, handler.response_streaming]
        answer = getattr(handler, kind)

        async def held(request: Any, context: Any) -> Any:
            try:
                with self._credentials.holding(caller):
                    answering = answer(request, context)
                    if not inspect.isasyncgen(answering):
                        return await answering
                    async for response in answering:
                        await context.write(response)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or self._credentials.is_valid(caller):
                    raise
                task.uncancel()
                await abort(
                    context, CredentialRevoked(f"{caller.name} has been revoked; call again with a valid token")
                )

        return handler._replace(**{kind: held})


def _authorize(caller: Principal, method: str) -> None:
    needed = SCOPE_ADMIN
    if method in ENGINE_METHODS:
        needed = SCOPE_ENGINE
    elif method in OPERATOR_METHODS:
        needed = SCOPE_OPERATOR
    rights = (SCOPE_ENGINE, SCOPE_ADMIN, SCOPE_OPERATOR)
    if rights.index(caller.scope) < rights.index(needed):
        raise PermissionDenied(
            f"{caller.name} has the scope {caller.scope} and {method.rpartition('/')[2]} needs {needed}; use a "
            "credential of that scope"
        )


def _authorization(metadata: Any) -> str:
    """The header; several are as good as none."""
    found = [value for key, value in metadata if key == "authorization"]
    return found[0] if len(found) == 1 and isinstance(found[0], str) else ""


def _refusal(error: OracleError) -> Any:
    """A handler of any method: on the wire they are all streams."""

    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
