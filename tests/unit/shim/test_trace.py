"""Trace files: an engine that starts again goes on in its file, a replay begins it anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle_server.errors import InvalidArgument
from profiler.replay.recorded import read_recorded
from step_oracle.v1 import oracle_service_pb2, trace_pb2
from vllm_shim.trace import TraceWriter

HEADER = trace_pb2.TraceHeader(engine=oracle_service_pb2.EngineIdentity(engine_id="host:8000"))


def write(folder: Path, *, replace: bool) -> Path:
    """A trace of one step with one request; its file."""
    step = trace_pb2.TraceStep()
    step.request.shape.prefill_chunks.add(num_tokens=8)
    step.request.shape.new_requests.add(request_key="a", prompt_tokens=8, max_tokens=3)
    step.reply.target_output_tokens.add()
    writer = TraceWriter(f"{folder}/", HEADER, replace=replace)
    writer.write(step)
    writer.close()
    (path,) = folder.glob("*.trace")
    return path


def test_a_replaced_trace_holds_the_last_run_alone(tmp_path: Path) -> None:
    once = write(tmp_path, replace=True).read_bytes()
    path = write(tmp_path, replace=True)

    assert path.read_bytes() == once
    assert [request.request_id for request in read_recorded(path).requests] == ["a"]


def test_an_engine_that_starts_again_loses_nothing_of_its_trace(tmp_path: Path) -> None:
    once = write(tmp_path, replace=False).read_bytes()
    path = write(tmp_path, replace=False)

    assert path.read_bytes() == once + once
    with pytest.raises(InvalidArgument, match="several starts"):
        read_recorded(path)
