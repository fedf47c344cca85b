"""What a replay notes of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestTimes:
    """When what happened to a request: virtual nanoseconds, -1 for not yet."""

    request_id: str
    engine: int
    arrival_ns: int
    prompt_tokens: int
    # When the engine core took it; an engine that is busy takes it late.
    queued_ns: int = -1
    # When a step with it was first handed to the device.
    scheduled_ns: int = -1
    first_token_ns: int = -1
    last_token_ns: int = -1
    output_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
