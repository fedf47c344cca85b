"""A step as the latency models see it."""

from __future__ import annotations

from typing import Final, NamedTuple

from oracle_server.errors import BadStep

# Sums of context tokens stay exact as doubles up to here; piece intervals end here too.
CONTEXT_TOKENS_LIMIT: Final = 1 << 53
# Requests and tokens of one step: above any scheduler's limit, and small enough that requests x grid point fits int64.
STEP_TOKENS_LIMIT: Final = 1 << 31


class StepQuery(NamedTuple):
    """One step, as StepShape of step.proto says it. Counts are at least 0; the chunk tuples have equal lengths."""

    chunk_tokens: tuple[int, ...]
    chunk_context: tuple[int, ...]
    num_decode_requests: int
    num_decode_tokens: int
    decode_context_tokens: int
    max_decode_context_tokens: int
    concurrency: int
    previous_prefill_tokens: int
    num_new_requests: int


def check_query(query: StepQuery) -> None:
    """Raise BadStep where a shape contradicts itself or leaves the range in which answers are defined."""
    chunks, contexts, requests, tokens, context, longest, concurrency, previous, new = query
    if len(chunks) != len(contexts):
        raise BadStep(f"{len(chunks)} prefill chunks but {len(contexts)} contexts of chunks", field="prefill_chunks")
    total = tokens
    for chunk, history in zip(chunks, contexts, strict=True):
        total += chunk
        if not (0 < chunk <= STEP_TOKENS_LIMIT and 0 <= history <= STEP_TOKENS_LIMIT):
            raise BadStep(
                f"prefill chunk of {chunk} tokens with {history} context tokens; allowed are 1 to 2^31 and 0 to 2^31",
                field="prefill_chunks",
            )
    if not 0 <= requests <= tokens <= STEP_TOKENS_LIMIT:
        raise BadStep(
            f"{tokens} decode tokens for {requests} decode requests; each has one or more, 2^31 at most",
            field="num_decode_tokens",
        )
    if not 0 < total <= STEP_TOKENS_LIMIT:
        raise BadStep(
            f"{total} tokens in one step; allowed are 1 to 2^31 (a step without tokens is not sent)",
            field="shape",
        )
    if requests and not (longest <= context <= requests * longest and context < CONTEXT_TOKENS_LIMIT and longest > 0):
        raise BadStep(
            f"{requests} decode requests with {context} context tokens, the longest {longest}: the sum lies between "
            f"the longest and {requests} times the longest, and below 2^53",
            field="decode_context_tokens",
        )
    if not requests and (context or longest):
        raise BadStep(
            f"no decode request but {context} context tokens, the longest {longest}; both have to be 0",
            field="decode_context_tokens",
        )
    if concurrency != requests + len(chunks):
        raise BadStep(
            f"concurrency {concurrency} with {len(chunks)} chunks and {requests} decode requests: it is their sum",
            field="concurrency",
        )
    if not (0 <= previous <= STEP_TOKENS_LIMIT and 0 <= new <= STEP_TOKENS_LIMIT):
        raise BadStep(
            f"{previous} previous prefill tokens, {new} new requests; allowed are 0 to 2^31",
            field="previous_prefill_tokens",
        )
