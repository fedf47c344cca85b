"""Requests of a step trace: a live engine's admissions, to be repeated at the same steps."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from oracle_server.errors import InvalidArgument
from profiler.replay.job import Request
from step_oracle.v1 import trace_pb2 as pb

_RECORD_LIMIT = 16 << 20


@dataclass(frozen=True)
class RecordedRun:
    """What a trace says of the requests of one engine."""

    engine_id: str
    requests: tuple[Request, ...]


def is_trace(path: Path) -> bool:
    """Whether a file begins as a step trace does: a length, then a record with a header."""
    try:
        with path.open("rb") as file:
            start = file.read(5)
    except OSError:
        return False
    # The first field of a record that is a header has the tag 0x0a.
    return len(start) == 5 and start[4] == 0x0A and 0 < struct.unpack("<I", start[:4])[0] <= _RECORD_LIMIT


def read_recorded(path: Path) -> RecordedRun:
    """Every request of a trace, admitted before the step that had it first.

    A trace holds no prompt text: prompts are made up, so requests that shared a prefix cannot be repeated and are
    refused. A request that ended earlier than its limit and its target say (a stop string, a client that left) runs on
    here.
    """
    engine_id, requests = "", []
    for record in _records(path):
        if record.HasField("header"):
            if engine_id:
                raise InvalidArgument(f"{path} holds several starts of an engine; cut it into one each")
            engine_id = record.header.engine.engine_id
            continue
        step = record.step
        shape = step.request.shape
        if len(step.reply.target_output_tokens) != len(shape.new_requests):
            raise InvalidArgument(f"{path}: step {step.request.step_index} has an answer of another step")
        # The chunks of new requests stand in front, in their order; only a hit in the prefix cache gives one a context.
        for place, (new, target) in enumerate(zip(shape.new_requests, step.reply.target_output_tokens, strict=True)):
            if shape.prefill_chunks[place].context_tokens:
                raise InvalidArgument(
                    f"{path}: request {new.request_key} found {shape.prefill_chunks[place].context_tokens} of its "
                    "tokens in the prefix cache; a trace has no prompts, so that cannot be repeated"
                )
            limits = [tokens for tokens in (new.max_tokens, target.output_tokens) if tokens]
            if not limits:
                raise InvalidArgument(f"{path}: nothing says where request {new.request_key} ended")
            output_tokens = max(min(limits), min(new.min_tokens, new.max_tokens or new.min_tokens))
            requests.append(
                Request(new.request_key, new.prompt_tokens, output_tokens, admit_step=step.request.step_index)
            )
    if len({request.request_id for request in requests}) != len(requests):
        raise InvalidArgument(f"{path}: two requests have the same key; only distinct ones can be told apart")
    if not requests:
        raise InvalidArgument(f"{path} holds no request")
    return RecordedRun(engine_id, tuple(requests))


def _records(path: Path) -> Iterator[pb.TraceRecord]:
    data, position = path.read_bytes(), 0
    while position + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, position)
        position += 4
        if position + size > len(data):
            # A killed engine leaves at most one torn record, at the end.
            return
        try:
            yield pb.TraceRecord.FromString(data[position : position + size])
        except DecodeError as error:
            raise InvalidArgument(f"{path}: byte {position} begins no record ({error})") from error
        position += size
