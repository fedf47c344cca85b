"""One engine's stream on a real channel to a scripted oracle, and the steps that go over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import step_pb2
from vllm_shim.config import ShimConfig
from vllm_shim.step_shape import DecodeStep
from vllm_shim.stream import OracleStream, PendingStep, replicas_of

LATENCY_NS = 5_000_000
# CPython's own switch interval.
USUAL_INTERVAL = 0.005


def config(target: str, **changes: str) -> ShimConfig:
    """The shim's configuration for this target; `changes` are STEP_ORACLE_… variables without their prefix."""
    variables = {"STEP_ORACLE_TARGET": target, "STEP_ORACLE_ENGINE_ID": "engine-0"}
    return ShimConfig.from_environment(variables | {f"STEP_ORACLE_{k}": v for k, v in changes.items()}, [])


@contextmanager
def stream_to(target: str, hurried_seconds: float = USUAL_INTERVAL, /, **changes: str) -> Iterator[OracleStream]:
    """A stream that is open while the block runs."""
    settings = config(target, **changes)
    opening = pb.StreamOpen(engine=pb.EngineIdentity(engine_id="engine-0"), incarnation=7)
    stream = OracleStream(settings, replicas_of(settings), opening, hurried_seconds=hurried_seconds)
    try:
        yield stream
    finally:
        stream.close()


def step(index: int) -> step_pb2.StepRequest:
    """A decode step of one request."""
    shape = step_pb2.StepShape(num_decode_requests=1, num_decode_tokens=1, concurrency=1)
    return step_pb2.StepRequest(step_index=index, shape=shape)


def decode(stream: OracleStream, index: int) -> PendingStep:
    """The same, handed over as one that a lease may answer."""
    one = DecodeStep([], [], [], 1, 100, 100, 0)
    request = step(index)
    request.shape.decode_context_tokens = request.shape.max_decode_context_tokens = 100
    return stream.submit_decode(index, one, lambda _: request)


def prefill(index: int) -> step_pb2.StepRequest:
    """A step that no lease answers."""
    shape = step_pb2.StepShape(prefill_chunks=[step_pb2.PrefillChunk(num_tokens=3)], concurrency=1)
    return step_pb2.StepRequest(step_index=index, shape=shape)


def granting(generation: int, latency_ns: int) -> Any:
    """Answers that lease everything there is to lease."""

    def answer(request: step_pb2.StepRequest) -> step_pb2.StepReply:
        reply = step_pb2.StepReply(step_index=request.step_index, latency_ns=[latency_ns], generation=generation)
        if not request.shape.prefill_chunks:
            reply.lease.num_decode_requests = 1
            reply.lease.context_tokens_end = reply.lease.max_context_tokens_end = 1 << 40
            reply.lease.residual_pool.append(1.0)
            reply.lease.intercept_ns, reply.lease.generation = latency_ns, generation
        return reply

    return answer
