"""Requests from every format, prompts that share what the workload says they share, recorded admissions."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from oracle_server.errors import InvalidArgument
from profiler.replay.job import Job, Request, RunSpec, read_job, read_requests, write_job, write_requests
from profiler.replay.prompts import prompt_token_ids
from profiler.replay.recorded import is_trace, read_recorded
from profiler.replay.workload import closed_loop, read_workload
from step_oracle.v1 import step_pb2, trace_pb2


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_sharegpt_lines_keep_their_token_ids_and_begin_at_zero(tmp_path: Path) -> None:
    path = write(
        tmp_path / "requests.jsonl",
        {"input_toks": 3, "output_toks": 5, "arrival_time_ns": 2_500, "input_tok_ids": [7, 8, 9]},
        {"input_toks": 1, "output_toks": 2, "arrival_time_ns": 1_500, "input_tok_ids": [4]},
    )

    assert read_workload(path) == [
        Request("bench-1", 1, 2, 0, (4,)),
        Request("bench-0", 3, 5, 1_000, (7, 8, 9)),
    ]


def test_mooncake_blocks_that_are_equal_are_equal_tokens_and_others_are_not(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mooncake.jsonl",
        {"timestamp": 3000, "input_length": 1030, "output_length": 9, "hash_ids": [0, 1, 2]},
        {"timestamp": 6000, "input_length": 1500, "output_length": 1, "hash_ids": [0, 1, 3]},
    )

    first, second = read_workload(path)
    ours, theirs = (prompt_token_ids(request, i, 32_000) for i, request in enumerate((first, second)))

    assert (first.arrival_ns, second.arrival_ns) == (0, 3_000_000_000)
    assert (len(ours), len(theirs)) == (1030, 1500)
    assert ours[:1024] == theirs[:1024]
    assert ours[1024:] != theirs[1024:1030]
    assert max(theirs) < 32_000
    assert len(set(theirs)) > 1000


def test_azure_rows_have_times_to_the_100_ns_and_failed_requests_are_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "azure.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 23:59:59.9799601,374,44",
        "2023-11-17 00:00:00.0000000,5,0",
        "2023-11-17 00:00:01.0799602,396,109",
    )

    assert [(r.prompt_tokens, r.output_tokens, r.arrival_ns) for r in read_workload(path)] == [
        (374, 44, 0),
        (396, 109, 1_100_000_100),
    ]


def test_made_up_prompts_share_no_block_with_each_other() -> None:
    prompts = [prompt_token_ids(request, i, 50_000) for i, request in enumerate(closed_loop(40, 700, 8))]

    blocks = {tuple(prompt[begin : begin + 16]) for prompt in prompts for begin in range(0, 688, 16)}
    assert len(blocks) == 40 * 43


def test_a_limit_takes_the_first_requests(tmp_path: Path) -> None:
    rows = [{"timestamp": i, "input_length": 10 + i, "output_length": 1} for i in range(9)]

    assert [r.prompt_tokens for r in read_workload(write(tmp_path / "m.jsonl", *rows), limit=3)] == [10, 11, 12]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "line 1: not JSON"),
        ([{"prompt": "hello"}], "line 1: an object with input_tok_ids"),
        ([{"input_toks": 2, "output_toks": 1, "arrival_time_ns": 0, "input_tok_ids": [1]}], "there are 1 token ids"),
        ([{"input_toks": 1, "output_toks": 0, "arrival_time_ns": 0, "input_tok_ids": [1]}], "output_toks is 0"),
        ([{"input_toks": 1, "output_toks": 1.5, "arrival_time_ns": 0, "input_tok_ids": [1]}], "output_toks is 1.5"),
        ([{"input_toks": 1, "output_toks": 1, "input_tok_ids": [1]}], "arrival_time_ns is None"),
        ([{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}], "do not cover 600 tokens"),
        (["a,b", "1,2"], "has the columns a, b"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,1"], "row 2: TIMESTAMP is 'yesterday'"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens"], "holds no request"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, lines: list[object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        read_workload(write(tmp_path / "file", *lines))


def test_job_and_requests_travel_unchanged(tmp_path: Path) -> None:
    requests = [Request("a", 3, 2, 7, (1, 2, 3)), Request("b", 600, 1, 9, blocks=(4, 5), admit_step=3)]
    job = Job("pack", "model", "requests", "results", ("--x", "y"), {"seed": 1}, (RunSpec(1), RunSpec(2, "t", True)))

    write_requests(tmp_path / "requests.jsonl", requests)
    write_job(tmp_path / "job.json", job)

    assert read_requests(tmp_path / "requests.jsonl") == requests
    assert read_job(tmp_path / "job.json") == job


def write_trace(path: Path, *steps: trace_pb2.TraceStep) -> Path:
    header = trace_pb2.TraceHeader()
    header.engine.engine_id = "host:8000"
    records = [trace_pb2.TraceRecord(header=header), *(trace_pb2.TraceRecord(step=step) for step in steps)]
    data = [record.SerializeToString() for record in records]
    path.write_bytes(b"".join(struct.pack("<I", len(part)) + part for part in data))
    return path


def step(index: int, key: str, max_tokens: int, target: int = 0, hit: int = 0) -> trace_pb2.TraceStep:
    new = step_pb2.NewRequest(request_key=key, prompt_tokens=30, max_tokens=max_tokens)
    result = trace_pb2.TraceStep()
    result.request.step_index = index
    result.request.shape.new_requests.append(new)
    result.request.shape.prefill_chunks.add(num_tokens=30 - hit, context_tokens=hit)
    result.reply.target_output_tokens.add(output_tokens=target)
    return result


def test_a_trace_tells_before_which_step_a_request_was_admitted_and_when_it_ended(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "a.trace", step(0, "a", 20), step(7, "b", 20, target=5))

    run = read_recorded(path)

    assert is_trace(path)
    assert run.engine_id == "host:8000"
    assert run.requests == (Request("a", 30, 20, admit_step=0), Request("b", 30, 5, admit_step=7))


def test_a_torn_last_record_is_left_out(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "a.trace", step(0, "a", 20), step(7, "b", 20))
    path.write_bytes(path.read_bytes()[:-1])

    assert len(read_recorded(path).requests) == 1


def test_a_hit_in_the_prefix_cache_cannot_be_repeated_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="a found 16 of its tokens in the prefix cache"):
        read_recorded(write_trace(tmp_path / "a.trace", step(0, "a", 20, hit=16)))


def test_a_json_file_is_no_trace(tmp_path: Path) -> None:
    assert not is_trace(write(tmp_path / "m.jsonl", {"timestamp": 0}))
