"""Servers without what ours does around an answer: what the wire costs.

    python tests/performance/floors.py stream|raw TARGET
    python tests/performance/floors.py unary PACK TARGET

`stream` is grpc.aio on uvloop, our stack without our handler; it answers a constant, as `raw` does, a bare socket on
uvloop: length, step index and step in, step index and latency out; about 1.5 times what an epoll loop in C costs.
`unary` answers SampleStep from a pack as our server does, from one snapshot and without looking anything up.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc
import uvloop

from oracle_server import pack as packs
from oracle_server.config import DEFAULT_EXPERIMENT
from oracle_server.rpc import wire
from oracle_server.state.binding import Binding
from oracle_server.state.snapshot import LoadedPack, Snapshot
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


class Unary(oracle_service_pb2_grpc.OracleServiceServicer):
    """Our answers behind unary calls."""

    def __init__(self, pack: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="step-oracle-floor-") as folder:
            packs.compile_pack(pack, Path(folder) / "compiled")
            compiled = packs.load_compiled(Path(folder) / "compiled")
        oracle = packs.open_oracle(compiled)
        oracle.warm()
        binding = Binding(rules=(), default_pack_digest="pack", seed=1)
        self.snapshot = Snapshot(
            DEFAULT_EXPERIMENT, 1, binding, {"pack": LoadedPack("pack", compiled.manifest, oracle)}
        )

    async def SampleStep(self, request: pb.SampleStepRequest, context: Any) -> pb.SampleStepResponse:
        plan = self.snapshot.plan(wire.read_identity(request.engine))
        response = pb.SampleStepResponse()
        for step in request.steps:
            query, drafts, new_requests = wire.read_step(step)
            answer = plan.answer(step.step_index, query, drafts, new_requests)
            wire.write_reply(response.replies.add(), step.step_index, plan.generation, answer)
        return response


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


async def serve(kind: str, *arguments: str) -> None:
    target = arguments[-1]
    if kind != "raw":
        server = grpc.aio.server()
        servicer = Unary(Path(arguments[0])) if kind == "unary" else Constant()
        oracle_service_pb2_grpc.add_OracleServiceServicer_to_server(servicer, server)
        server.add_insecure_port(target)
        await server.start()
    else:
        await asyncio.get_running_loop().create_unix_server(Frames, target.removeprefix("unix:"), backlog=4096)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:]))
