"""Step sequences as a vLLM scheduler makes them, without vLLM: what the emulated engines ask for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from step_oracle.v1 import step_pb2 as pb

CHUNK_TOKENS = 2048
MAX_REQUESTS = 256
# New requests per step: 12 % of the steps carry a prompt then, as in the Azure conversation trace at 4 requests/s.
ARRIVALS_PER_STEP = 0.1
_WARM_UP_STEPS = 1500


@dataclass(slots=True)
class _Request:
    key: str
    prompt: int
    output: int
    computed: int = 0


def step_sequence(steps: int, seed: int, arrivals_per_step: float = ARRIVALS_PER_STEP) -> list[pb.StepRequest]:
    """Steps 0 to `steps` - 1 of one busy engine: continuous batching, chunked prefill, decodes first.

    Prompts have a median of 1,000 tokens and outputs one of 170, both lognormal, about 25 requests run at a time. The
    same seed gives the same steps.
    """
    random = np.random.default_rng(seed)
    waiting: list[_Request] = []
    running: list[_Request] = []
    found: list[pb.StepRequest] = []
    previous = arrived = 0
    for number in range(-_WARM_UP_STEPS, steps):
        for _ in range(random.poisson(arrivals_per_step)):
            prompt = int(np.clip(np.exp(random.normal(6.9, 0.8)), 16, 8000))
            output = int(np.clip(np.exp(random.normal(5.13, 0.7)), 2, 1000))
            waiting.append(_Request(f"{seed}-{arrived}", prompt, output))
            arrived += 1
        if not running and not waiting:
            waiting.append(_Request(f"{seed}-{arrived}", 1000, 170))
            arrived += 1
        shape = _schedule(running, waiting, previous)
        previous = sum(chunk.num_tokens for chunk in shape.prefill_chunks)
        if number >= 0:
            found.append(pb.StepRequest(step_index=number, shape=shape))
    return found


def mixed_share(sequence: list[pb.StepRequest]) -> float:
    """The share of steps with prefill tokens: no lease answers them."""
    return sum(bool(step.shape.prefill_chunks) for step in sequence) / len(sequence)


def _schedule(running: list[_Request], waiting: list[_Request], previous: int) -> pb.StepShape:
    """One step; moves the requests on."""
    shape = pb.StepShape(previous_prefill_tokens=previous)
    budget = CHUNK_TOKENS
    for request in running:
        if request.computed >= request.prompt:
            request.computed += 1
            budget -= 1
            shape.num_decode_requests += 1
            shape.decode_context_tokens += request.computed
            shape.max_decode_context_tokens = max(shape.max_decode_context_tokens, request.computed)
    shape.num_decode_tokens = shape.num_decode_requests
    while waiting and budget > 0 and len(running) < MAX_REQUESTS and running_prompt(running) is None:
        request = waiting.pop(0)
        running.append(request)
        shape.new_requests.add(
            request_key=request.key, prompt_tokens=request.prompt, max_tokens=request.output, ignore_eos=True
        )
        budget -= _prefill(shape, request, budget)
    if not shape.new_requests and (request := running_prompt(running)) is not None:  # type: ignore[assignment]
        _prefill(shape, request, budget)
    shape.concurrency = shape.num_decode_requests + len(shape.prefill_chunks)
    # The step that ends the prompt yields the first token.
    running[:] = [request for request in running if request.computed < request.prompt + request.output - 1]
    return shape


def running_prompt(running: list[_Request]) -> _Request | None:
    """The request whose prompt is not finished, if there is one; there is never a second."""
    return next((request for request in running if request.computed < request.prompt), None)


def _prefill(shape: pb.StepShape, request: _Request, budget: int) -> int:
    tokens = min(budget, request.prompt - request.computed)
    shape.prefill_chunks.add(num_tokens=tokens, context_tokens=request.computed)
    request.computed += tokens
    return tokens
