"""What was measured: the client's own file and the shim's step trace of one engine, cut at the swap.

Both files carry CLOCK_MONOTONIC of one machine (the client's `start_times` are perf_counter, which is that clock on
Linux), so the swap lies at one instant in both: when the device began the first step of the new generation. A request
counts as before when it ended by then, as after when it started from then on; the others saw both packs and count
apart.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.demo.progress import DemoFailed
from oracle_server.rpc.recompute import read_trace
from step_oracle.v1 import step_pb2, trace_pb2

NEXT_STEP = "run it longer, on a quieter machine: make demo ARGS='--seconds 90'; --keep DIR keeps every file"


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of one quantity, in the unit its field names."""

    mean: float
    p50: float
    p99: float


@dataclass(frozen=True)
class Period:
    """One engine before or after the swap. TTFT, TPOT, ITL and E2E as `vllm bench serve` defines them."""

    requests: int
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    e2e_ms: Spread
    # Tokens the client received from the first to the last arrival of the period, the other period's requests too.
    output_tokens_per_second: float
    steps: int
    # From one result to the next, where the device went on without a pause and neither step has a prompt.
    decode_period_ms: Spread
    # How far behind its deadline a step's result was handed to the engine.
    lateness_us: Spread
    late_answers: int
    extrapolated_share: float


@dataclass(frozen=True)
class Engine:
    """One engine over the whole run."""

    requests: int
    failed_requests: int
    requests_across_the_swap: int
    median_prompt_tokens: int
    median_output_tokens: int
    # From the first request.
    swap_at_seconds: float
    steps_by_generation: dict[int, int]
    replies_without_generation: int
    generation_went_back: bool
    before: Period
    after: Period


@dataclass(frozen=True)
class Measured:
    """One engine's figures and the steps its scheduler made, before and after the swap."""

    engine: Engine
    steps_before: Sequence[step_pb2.StepRequest]
    steps_after: Sequence[step_pb2.StepRequest]


@dataclass(frozen=True)
class _Request:
    start: float
    ttft: float
    itls: Sequence[float]
    output_tokens: int

    @property
    def e2e(self) -> float:
        return self.ttft + sum(self.itls)

    @property
    def end(self) -> float:
        return self.start + self.e2e

    def tokens_between(self, begin: float, end: float) -> float:
        """Output tokens received in an interval; chunks of a stream may hold several tokens and count alike."""
        times = self.start + self.ttft + np.concatenate(([0.0], np.cumsum(self.itls)))
        return float(((times >= begin) & (times < end)).sum()) * self.output_tokens / len(times)


def measure(result: Path, trace: Path, generations: tuple[int, int]) -> Measured:
    """Read one engine's files; `generations` answered before and after the swap.

    Raises DemoFailed where a period has nothing to measure.
    """
    document: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    errors = document["errors"]
    columns = zip(document["start_times"], document["ttfts"], document["itls"], document["output_lens"], strict=True)
    good = [_Request(*row) for row, error in zip(columns, errors, strict=True) if not error and row[3]]
    steps = [record.step for record in read_trace(trace) if record.HasField("step")]
    answered = [step.reply.generation for step in steps]
    if not good or generations[1] not in answered:
        raise DemoFailed(f"{trace.stem}: {len(good)} good requests, generations {sorted(set(answered))}", NEXT_STEP)
    first, last = min(request.start for request in good), max(request.start for request in good)
    swap = steps[answered.index(generations[1])].device_start_ns / 1e9
    # Steps of the warm-up requests come before the first request that counts.
    loaded = [step for step in steps if step.dispatch_ns / 1e9 >= first]
    cut = [[step for step in loaded if step.reply.generation == generation] for generation in generations]
    before = [request for request in good if request.end <= swap]
    after = [request for request in good if request.start >= swap]
    engine = Engine(
        requests=len(errors),
        failed_requests=len(errors) - len(good),
        requests_across_the_swap=len(good) - len(before) - len(after),
        median_prompt_tokens=int(np.median(document["input_lens"])),
        median_output_tokens=int(np.median(document["output_lens"])),
        swap_at_seconds=swap - first,
        steps_by_generation={number: answered.count(number) for number in sorted(set(answered))},
        replies_without_generation=answered.count(0),
        generation_went_back=answered != sorted(answered),
        before=_period(before, cut[0], good, (first, swap)),
        after=_period(after, cut[1], good, (swap, last)),
    )
    return Measured(engine, [step.request for step in cut[0]], [step.request for step in cut[1]])


def _period(
    requests: Sequence[_Request],
    steps: Sequence[trace_pb2.TraceStep],
    all_requests: Sequence[_Request],
    interval: tuple[float, float],
) -> Period:
    if not requests or not any(map(_is_decode, steps)) or interval[1] <= interval[0]:
        raise DemoFailed(f"a period of {len(requests)} requests and {len(steps)} steps says nothing", NEXT_STEP)
    tokens = sum(request.tokens_between(*interval) for request in all_requests)
    several = [request for request in requests if request.output_tokens > 1]
    return Period(
        requests=len(requests),
        ttft_ms=_spread([request.ttft * 1e3 for request in requests]),
        tpot_ms=_spread([sum(request.itls) / (request.output_tokens - 1) * 1e3 for request in several]),
        itl_ms=_spread([itl * 1e3 for request in requests for itl in request.itls]),
        e2e_ms=_spread([request.e2e * 1e3 for request in requests]),
        output_tokens_per_second=tokens / (interval[1] - interval[0]),
        steps=len(steps),
        decode_period_ms=_spread(_decode_periods_ms(steps)),
        lateness_us=_spread([(step.resolved_ns - step.deadline_ns) / 1e3 for step in steps]),
        late_answers=sum(step.answer_ns > step.deadline_ns for step in steps),
        extrapolated_share=sum(step.reply.support == step_pb2.SUPPORT_EXTRAPOLATED for step in steps) / len(steps),
    )


def _decode_periods_ms(steps: Sequence[trace_pb2.TraceStep]) -> list[float]:
    return [
        (step.resolved_ns - previous.resolved_ns) / 1e6
        for previous, step in itertools.pairwise(steps)
        if _is_decode(previous) and _is_decode(step) and step.device_start_ns == previous.device_finish_ns
    ]


def _is_decode(step: trace_pb2.TraceStep) -> bool:
    return not step.request.shape.prefill_chunks and step.request.shape.num_decode_requests > 0


def _spread(values: Sequence[float]) -> Spread:
    if not values:
        raise DemoFailed("a period is too short: a quantity was never measured in it", NEXT_STEP)
    p50, p99 = np.percentile(values, [50, 99])
    return Spread(float(np.mean(values)), float(p50), float(p99))
