"""Regions of step shapes, in words: what errors are told by."""

from __future__ import annotations

from oracle_server.sampling.shape import StepQuery
from profiler.capture.steps import CapturedStep

_REQUESTS = (1, 4, 16, 64, 256)
_CONTEXT = (256, 1024, 4096, 16384)
_PREFILL = (64, 256, 1024, 4096)


def query_of(step: CapturedStep) -> StepQuery:
    """A captured step as an oracle is asked."""
    return StepQuery(
        step.chunk_tokens,
        step.chunk_context,
        step.num_decode_requests,
        step.num_decode_tokens,
        step.decode_context_tokens,
        step.max_decode_context_tokens,
        step.num_decode_requests + len(step.chunk_tokens),
        step.previous_prefill_tokens,
        step.num_new_requests,
    )


def region_of(query: StepQuery) -> str:
    """Decode steps by requests and mean context, others by prefill tokens and by what decodes beside them."""
    requests = query.num_decode_requests
    if not query.chunk_tokens:
        context = query.decode_context_tokens // requests
        return f"decode, {_band(requests, _REQUESTS)} requests, {_band(context, _CONTEXT)} context"
    beside = f"beside {_band(requests, _REQUESTS)} requests" if requests else "alone"
    return f"prefill, {_band(sum(query.chunk_tokens), _PREFILL)} tokens, {beside}"


def region_order(region: str) -> tuple[str, list[int]]:
    """Sorts regions by kind and then by their numbers."""
    numbers = "".join(character if character.isdigit() else " " for character in region)
    return region.partition(",")[0], [int(number) for number in numbers.split()]


def _band(value: int, ends: tuple[int, ...]) -> str:
    begin = 1
    for end in ends:
        if value <= end:
            return str(end) if begin == end else f"{begin}-{end}"
        begin = end + 1
    return f"over {ends[-1]}"
