"""Steps of a trace as plain numbers, for tools that fit models to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class TracedStep(NamedTuple):
    """One step of trace.proto: StepShape's numbers, and how long the device was busy with it."""

    chunk_tokens: tuple[int, ...]
    chunk_context: tuple[int, ...]
    num_decode_requests: int
    num_decode_tokens: int
    decode_context_tokens: int
    max_decode_context_tokens: int
    busy_ns: int


def traced_steps(path: Path) -> Iterator[TracedStep]:
    """Steps in their order; raises InvalidArgument where the file is no trace."""
    from oracle_server.rpc.recompute import read_trace

    for record in read_trace(path):
        if not record.HasField("step"):
            continue
        shape = record.step.request.shape
        yield TracedStep(
            tuple(chunk.num_tokens for chunk in shape.prefill_chunks),
            tuple(chunk.context_tokens for chunk in shape.prefill_chunks),
            shape.num_decode_requests,
            shape.num_decode_tokens,
            shape.decode_context_tokens,
            shape.max_decode_context_tokens,
            record.step.device_finish_ns - record.step.device_start_ns,
        )


class TimedStep(NamedTuple):
    """When one step of a trace happened, CLOCK_MONOTONIC nanoseconds, and what it was."""

    step_index: int
    dispatch_ns: int
    answer_ns: int
    device_start_ns: int
    device_finish_ns: int
    deadline_ns: int
    resolved_ns: int
    num_decode_requests: int
    prefill_tokens: int
    support: str


def timed_steps(path: Path) -> tuple[str, list[TimedStep]]:
    """Engine id and steps of a trace, in their order; raises InvalidArgument where the file is no trace."""
    from oracle_server.rpc.recompute import read_trace
    from step_oracle.v1 import step_pb2

    engine, steps = "", []
    for record in read_trace(path):
        if record.HasField("header"):
            engine = record.header.engine.engine_id
            continue
        step, shape = record.step, record.step.request.shape
        steps.append(
            TimedStep(
                step.request.step_index,
                step.dispatch_ns,
                step.answer_ns,
                step.device_start_ns,
                step.device_finish_ns,
                step.deadline_ns,
                step.resolved_ns,
                shape.num_decode_requests,
                sum(chunk.num_tokens for chunk in shape.prefill_chunks),
                step_pb2.Support.Name(step.reply.support).removeprefix("SUPPORT_").lower(),
            )
        )
    return engine, steps
