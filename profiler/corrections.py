"""What is known to be wrong with the tables, put right one named number at a time, so that each can be argued with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from profiler.aiconfigurator import OperatorModel, System
from profiler.model_config import ModelConfig
from profiler.operators import Operator
from profiler.silicon_tables import EXTRAPOLATED

# Systems whose vLLM attention is FlashAttention 2: with a prefill chunk in the batch it loses its split over the KV
# axis. l40s and rtx_pro_6000_server by their tables' kernel; a100_sxm and b60 assumed alike.
_SYSTEMS_WITHOUT_SPLIT = {"l40s", "rtx_pro_6000_server", "a100_sxm", "b60"}

_SYNC_SCHEDULING_BEFORE = (0, 14)


@dataclass(frozen=True)
class Correction:
    """`value` is what was applied; `source` says where the number is from."""

    name: str
    value: float
    reason: str
    source: str


@dataclass(frozen=True)
class StepTerms:
    """Terms of a step that are not operators."""

    skew_decode: float = 0.0
    skew_mixed: float = 0.0
    mixed_decode_factor: float = 1.0
    host_ns_per_step: int = 0
    host_ns_per_sequence: int = 0


def corrected(
    operators: Sequence[Operator], source: OperatorModel, model: ModelConfig, tensor_parallel: int
) -> tuple[list[Operator], list[Correction]]:
    """Lifts attention values that the device cannot reach; every other operator is handed through."""
    by_name = {operator.name: operator for operator in operators}
    generation, bandwidth = _bandwidth_floor(by_name["generation_attention"], model, tensor_parallel)
    context, history = _history_floor(by_name["context_attention"], source)
    by_name |= {"generation_attention": generation, "context_attention": context}
    return [by_name[operator.name] for operator in operators], [bandwidth, history]


def step_terms(
    system: System, vllm_version: str | None, async_scheduling: bool | None
) -> tuple[StepTerms, list[Correction]]:
    """Skew, mixed factor and host time. `async_scheduling` None: what the vLLM version does by default."""
    mixed = 2.0 if system.name in _SYSTEMS_WITHOUT_SPLIT else 1.0
    asynchronous = schedules_asynchronously(vllm_version) if async_scheduling is None else async_scheduling
    terms = StepTerms(
        skew_decode=0.04,
        skew_mixed=0.04,
        mixed_decode_factor=mixed,
        host_ns_per_step=0 if asynchronous else 1_180_000,
        host_ns_per_sequence=0 if asynchronous else 46_000,
    )
    skew = Correction(
        "skew",
        terms.skew_decode,
        "decode attention over uneven contexts takes longer than over their mean: t += skew x (t(max) - t(mean))",
        "least squares over the skew measurements of LLMServingSim's operator tables (0.032-0.046), two GPUs",
    )
    factor = Correction(
        "mixed_decode_factor",
        mixed,
        "decode attention in a step with a prefill chunk; FlashAttention 2 loses its split over the KV axis there",
        "2.0 chosen from {1.6, 2.0} on one RTX PRO 6000 run"
        if mixed != 1.0
        else "1.0 on FlashAttention 3 and TensorRT-LLM kernels; not verified on mixed steps",
    )
    host = Correction(
        "host_ns_per_step",
        terms.host_ns_per_step,
        "host work that synchronous scheduling does not hide"
        if not asynchronous
        else "asynchronous scheduling hides the host's work behind the device",
        "1.18 ms + 46 us per sequence fitted on vLLM 0.12 (nine public H100 rows, one CPU); none seen on 0.15.1",
    )
    per_sequence = replace(host, name="host_ns_per_sequence", value=terms.host_ns_per_sequence)
    return terms, [skew, factor, host, per_sequence]


def schedules_asynchronously(vllm_version: str | None) -> bool:
    """vLLM turned asynchronous scheduling on by default in 0.14; an unknown version counts as a recent one."""
    if not vllm_version:
        return True
    parts = vllm_version.lstrip("v").split(".")
    numbers = tuple(int(part) for part in parts[:2] if part.isdigit())
    return len(numbers) < 2 or numbers >= _SYNC_SCHEDULING_BEFORE


def _bandwidth_floor(operator: Operator, model: ModelConfig, tensor_parallel: int) -> tuple[Operator, Correction]:
    """Decode attention is bound by reading the KV cache: no point may beat the bandwidth of the largest measured reads.

    Where the KV of the benchmark fits the L2 cache, the table shows up to 1.3 times the bandwidth of memory (RTX PRO
    6000 and L40S: the measuring loop does not flush L2). The floor is the fastest point of the top octave.
    """
    requests, contexts = np.meshgrid(*[np.asarray(axis, dtype=np.float64) for axis in operator.points], indexing="ij")
    read_bytes = requests * contexts * model.kv_bytes_per_token_of_rank(tensor_parallel)
    known = operator.knowledge != EXTRAPOLATED
    if not known.any():
        known = np.ones_like(known)
    largest = read_bytes[known].max()
    top = known & (read_bytes >= largest / 2)
    bytes_per_ns = float((read_bytes[top] / operator.latency_ns[top]).max())
    floor = read_bytes / bytes_per_ns
    lifted = int((floor > operator.latency_ns * (1 + 1e-9)).sum())
    correction = Correction(
        "monotone_bandwidth_floor_gbytes_per_s",
        round(bytes_per_ns, 3),
        f"small reads that fit the L2 cache must not beat memory bandwidth; lifts {lifted} of {floor.size} points",
        "fastest point of the top octave of the measured decode-attention table itself",
    )
    return replace(operator, latency_ns=np.maximum(operator.latency_ns, floor)), correction


def _history_floor(operator: Operator, source: OperatorModel) -> tuple[Operator, Correction]:
    """A chunk over a history reads the same KV cache as one decode request of that context, at least once.

    And it costs no less than over a shorter history: the library's model of the history starts below its own table.
    """
    chunks, histories = operator.points
    floor = np.zeros_like(operator.latency_ns)
    for row, chunk in enumerate(chunks):
        for column, history in enumerate(histories):
            if history:
                floor[row, column] = source.generation_attention(1, chunk + history)
    floor = np.maximum.accumulate(np.maximum(floor, operator.latency_ns), axis=1)
    lifted = int((floor > operator.latency_ns * (1 + 1e-9)).sum())
    correction = Correction(
        "history_floor",
        1.0,
        "a chunk with history costs at least one decode read of the same KV and what it costs over less history; "
        f"lifts {lifted} of {floor.size} points",
        "the table has no history; on an RTX PRO 6000 short chunks over 8,192 tokens measure 2 to 9 times the model",
    )
    return replace(operator, latency_ns=np.maximum(operator.latency_ns, floor)), correction
