"""Which files a replay takes together, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiler.cli import main
from step_oracle.v1 import oracle_service_pb2, step_pb2, trace_pb2
from vllm_shim.trace import TraceWriter


def jsonl(folder: Path, name: str) -> str:
    row = {"input_toks": 1, "output_toks": 2, "arrival_time_ns": 0, "input_tok_ids": [7]}
    (folder / name).write_text(json.dumps(row) + "\n")
    return str(folder / name)


def trace(folder: Path) -> str:
    header = trace_pb2.TraceHeader(engine=oracle_service_pb2.EngineIdentity(engine_id="live"))
    writer = TraceWriter(f"{folder}/", header)
    request = step_pb2.NewRequest(request_key="a", prompt_tokens=8, max_tokens=3)
    shape = step_pb2.StepShape(prefill_chunks=[step_pb2.PrefillChunk(num_tokens=8)], new_requests=[request])
    step = trace_pb2.TraceStep(request=step_pb2.StepRequest(shape=shape))
    step.reply.target_output_tokens.add()
    writer.write(step)
    writer.close()
    return f"{folder}/live.trace"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["replay", "--pack", "none", "--model-config", "none", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_measured_run_is_of_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--requests", jsonl(tmp_path, "a.jsonl"), "--requests", jsonl(tmp_path, "b.jsonl"))
    assert "with --real-run give --requests once" in refusal(capsys, *files, "--real-run", str(tmp_path))


def test_a_trace_is_repeated_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--requests", jsonl(tmp_path, "a.jsonl"), "--requests", trace(tmp_path))
    assert "a step trace is repeated alone: give --requests once" in refusal(capsys, *files)


def test_without_a_file_and_without_users_there_is_nothing_to_replay(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --requests FILE, or --users N" in refusal(capsys)
