"""The two packs the demo swaps: one model on two GPUs, everything an engine freezes at its start equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.demo.progress import step_oracle
from oracle_server.pack import compile_pack, load_compiled, open_oracle
from oracle_server.sampling.shape import StepQuery
from step_oracle.v1 import step_pb2

# The engine limits both packs are tied to. vLLM's own defaults follow the device, so they are given as flags too.
MAX_MODEL_LEN = 4096
MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 2048
GPU_MEMORY_UTILIZATION = 0.9
ENGINE_LIMITS: Sequence[str] = (
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
    *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
    *("--gpu-memory-utilization", str(GPU_MEMORY_UTILIZATION)),
)


@dataclass(frozen=True)
class Pack:
    """One pack on disk. `gpu` is the short name for tables."""

    gpu: str
    folder: Path
    digest: str
    device: str
    kv_blocks: int


@dataclass(frozen=True)
class StepCosts:
    """What a pack says the steps of a period cost; nothing in it was waited for."""

    # Medians over the steps without a prompt and over those with one.
    decode_step_p50_ms: float
    prompt_step_p50_ms: float
    # Mean over the generated tokens: step latency, weighted with the decode requests of the step.
    token_wait_mean_ms: float
    # The median decode step.
    decode_requests_p50: int
    decode_context_tokens_p50: int

    def request_ms(self, output_tokens: float) -> float:
        """A request of this many output tokens that never queues."""
        return self.prompt_step_p50_ms + (output_tokens - 1) * self.token_wait_mean_ms


def make_packs(model: Path, folder: Path, vllm_version: str) -> tuple[Pack, Pack]:
    """An H100 and an L40S. The KV blocks are what synthesize estimates for the smaller device, pinned for both."""
    small = _synthesize("L40S", "l40s", model, folder / "l40s", vllm_version)
    pinned = ("--kv-blocks", str(small.kv_blocks), "--kv-blocks-basis", "assumed")
    return _synthesize("H100", "h100_sxm", model, folder / "h100", vllm_version, *pinned), small


def step_costs(pack: Pack, steps: Sequence[step_pb2.StepRequest]) -> StepCosts:
    """Ask the pack itself, in this process and with draws of its own, for every step a scheduler made."""
    oracle = open_oracle(load_compiled(_compiled(pack.folder)))
    queries = [_query(step.shape) for step in steps]
    latency_ms = np.array([oracle.answer(query, 0, draw).latency_ns / 1e6 for draw, query in enumerate(queries)])
    decoded = np.array([query.num_decode_requests for query in queries])
    context = np.array([query.decode_context_tokens for query in queries])
    has_prompt = np.array([bool(query.chunk_tokens) for query in queries])
    return StepCosts(
        decode_step_p50_ms=float(np.median(latency_ms[~has_prompt])),
        prompt_step_p50_ms=float(np.median(latency_ms[has_prompt])),
        token_wait_mean_ms=float((latency_ms * decoded).sum() / decoded.sum()),
        decode_requests_p50=int(np.median(decoded[~has_prompt])),
        decode_context_tokens_p50=int(np.median(context[~has_prompt])),
    )


def _query(shape: step_pb2.StepShape) -> StepQuery:
    return StepQuery(
        chunk_tokens=tuple(chunk.num_tokens for chunk in shape.prefill_chunks),
        chunk_context=tuple(chunk.context_tokens for chunk in shape.prefill_chunks),
        num_decode_requests=shape.num_decode_requests,
        num_decode_tokens=shape.num_decode_tokens,
        decode_context_tokens=shape.decode_context_tokens,
        max_decode_context_tokens=shape.max_decode_context_tokens,
        concurrency=shape.concurrency,
        previous_prefill_tokens=shape.previous_prefill_tokens,
        num_new_requests=len(shape.new_requests),
    )


def _synthesize(gpu: str, system: str, model: Path, folder: Path, vllm_version: str, *options: str) -> Pack:
    step_oracle(
        *("synthesize", "--system", system, "--model", str(model), "--output", str(folder), "--vllm", vllm_version),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS)),
        *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
        *("--gpu-memory-utilization", str(GPU_MEMORY_UTILIZATION), *options),
        next_step="see that the operator tables are installed: .venv/bin/pip install 'aiconfigurator-core==0.12.0'",
    )
    # Compiling is what a server does with an upload: a pack it would refuse fails here.
    report = compile_pack(folder, _compiled(folder))
    return Pack(gpu, folder, report.digest, report.manifest.device.name, report.manifest.kv_cache.blocks)


def _compiled(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-compiled")
