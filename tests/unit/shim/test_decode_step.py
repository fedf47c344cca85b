"""The short way of a decode-only step reads what the long way reads."""

import random
from types import SimpleNamespace
from typing import Any

from vllm_shim.step_shape import DecodeStep, StepReader


def sampling() -> Any:
    return SimpleNamespace(max_tokens=100, min_tokens=0, ignore_eos=False, eos_token_id=2, extra_args=None)


class Scheduler:
    """SchedulerOutputs as vLLM makes them: chunked prompts, decoding, preemption, requests that end, idle steps."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._count = 0
        # id -> [prompt tokens, computed tokens, output tokens]
        self._running: dict[str, list[int]] = {}

    def step(self) -> Any:
        draw, new, cached, scheduled = self._draw, [], [], {}
        finished = {name for name in self._running if draw.random() < 0.01}
        for name in finished:
            del self._running[name]
        order = list(self._running)
        if draw.random() < 0.05:
            draw.shuffle(order)
        for name in order if draw.random() < 0.97 else []:
            prompt, computed, outputs = self._running[name]
            if draw.random() < 0.005:
                computed = self._running[name][1] = 0
            if draw.random() < 0.005:
                continue
            left = prompt + outputs - computed
            tokens = 1 if left == 1 else min(left, draw.choice((1, 7, 64)))
            cached.append((name, computed, outputs))
            scheduled[name] = tokens
            self._running[name][1] += tokens
            self._running[name][2] += computed + tokens >= prompt + outputs
        if draw.random() < 0.05 or not self._running:
            self._count += 1
            name, prompt = f"r{self._count}-0123abcd", draw.choice((1, 2, 30, 200))
            tokens = min(prompt, 64)
            request = SimpleNamespace(req_id=name, prompt_token_ids=[1] * prompt, num_computed_tokens=0)
            request.sampling_params, request.lora_request = sampling(), None
            if draw.random() < 0.1:
                request.lora_request = SimpleNamespace(lora_name="adapter")
            new.append(request)
            scheduled[name] = tokens
            self._running[name] = [prompt, tokens, int(tokens == prompt)]
        return SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[c[0] for c in cached],
                num_computed_tokens=[c[1] for c in cached],
                num_output_tokens=[c[2] for c in cached],
            ),
            num_scheduled_tokens=scheduled if draw.random() > 0.02 else dict(reversed(scheduled.items())),
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_spec_decode_tokens={},
            finished_req_ids=finished,
        )


class LongWay(StepReader):
    def _read_decode(self, scheduler_output: Any) -> None:
        return None


def test_both_ways_read_the_same_steps() -> None:
    short_ways = follows = 0
    for seed in range(20):
        scheduler, short, long, last = Scheduler(seed), StepReader(), LongWay(), None
        for number in range(500):
            output = scheduler.step()
            step, expected = short.read(output), long.read(output)
            short_ways += isinstance(step, DecodeStep)
            assert step.shape == expected.shape, (seed, number)
            assert [(r.state.request_id, r.output_index, r.draft_token_ids) for r in step.requests] == [
                (r.state.request_id, r.output_index, r.draft_token_ids) for r in expected.requests
            ]
            assert len(step.new_requests) == len(expected.new_requests)
            if isinstance(step, DecodeStep) and step.follows:
                # Each request a token further than in the step before, and the list of them the very same.
                assert isinstance(last, DecodeStep)
                assert step.states is last.states
                assert step.output_indices == [index + 1 for index in last.output_indices]
                follows += 1
            last = step
            if isinstance(step, DecodeStep):
                shape = expected.shape
                assert not shape.prefill_chunks
                assert step.num_requests == shape.num_decode_requests == shape.num_decode_tokens
                assert step.context_tokens == shape.decode_context_tokens
                assert step.max_context_tokens == shape.max_decode_context_tokens
                assert step.previous_prefill_tokens == shape.previous_prefill_tokens
    assert short_ways > 3_000
    assert follows > 1_000
