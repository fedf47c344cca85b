"""What a capture should visit: shapes of steps, coarse ones first, and when enough is known of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profiler.capture.steps import CapturedStep

FEWEST_STEPS = 8
# A mean over fewer octaves of context is one measurement; over more it is several.
_OCTAVE = 0.5
_LEAST_CONTEXT = 64
_LONG_GROWTH = 4
# Shares of the KV cache and of the model's length that a visit may fill.
_KV_SHARE = 0.8
# Batch sizes visited around each graph size; more of them would only be neighbours.
_GRAPH_SIZES = 12


class Visit(NamedTuple):
    """One region. Without a chunk: decode steps of `requests` with about `context` tokens each; with one: `chunks`
    prompts of `chunk` tokens beside `requests` that decode."""

    requests: int
    context: int
    chunk: int = 0
    chunks: int = 0
    # 0: the coarse grid, larger: between.
    level: int = 0

    @property
    def label(self) -> str:
        if not self.chunk:
            return f"decode {self.requests} x {self.context}"
        return f"prefill {self.chunks} x {self.chunk} beside {self.requests}"

    def holds(self, step: CapturedStep) -> bool:
        """Whether a step is a measurement of this region."""
        if not self.chunk:
            if step.chunk_tokens or step.num_decode_requests != self.requests:
                return False
            return abs(math.log2(step.decode_context_tokens / self.requests / self.context)) <= _OCTAVE
        if len(step.chunk_tokens) != self.chunks:
            return False
        near = abs(sum(step.chunk_tokens) - self.chunk * self.chunks) <= 0.1 * self.chunk * self.chunks
        return near and abs(step.num_decode_requests - self.requests) <= 0.25 * self.requests


@dataclass(frozen=True)
class EngineLimits:
    """What bounds a plan, from engine.json."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_tokens: int
    graph_capture_sizes: tuple[int, ...] = ()


def visits(limits: EngineLimits) -> list[Visit]:
    """The plan: levels in order; within one, decode and mixed regions take turns, cheap ones first."""
    batches = batch_sizes(limits)
    found = []
    for number, (requests, level) in enumerate(batches):
        longest = min(limits.max_model_len // 2, int(_KV_SHARE * limits.kv_tokens) // requests)
        for place, context in enumerate(_contexts(longest)):
            found.append(Visit(requests, context, level=level + (place + number) % 2))
    budget = limits.max_num_batched_tokens
    beside = [0, *(requests for requests, level in batches if level == 0)]
    for number, requests in enumerate(beside):
        for place, (chunk, chunks) in enumerate(_chunks(budget - requests, limits.max_model_len)):
            if requests + chunks <= limits.max_num_seqs:
                found.append(Visit(requests, 2 * _LEAST_CONTEXT, chunk, chunks, level=(place + number) % 2))
    by_level: list[Visit] = []
    for level in sorted({visit.level for visit in found}):
        decode = sorted((v for v in found if v.level == level and not v.chunk), key=cost)
        mixed = sorted((v for v in found if v.level == level and v.chunk), key=cost)
        by_level += _interleaved(decode, mixed)
    return by_level


def batch_sizes(limits: EngineLimits) -> list[tuple[int, int]]:
    """(decode requests, level): powers of two and the limit, what lies between them, both sides of graph sizes."""
    most = limits.max_num_seqs
    powers = {1 << power for power in range(most.bit_length()) if 1 << power <= most} | {most}
    between = {size + size // 2 for size in powers if size > 1 and size + size // 2 < most} | {3} & set(range(most))
    sizes = [size for size in limits.graph_capture_sizes if size < most]
    thinned = sizes[:: max(1, len(sizes) // _GRAPH_SIZES)]
    edges = {edge for size in thinned for edge in (size, size + 1)} - powers
    return sorted(
        [(size, 0) for size in powers]
        + [(size, 1) for size in between - powers]
        + [(size, 2) for size in edges - between]
    )


def cost(visit: Visit) -> int:
    """Prompt tokens a visit computes: what makes it dear."""
    return visit.requests * visit.context + visit.chunk * visit.chunks


def standard_error_percent(latencies: Sequence[float]) -> float:
    """Of the mean, in percent of it, from the median deviation, so that one stall decides nothing; many: infinite."""
    count = len(latencies)
    if count < 2:
        return math.inf
    ordered = sorted(latencies)
    middle = ordered[count // 2]
    spread = 1.4826 * sorted(abs(latency - middle) for latency in latencies)[count // 2]
    return 100 * spread / middle / math.sqrt(count) if middle > 0 else math.inf


def is_tight(latencies: Sequence[float], target_percent: float) -> bool:
    """Whether a region needs no further visit."""
    return len(latencies) >= FEWEST_STEPS and standard_error_percent(latencies) <= target_percent


def _contexts(longest: int) -> Iterable[int]:
    context = _LEAST_CONTEXT
    while context <= longest:
        yield context
        context *= _LONG_GROWTH


def _chunks(budget: int, longest: int) -> Iterable[tuple[int, int]]:
    """(tokens, prompts): one prompt from 16 tokens to the step's budget, several that share it, one longer than it."""
    chunk = 16
    while chunk < budget:
        yield chunk, 1
        chunk *= 2
    yield min(budget, longest // 2), 1
    for prompts in (2, 4):
        for chunk in (64, budget // prompts):
            if chunk >= 16 and chunk * prompts <= budget:
                yield chunk, prompts


def _interleaved(first: Sequence[Visit], second: Sequence[Visit]) -> list[Visit]:
    both = [(place / max(1, len(group)), visit) for group in (first, second) for place, visit in enumerate(group)]
    return [visit for _, visit in sorted(both, key=lambda pair: pair[0])]
