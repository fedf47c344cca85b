"""What a latency model answers. The numbers of support and knowledge are those of step.proto."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

SUPPORT_EXACT: Final = 1
SUPPORT_INTERPOLATED: Final = 2
SUPPORT_EXTRAPOLATED: Final = 3

KNOWLEDGE_MEASURED: Final = 1
KNOWLEDGE_INTERPOLATED: Final = 2
KNOWLEDGE_MODELLED: Final = 3
KNOWLEDGE_EXTRAPOLATED: Final = 4
KNOWLEDGE_SPEED_OF_LIGHT: Final = 5


class Answer(NamedTuple):
    """Latency of one step in nanoseconds (at least 1) and how well it is backed. Larger numbers are weaker."""

    latency_ns: int
    support: int
    distance: float
    knowledge: int


class DecodeRecord(NamedTuple):
    """One piece of a latency model: what a Lease carries, and what the server answers a decode-only step from.

    Intervals are half-open, in tokens. Support and knowledge hold for every point of the piece. It is linear in context
    tokens, or a pool.
    """

    num_decode_requests: int
    context_tokens_begin: int
    context_tokens_end: int
    max_context_tokens_begin: int
    max_context_tokens_end: int
    intercept_ns: float
    slope_ns_per_context_token: float
    slope_ns_per_max_context_token: float
    support: int
    knowledge: int
    # None where the points of the piece differ in it: no lease can say it.
    distance: float | None
    # True: not for the step after one with prefill tokens.
    not_after_prefill: bool = False
    # Not empty: the latency is a drawn entry, and intercept and slopes are not used.
    latency_pool_ns: tuple[int, ...] = ()

    def covers(self, num_decode_requests: int, context_tokens: int, max_context_tokens: int) -> bool:
        """Whether a decode-only step without draft tokens lies in this piece."""
        return (
            num_decode_requests == self.num_decode_requests
            and self.context_tokens_begin <= context_tokens < self.context_tokens_end
            and self.max_context_tokens_begin <= max_context_tokens < self.max_context_tokens_end
        )

    def latency_ns(self, context_tokens: int, max_context_tokens: int, ratio: float) -> int:
        """The expression of step.proto's Lease; `ratio` is the drawn entry of the residual pool."""
        base = (
            self.intercept_ns + self.slope_ns_per_context_token * context_tokens
        ) + self.slope_ns_per_max_context_token * max_context_tokens
        return max(1, math.floor(base * ratio + 0.5))
