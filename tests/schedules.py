"""SchedulerOutputs as stand-ins that carry exactly the fields our code may read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def new(request_id: str, prompt_tokens: int) -> Any:
    """A request scheduled for the first time."""
    sampling = {"max_tokens": 100, "min_tokens": 0, "ignore_eos": False, "eos_token_id": 2, "extra_args": None}
    return SimpleNamespace(
        req_id=request_id,
        prompt_token_ids=list(range(prompt_tokens)),
        prefill_token_ids=None,
        num_computed_tokens=0,
        sampling_params=SimpleNamespace(**sampling),
        lora_request=None,
    )


def output(
    scheduled: dict[str, int], *, new_requests: tuple[Any, ...] = (), cached: tuple[tuple[str, int, int], ...] = ()
) -> Any:
    """`cached` holds (request id, computed tokens, output tokens)."""
    return SimpleNamespace(
        scheduled_new_reqs=list(new_requests),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[entry[0] for entry in cached],
            num_computed_tokens=[entry[1] for entry in cached],
            num_output_tokens=[entry[2] for entry in cached],
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens={},
        finished_req_ids=set(),
    )
