"""Servers that answer a constant: what the wire costs without us.

    python tests/performance/floors.py stream|raw TARGET

`stream` is grpc.aio on uvloop, our stack without our handler. `raw` is a bare socket on uvloop: length, step index and
step in, step index and latency out; about 1.5 times what an epoll loop in C costs.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import Any

import grpc
import uvloop

from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import oracle_service_pb2_grpc

LATENCY_NS = 10_000_000


class Constant(oracle_service_pb2_grpc.OracleServiceServicer):
    """Answers every step of a stream with the same latency."""

    async def StreamSteps(self, requests: Any, context: Any) -> None:
        end = grpc.aio.EOF  # type: ignore[attr-defined]
        while (request := await context.read()) is not end:
            response = pb.StreamStepsResponse()
            if request.HasField("open"):
                response.opened.incarnation = request.open.incarnation
            for step in request.steps:
                response.replies.add(step_index=step.step_index, latency_ns=[LATENCY_NS])
            await context.write(response)


class Frames(asyncio.Protocol):
    """One connection of the bare socket."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.left = b""

    def data_received(self, data: bytes) -> None:
        data = self.left + data if self.left else data
        position = 0
        replies = []
        while len(data) - position >= 4:
            (size,) = struct.unpack_from("<I", data, position)
            if len(data) - position - 4 < size:
                break
            (step_index,) = struct.unpack_from("<Q", data, position + 4)
            replies.append(struct.pack("<QQ", step_index, LATENCY_NS))
            position += 4 + size
        self.left = data[position:]
        self.transport.write(b"".join(replies))


async def serve(kind: str, target: str) -> None:
    if kind == "stream":
        server = grpc.aio.server()
        oracle_service_pb2_grpc.add_OracleServiceServicer_to_server(Constant(), server)
        server.add_insecure_port(target)
        await server.start()
    else:
        await asyncio.get_running_loop().create_unix_server(Frames, target.removeprefix("unix:"), backlog=4096)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:3]))
