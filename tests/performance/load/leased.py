"""Which steps of a sequence a shim with leases sends: found by playing it once against the server's answers."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

from step_oracle.v1 import oracle_service_pb2, step_pb2
from vllm_shim.lease import LeaseTable

_TIMEOUT_SECONDS = 120.0


def steps_sent(oracle: Any, opening: oracle_service_pb2.StreamOpen, steps: Sequence[step_pb2.StepRequest]) -> list[int]:
    """Positions of the steps that no lease answers, by the shim's own table of leases.

    `oracle` is a stub; `opening` presents an attached engine. Which leases a step brings does not depend on the
    engine's id, so what is found for one engine holds for all that play the sequence.
    """
    requests: queue.Queue[oracle_service_pb2.StreamStepsRequest | None] = queue.Queue()
    call = oracle.StreamSteps(iter(requests.get, None), timeout=_TIMEOUT_SECONDS)
    requests.put(oracle_service_pb2.StreamStepsRequest(open=opening))
    table, sent = LeaseTable(), []
    for i, step in enumerate(steps):
        if _is_leased(table, step.shape):
            continue
        sent.append(i)
        requests.put(oracle_service_pb2.StreamStepsRequest(steps=[step]))
        reply = next(reply for response in call for reply in response.replies)
        if reply.HasField("lease"):
            table.take(reply.lease)
    requests.put(None)
    for _ in call:
        pass
    return sent


def is_leasable(shape: step_pb2.StepShape) -> bool:
    """Whether a lease could answer the step: decode-only, without drafts."""
    return not shape.prefill_chunks and shape.num_decode_tokens == shape.num_decode_requests > 0


def _is_leased(table: LeaseTable, shape: step_pb2.StepShape) -> bool:
    found = is_leasable(shape) and table.find(
        shape.num_decode_requests,
        shape.decode_context_tokens,
        shape.max_decode_context_tokens,
        shape.previous_prefill_tokens,
    )
    return bool(found)
