"""The file the load client plays: encoded messages with their times, and the engines that send them."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from step_oracle.v1 import oracle_service_pb2 as service
from step_oracle.v1 import step_pb2

_MAGIC = b"SOLOAD2\n"
STREAM, UNARY, RAW = 0, 1, 2
_METHODS = {STREAM: "StreamSteps", UNARY: "SampleStep", RAW: ""}
# Bounds of the shim's lateness buckets, and the last one for what is above.
_LATENESS_BUCKETS = 12


@dataclass(frozen=True, slots=True)
class Message:
    """One message: when it is due after its engine's phase, its first step, how many answers it asks for."""

    due_ns: int
    step_index: int
    steps: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ScriptEngine:
    """An emulated engine: the sequence it plays, how far it is shifted, and the bytes it begins with: the message that
    opens its stream, or what goes before each of its unary messages. It sends `count` messages of the sequence from
    number `first` on; without a count all that follow."""

    sequence: int
    phase_ns: int
    begin: bytes = b""
    first: int = 0
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """What one run sends."""

    mode: int
    sequences: Sequence[Sequence[Message]]
    engines: Sequence[ScriptEngine]

    def write(self, path: Path) -> None:
        """The file as script.c reads it; little-endian."""
        block = b"" if self.mode == RAW else header_block(_METHODS[self.mode])
        parts = [_MAGIC, struct.pack("<IIII", self.mode, len(self.sequences), len(self.engines), len(block)), block]
        for sequence in self.sequences:
            parts.append(struct.pack("<I", len(sequence)))
            for message in sequence:
                head = struct.pack("<qQII", message.due_ns, message.step_index, message.steps, len(message.data))
                parts += (head, message.data)
        for engine in self.engines:
            left = len(self.sequences[engine.sequence]) - engine.first
            count = left if engine.count is None else engine.count
            head = struct.pack("<IIIqI", engine.sequence, engine.first, count, engine.phase_ns, len(engine.begin))
            parts += (head, engine.begin)
        path.write_bytes(b"".join(parts))


def stream_messages(
    steps: Sequence[step_pb2.StepRequest],
    *,
    period_ns: int,
    generation: int,
    sent: Collection[int] | None = None,
) -> list[Message]:
    """The messages of a shim's stream: step i is due at i x `period_ns`.

    `sent` are the steps that no lease answers (None: all are sent). Each second the counts go with the first message
    there is, and alone where there is none for another second.
    """
    chosen = None if sent is None else frozenset(sent)
    per_second = max(1, round(1e9 / period_ns))
    messages = []
    counted = leased = 0
    last_leased = 0
    for i, step in enumerate(steps):
        is_sent = chosen is None or i in chosen
        waited = i - counted
        if not is_sent:
            leased, last_leased = leased + 1, step.step_index
        if not is_sent and waited < 2 * per_second:
            continue
        message = service.StreamStepsRequest(min_generation=generation)
        if waited >= per_second:
            message.counts.CopyFrom(_counts(waited, leased, last_leased))
            counted, leased = i, 0
        if is_sent:
            message.steps.append(step)
        messages.append(Message(i * period_ns, step.step_index, int(is_sent), message.SerializeToString()))
    return messages


def unary_messages(steps: Sequence[step_pb2.StepRequest], *, period_ns: int) -> list[Message]:
    """SampleStep messages without the engine: protobuf messages put end to end are one, so that comes before each."""
    return [
        Message(i * period_ns, step.step_index, 1, service.SampleStepRequest(steps=[step]).SerializeToString())
        for i, step in enumerate(steps)
    ]


def raw_messages(steps: Sequence[step_pb2.StepRequest], *, period_ns: int) -> list[Message]:
    """Steps for the bare socket."""
    return [Message(i * period_ns, step.step_index, 1, step.SerializeToString()) for i, step in enumerate(steps)]


def header_block(method: str) -> bytes:
    """The request headers, encoded without a dynamic table and without Huffman codes (RFC 7541)."""
    path = f"/step_oracle.v1.OracleService/{method}".encode()
    assert len(path) < 127
    return b"".join(
        (
            b"\x83\x86",  # :method POST, :scheme http
            b"\x04" + bytes((len(path),)) + path,
            b"\x01\x09localhost",  # :authority
            b"\x0f\x10\x10application/grpc",  # content-type
            b"\x00\x02te\x08trailers",
        )
    )


def _counts(steps: int, leased: int, last_leased: int) -> service.ShimCounts:
    buckets = [0] * _LATENESS_BUCKETS
    buckets[0] = steps
    return service.ShimCounts(
        steps=steps,
        leased_steps=leased,
        last_leased_step_index=last_leased if leased else 0,
        leased_steps_by_support=[0, 0, leased, 0] if leased else [],
        lateness_buckets=buckets,
        lateness_sum_ns=5_000 * steps,
    )
