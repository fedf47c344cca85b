"""Server CPU per streamed step, beside a handler that answers with a constant: interleaved pairs, and their ratio.

    python tests/performance/server_cpu_per_step.py [--streams 64] [--messages 600] [--steps-per-message 1] [--pairs 5]

The server, all its threads, runs on one core and the clients on another; CPU time is the process's own, so other load
moves it less than wall-clock time. Needs two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpc
import uvloop

from builders import build_composed_pack
from oracle_calls import Calls, decode, identity
from oracle_process import OracleProcess
from step_oracle.v1 import oracle_service_pb2, oracle_service_pb2_grpc

SERVER_CORE, CLIENT_CORE = 0, 1


def main() -> None:
    """Print one line per pair and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--messages", type=int, default=600)
    parser.add_argument("--steps-per-message", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--constant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.constant:
        uvloop.run(_serve_constants(options.constant))
        return
    ratios = []
    for pair in range(options.pairs):
        ours, floor = _in_a_folder(_ours, options), _in_a_folder(_floor, options)
        ratios.append(ours / floor)
        print(f"pair {pair}: {ours:.1f} us per message, constant handler {floor:.1f} us, ratio {ratios[-1]:.2f}")
    low, high = min(ratios), max(ratios)
    print(f"ratio {statistics.median(ratios):.2f} (median of {len(ratios)}, {low:.2f} to {high:.2f})")


def _in_a_folder(measure: Callable[[Path, argparse.Namespace], float], options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, {SERVER_CORE})
        return measure(Path(folder), options)


def _ours(folder: Path, options: argparse.Namespace) -> float:
    build_composed_pack(folder / "pack")
    with OracleProcess(folder / "state", listen=(f"unix:{folder}/s",)) as server:
        with Calls(server.target) as calls:
            calls.create(calls.upload(folder / "pack"))
        return _measure(server.target, server.pid, options)


def _floor(folder: Path, options: argparse.Namespace) -> float:
    target = f"unix:{folder}/s"
    command = [sys.executable, __file__, "--constant", target]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        try:
            return _measure(target, server.pid, options)
        finally:
            server.kill()


def _measure(target: str, pid: int, options: argparse.Namespace) -> float:
    os.sched_setaffinity(0, {CLIENT_CORE})
    return uvloop.run(_drive(target, pid, options))


async def _drive(target: str, pid: int, options: argparse.Namespace) -> float:
    ready = [asyncio.Event() for _ in range(options.streams)]
    go = asyncio.Event()
    clients = [
        asyncio.create_task(_ask(target, f"e{i}", ready[i], go, options.messages, options.steps_per_message))
        for i in range(options.streams)
    ]
    for event in ready:
        await event.wait()
    before = _cpu_seconds(pid)
    go.set()
    await asyncio.gather(*clients)
    messages: int = options.streams * options.messages
    return (_cpu_seconds(pid) - before) / messages * 1e6


async def _ask(target: str, name: str, ready: asyncio.Event, go: asyncio.Event, messages: int, steps: int) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = oracle_service_pb2_grpc.OracleServiceStub(channel)
        engine = identity(name)
        attached = await stub.AttachEngine(oracle_service_pb2.AttachEngineRequest(engine=engine))
        call = stub.StreamSteps()
        opening = oracle_service_pb2.StreamOpen(engine=engine, incarnation=attached.incarnation)
        await call.write(oracle_service_pb2.StreamStepsRequest(open=opening))
        await call.read()
        ready.set()
        await go.wait()
        for i in range(messages):
            asked = [decode(i * steps + j, context=4000 + i % 800) for j in range(steps)]
            await call.write(oracle_service_pb2.StreamStepsRequest(steps=asked))
            response = await call.read()
            assert len(response.replies) == steps
        await call.done_writing()


async def _serve_constants(target: str) -> None:
    class Constant(oracle_service_pb2_grpc.OracleServiceServicer):
        async def AttachEngine(self, request: object, context: object) -> oracle_service_pb2.AttachEngineResponse:
            return oracle_service_pb2.AttachEngineResponse(incarnation=1)

        async def StreamSteps(self, requests: object, context: object) -> None:
            end = grpc.aio.EOF  # type: ignore[attr-defined]
            while (request := await context.read()) is not end:  # type: ignore[attr-defined]
                response = oracle_service_pb2.StreamStepsResponse()
                for step in request.steps:
                    response.replies.add(step_index=step.step_index, latency_ns=[10_000_000])
                await context.write(response)  # type: ignore[attr-defined]

    server = grpc.aio.server()
    oracle_service_pb2_grpc.add_OracleServiceServicer_to_server(Constant(), server)
    server.add_insecure_port(target)
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
