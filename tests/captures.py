"""Capture folders as an engine would have left them, with steps of known shape and time."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from profiler.capture.device_times import DeviceStepTimes, HostClock
from profiler.capture.recording import StepSchedule, device_block, scheduled_block
from profiler.capture.steps import CapturedStep
from profiler.capture.trace_file import MAGIC, framed
from step_oracle.v1 import capture_pb2 as pb
from step_oracle.v1 import step_pb2
from vllm_shim.step_shape import ScheduledStep

ENGINE: dict[str, Any] = {
    "vllm_version": "0.32.0",
    "model": "/models/tiny",
    "model_shape": (
        "Qwen3ForCausalLM layers=6 hidden=1024 intermediate=2048 heads=8 kv_heads=4 head_dim=128 vocab=8192"
    ),
    "dtype": "bfloat16",
    "quantization": "",
    "kv_cache_dtype": "auto",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "block_size": 128,
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "async_scheduling": False,
    "prefix_caching": False,
    "chunked_prefill": True,
    "gpu_memory_utilization": 0.92,
    "num_gpu_blocks_override": 0,
    "kv_bytes_per_token": 12288,
    "num_speculative_tokens": 0,
    "graph_capture_sizes": [],
    "num_kv_blocks": 682,
}
RANK: dict[str, Any] = {
    "device": {"name": "AMD EPYC", "memory_bytes": 24 << 30, "capability": [], "cpu_threads": 1},
    "attention_backends": ["CPU_ATTN"],
    "model_runner": "v1",
    "driver": "",
    "libraries": {"torch": "2.13.0+cpu"},
}
PREP_NS, COPY_NS = 100_000, 120_000
HOST_NS, HOST_NS_PER_REQUEST = 210_000, 1_500


def true_latency_ns(chunks: Sequence[int], requests: int, context: int) -> float:
    """A device with a cost per step, per token and per token of context."""
    return 2e6 + 0.5e6 * sum(chunks) / 8 + 0.2e6 * requests + 300.0 * context


def steps(count: int, *, seed: int = 1, noise: float = 0.01, factor: float = 1.0) -> list[CapturedStep]:
    """Decode and mixed steps in turn, back to back, with a latency near true_latency_ns."""
    source, made, now = random.Random(seed), [], 1_000_000_000
    for index in range(count):
        chunks = (source.choice((16, 64, 200, 400)),) if index % 4 == 0 else ()
        requests = source.choice((1, 2, 4, 8, 16, 24, 32))
        each = source.choice((64, 256, 1024))
        context = requests * each
        latency = int(true_latency_ns(chunks, requests, context) * factor * source.gauss(1.0, noise))
        start = now + PREP_NS
        made.append(
            CapturedStep(
                step_index=index,
                chunk_tokens=chunks,
                chunk_context=tuple(0 for _ in chunks),
                num_decode_requests=requests,
                num_decode_tokens=requests,
                decode_context_tokens=context,
                max_decode_context_tokens=each,
                previous_prefill_tokens=0,
                num_new_requests=len(chunks),
                generated_tokens=requests + len(chunks),
                dispatch_ns=now,
                device_start_ns=start,
                device_end_ns=start + latency,
                result_ns=start + latency + COPY_NS,
                was_idle=True,
                warm_up=False,
                host_ns=HOST_NS + HOST_NS_PER_REQUEST * (requests + len(chunks)) if index else 0,
            )
        )
        now = start + latency + COPY_NS + 300_000
    return made


def write_run(
    folder: Path,
    captured: Sequence[CapturedStep],
    *,
    number: int = 1,
    engine: dict[str, Any] | None = None,
    ranks: int = 1,
    worker_offset: int = 0,
    steps_per_record: int = 1000,
) -> Path:
    """One run of a capture; `worker_offset`: how far the workers' count is ahead of the scheduler's."""
    parts = [captured[at : at + steps_per_record] for at in range(0, len(captured), steps_per_record)]
    run = folder / f"run-{number:03d}"
    run.mkdir(parents=True)
    (run / "engine.json").write_text(json.dumps({"engine": ENGINE | (engine or {})}))
    blocks = [scheduled_block([_scheduled(step) for step in part]) for part in parts]
    (run / "engine.capture").write_bytes(MAGIC + b"".join(map(framed, (_header(), *blocks))))
    for rank in range(ranks):
        (run / f"rank-{rank}.json").write_text(json.dumps(RANK))
        header = _header(rank=rank, timing=pb.CAPTURE_TIMING_HOST)
        devices = [_device_block(part, worker_offset) for part in parts]
        (run / f"rank-{rank}.capture").write_bytes(MAGIC + b"".join(map(framed, (header, *devices))))
    return run


def append(run: Path, captured: Sequence[CapturedStep], *, worker_offset: int = 0) -> None:
    """Steps at the end of a run's files, one record in each, as an engine that is running writes them."""
    with (run / "engine.capture").open("ab") as file:
        file.write(framed(scheduled_block([_scheduled(step) for step in captured])))
    for path in run.glob("rank-*.capture"):
        with path.open("ab") as file:
            file.write(framed(_device_block(captured, worker_offset)))


def _header(**fields: Any) -> pb.CaptureRecord:
    return pb.CaptureRecord(header=pb.CaptureHeader(version="test", **fields))


def _device_block(part: Sequence[CapturedStep], worker_offset: int) -> pb.CaptureRecord:
    times = [
        DeviceStepTimes(
            step.step_index + worker_offset,
            step.total_tokens,
            step.device_start_ns,
            return_ns=step.device_end_ns,
            start_ns=step.device_start_ns,
            end_ns=step.device_end_ns,
            was_idle=step.was_idle,
        )
        for step in part
    ]
    block = device_block(HostClock(), times)
    assert block is not None
    return block


def _scheduled(step: CapturedStep) -> StepSchedule:
    shape = step_pb2.StepShape(
        num_decode_requests=step.num_decode_requests,
        num_decode_tokens=step.num_decode_tokens,
        decode_context_tokens=step.decode_context_tokens,
        max_decode_context_tokens=step.max_decode_context_tokens,
        concurrency=step.num_decode_requests + len(step.chunk_tokens),
        previous_prefill_tokens=step.previous_prefill_tokens,
    )
    for tokens, context in zip(step.chunk_tokens, step.chunk_context, strict=True):
        shape.prefill_chunks.add(num_tokens=tokens, context_tokens=context)
    for number in range(step.num_new_requests):
        shape.new_requests.add(request_key=f"request-{step.step_index}-{number}", prompt_tokens=1)
    return StepSchedule(
        step_index=step.step_index,
        output=None,
        scheduled=ScheduledStep(shape),
        dispatch_ns=step.dispatch_ns,
        result_ns=step.result_ns,
        generated_tokens=step.generated_tokens,
        host_ns=step.host_ns,
    )
