"""What a capture should visit: shapes of steps, coarse ones first, and when enough is known of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profiler.capture.steps import CapturedStep

FEWEST_STEPS = 8
# A mean over fewer octaves of context is one measurement; over more it is several.
_OCTAVE = 0.5
# What decodes beside a chunk grows while chunks come, and decides less of the step.
_BESIDE_OCTAVE = 1.0
# Chunks of so much fewer or more tokens are of one region; lengths of prompts spread over it by the golden ratio.
_NEAR = 0.1
_GOLDEN = 0.6180339887498949
_LEAST_CONTEXT = 64
_LONG_GROWTH = 4
# A longest context this much beyond the one before it is visited too.
_WORTH_ANOTHER = 1.5
# Context of what decodes beside a chunk, where not the context is of interest.
_BESIDE_CONTEXT = 128
# Shares of the KV cache and of the model's length that a visit may fill: the rest is for the tokens it generates.
_KV_SHARE = 0.8
_LENGTH_SHARE = 0.9
# Of the batch sizes beside which chunks are visited every so many get the rarer kinds of chunk too.
_FEW = 3
# Batch sizes visited around each graph size; more of them would only be neighbours.
_GRAPH_SIZES = 12


class Visit(NamedTuple):
    """One region. Without a chunk: decode steps of `requests` with about `context` tokens each; with one: chunks of
    `chunk` tokens of `chunks` prompts, `before` tokens of each computed, beside `requests` that decode."""

    requests: int
    context: int
    chunk: int = 0
    chunks: int = 0
    # 0: the coarse grid, larger: between.
    level: int = 0
    before: int = 0

    @property
    def label(self) -> str:
        if not self.chunk:
            return f"decode {self.requests} x {self.context}"
        after = f" after {self.before}" if self.before else ""
        beside = f" beside {self.requests} x {self.context}" if self.requests else ""
        return f"prefill {self.chunks} x {self.chunk}{after}{beside}"

    @property
    def prompt(self) -> int:
        """Tokens of each prompt whose chunk is of interest."""
        return self.before + self.chunk

    def prompts(self, budget: int) -> Iterator[int]:
        """Lengths of the prompts of one after the other: the visit's own, then shorter ones that the region holds too.

        Devices like round numbers (tiles of a GPU, kernels that a CPU makes anew for every number of tokens), and
        those of users are not. A chunk that takes all that a step's `budget` has is as long in every workload.
        """
        varied = self.chunk * self.chunks + self.requests < budget
        for number in itertools.count():
            shorter = number * _GOLDEN % 1 * _NEAR if varied else 0
            yield self.before + self.chunk - int(shorter * self.chunk)

    def holds(self, step: CapturedStep) -> bool:
        """Whether a step is a measurement of this region."""
        if not self.chunk:
            if step.chunk_tokens or step.num_decode_requests != self.requests:
                return False
            return _is_near(step.decode_context_tokens / self.requests, self.context, _OCTAVE)
        if len(step.chunk_tokens) != self.chunks:
            return False
        near = abs(sum(step.chunk_tokens) - self.chunk * self.chunks) <= _NEAR * self.chunk * self.chunks
        if not near or not all(_is_near(context, self.before, _OCTAVE) for context in step.chunk_context):
            return False
        if not self.requests:
            return not step.num_decode_requests
        if abs(step.num_decode_requests - self.requests) > 0.25 * self.requests:
            return False
        return _is_near(step.decode_context_tokens / step.num_decode_requests, self.context, _BESIDE_OCTAVE)


@dataclass(frozen=True)
class EngineLimits:
    """What bounds a plan, from engine.json."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_tokens: int
    graph_capture_sizes: tuple[int, ...] = ()

    @property
    def longest_prompt(self) -> int:
        """A prompt leaves room for the one token it is sent for: vLLM refuses one that does not."""
        return self.max_model_len - 1


def visits(limits: EngineLimits) -> list[Visit]:
    """The plan: levels in order; within one, decode and mixed regions take turns, cheap ones first."""
    found = [*_decode_visits(limits), *_mixed_visits(limits)]
    by_level: list[Visit] = []
    for level in sorted({visit.level for visit in found}):
        decode = sorted((v for v in found if v.level == level and not v.chunk), key=cost)
        mixed = sorted((v for v in found if v.level == level and v.chunk), key=cost)
        by_level += _interleaved(decode, mixed)
    return by_level


def _decode_visits(limits: EngineLimits) -> Iterable[Visit]:
    for number, (requests, level) in enumerate(batch_sizes(limits)):
        longest = min(int(_LENGTH_SHARE * limits.max_model_len), int(_KV_SHARE * limits.kv_tokens) // requests)
        contexts = list(_contexts(longest))
        for place, context in enumerate(contexts):
            yield Visit(requests, context, level=level + (place + number) % 2)
        if longest >= _WORTH_ANOTHER * (contexts[-1] if contexts else 0) and longest > 0:
            yield Visit(requests, longest, level=2)


def _mixed_visits(limits: EngineLimits) -> Iterable[Visit]:
    """Chunks that begin a prompt beside every power of two, then chunks further on in one, then longer contexts."""
    usual = min(_BESIDE_CONTEXT, limits.max_model_len // 2)
    beside = [0, *(requests for requests, level in batch_sizes(limits) if level == 0)]
    planned: list[Visit] = []
    for number, requests in enumerate(beside):
        share = limits.max_num_batched_tokens - requests
        context = usual if requests else 0
        planned += (
            Visit(requests, context, chunk, chunks, level=(place + number) % 2)
            for place, (chunk, chunks) in enumerate(_chunks(share, limits.longest_prompt))
        )
        if number % _FEW == 0:
            planned += _rarer_chunks(limits, requests, context)
    for visit in planned:
        fits = cost(visit) <= _KV_SHARE * limits.kv_tokens and visit.prompt <= limits.longest_prompt
        if fits and visit.chunk > 0 and visit.requests + visit.chunks <= limits.max_num_seqs:
            yield visit


def _rarer_chunks(limits: EngineLimits, requests: int, context: int) -> Iterable[Visit]:
    """Chunks with tokens of their prompt before them, and chunks beside longer contexts."""
    share = limits.max_num_batched_tokens - requests
    # The scheduler gives a prompt all that a step has left, so what is computed before is a multiple of that.
    for before in _doubled(share, limits.longest_prompt):
        level = 2 if requests else int(before > share)
        for chunk in sorted({max(1, share // 4), share}):
            yield Visit(requests, context, chunk, 1, level=level, before=before)
    for longer in _contexts(limits.max_model_len // 2) if requests else ():
        if longer > 2 * _BESIDE_CONTEXT:
            for chunk in sorted({min(64, share), share}):
                yield Visit(requests, longer, chunk, 1, level=2)


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
    return visit.requests * visit.context + visit.prompt * visit.chunks


def standard_error_percent(latencies: Sequence[float]) -> float:
    """Of the mean, in percent of it, from the median deviation, so that one stall decides nothing; many: infinite."""
    count = len(latencies)
    if count < 2:
        return math.inf
    ordered = sorted(latencies)
    middle = ordered[count // 2]
    spread = 1.4826 * sorted(abs(latency - middle) for latency in latencies)[count // 2]
    return 100 * spread / middle / math.sqrt(count) if middle > 0 else math.inf


def _contexts(longest: int) -> Iterable[int]:
    context = _LEAST_CONTEXT
    while context <= longest:
        yield context
        context *= _LONG_GROWTH


def _chunks(share: int, longest: int) -> Iterable[tuple[int, int]]:
    """(tokens, prompts): one prompt from 16 tokens to all that a step has left, several that share it."""
    most, chunk = min(share, longest), 16
    while chunk < most:
        yield chunk, 1
        chunk *= 2
    yield most, 1
    for prompts in (2, 4):
        for chunk in sorted({64, share // prompts}):
            if 16 <= chunk <= longest and chunk * prompts <= share:
                yield chunk, prompts


def _doubled(least: int, most: int) -> Iterable[int]:
    while 0 < least < most:
        yield least
        least *= 2


def _is_near(value: float, wanted: float, octaves: float) -> bool:
    if not value or not wanted:
        return value == wanted
    return abs(math.log2(value / wanted)) <= octaves


def _interleaved(first: Sequence[Visit], second: Sequence[Visit]) -> list[Visit]:
    both = [(place / max(1, len(group)), visit) for group in (first, second) for place, visit in enumerate(group)]
    return [visit for _, visit in sorted(both, key=lambda pair: pair[0])]
