"""How long a step of the steady device takes. Nothing of the profiler, the shim or the oracle knows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Where an engine finds in how many milliseconds its device reads its weights.
WEIGHTS_VARIABLE = "STEADY_DEVICE_WEIGHTS_MS"
# Milliseconds, of a device that reads its weights in WEIGHTS_MS. Reading the weights, or computing with them, whichever
# is longer; then requests and their contexts.
WEIGHTS_MS = 24.0
LAUNCH_MS, TOKEN_MS = 8.0, 0.11
REQUEST_MS = 0.25
CONTEXT_TOKEN_MS = 0.0015
# Of each query token of a prompt, for each token of its context.
ATTENTION_MS = 0.00004


def step_ms(requests: Sequence[tuple[int, int]], weights_ms: float = WEIGHTS_MS) -> float:
    """Milliseconds of a step with these requests: (query tokens, context tokens, the query's included) of each.

    All that a step does takes as much longer or shorter as reading the weights.
    """
    tokens = sum(query for query, _ in requests)
    attention = sum(query * context for query, context in requests if query > 1)
    context = sum(context for _, context in requests)
    linear = max(WEIGHTS_MS, LAUNCH_MS + TOKEN_MS * tokens)
    whole = linear + REQUEST_MS * len(requests) + CONTEXT_TOKEN_MS * context + ATTENTION_MS * attention
    return whole * weights_ms / WEIGHTS_MS


def requests_of(scheduler_output: Any) -> list[tuple[int, int]]:
    """What `step_ms` takes, of what vLLM's scheduler scheduled."""
    cached = scheduler_output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed |= {request.req_id: request.num_computed_tokens for request in scheduler_output.scheduled_new_reqs}
    return [
        (query, computed[request_id] + query) for request_id, query in scheduler_output.num_scheduled_tokens.items()
    ]
