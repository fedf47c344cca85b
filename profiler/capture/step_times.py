"""What the steps of a capture tell beside their latencies: how long results take, the host, a device that wakes, and
which steps still pay for the prompts before them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from operator import not_
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oracle_server import pack
from oracle_server.sampling.oracle import Oracle
from profiler.capture.regions import query_of
from profiler.capture.steps import CapturedRun, CapturedStep, idle_ns
from vllm_shim.timeline import SHORTEST_IDLE_NS

# Of copy_ns: so long after an idle stream a clock that runs 100 ppm beside the host's is 0.1 ms away.
_ANCHORED_NS: Final = 1_000_000_000
# Copies told by the nearest steps, where none is that near.
_FEWEST_COPIES: Final = 16
# Decode-only steps that still pay for the prompts before them; in a plan, which puts prompts beside every batch size,
# they are most of some regions, in a workload few.
UNSETTLED_STEPS: Final = 2
_FEWEST_SETTLED: Final = 8
# Standard error of a median over that of a mean.
_MEDIAN_ERROR: Final = 1.2533
# Steps after a pause: as many as tell something, by bands of a factor of this in the pause.
_FEWEST_WOKEN: Final = 6
_WAKE_BAND: Final = 4.0
_FEWEST_IN_BAND: Final = 3
# Decode-only steps right after a prompt's, and what they have to differ by: less is not worth asking for each of them.
_FEWEST_AFTER_PREFILL: Final = 16
_LEAST_AFTER_PREFILL: Final = 0.01
# A moment, and how many of how many steps tell whether the device held still.
MOMENT_SECONDS: Final = 2
_FEWEST_IN_MOMENT: Final = 8
_FEWEST_MOMENTS: Final = 10
# Steps whose host time is known, in all and of one number of requests.
_FEWEST_HOST_STEPS: Final = 32
_FEWEST_OF_A_SIZE: Final = 5


def copies_ns(whole: Sequence[CapturedRun], usable: Sequence[CapturedRun]) -> list[int]:
    """From device end to result, of usable steps so shortly after an idle device that its clock has not drifted.

    Those of the least distance where none is that near: a device that was never idle after the warm-up.
    """
    found: list[tuple[int, int]] = []
    for all_steps, run in zip(whole, usable, strict=True):
        used, anchor_ns = {step.step_index for step in run.steps}, 0
        for step in all_steps.steps:
            if step.was_idle or not anchor_ns:
                anchor_ns = step.device_start_ns
            if step.step_index in used:
                found.append((step.device_end_ns - anchor_ns, step.result_ns - step.device_end_ns))
    near = [copy for distance, copy in found if distance <= _ANCHORED_NS]
    return near or [copy for _, copy in sorted(found)[:_FEWEST_COPIES]]


def host_time(runs: Sequence[CapturedRun]) -> pack.HostTime | None:
    """What the engine core took from a result to the next step: a line through the medians by number of requests.

    None where too few steps tell it. Medians, because a collection of garbage or another process is not the engine's.
    """
    from scipy.optimize import nnls

    of_size: dict[int, list[int]] = defaultdict(list)
    for run in runs:
        for step in run.steps:
            if step.host_ns:
                of_size[step.num_decode_requests + len(step.chunk_tokens)].append(step.host_ns)
    if sum(map(len, of_size.values())) < _FEWEST_HOST_STEPS:
        return None
    told = {size: times for size, times in of_size.items() if len(times) >= _FEWEST_OF_A_SIZE}
    if not told:
        return None
    sizes = np.array(list(told), dtype=np.float64)
    medians = np.array([np.median(times) for times in told.values()])
    weights = np.sqrt([len(times) for times in told.values()])
    design = np.stack((np.ones_like(sizes), sizes), axis=1)
    step_ns, request_ns = nnls(design * weights[:, None], medians * weights)[0]
    return pack.HostTime(step_ns=max(1, round(step_ns)), request_ns=round(request_ns))


def awake_runs(runs: Sequence[CapturedRun]) -> tuple[list[CapturedRun], list[tuple[int, CapturedStep]]]:
    """The runs without the steps that came after a pause, and those with the pause in ns.

    Too few of these tell nothing of a device that wakes: then they stay.
    """
    paused = [idle_ns(run.steps) for run in runs]
    woken = [
        (pause, step)
        for run, pauses in zip(runs, paused, strict=True)
        for pause, step in zip(pauses, run.steps, strict=True)
        if pause
    ]
    if len(woken) < _FEWEST_WOKEN:
        return list(runs), []
    awake = [
        replace(run, steps=tuple(step for pause, step in zip(pauses, run.steps, strict=True) if not pause))
        for run, pauses in zip(runs, paused, strict=True)
    ]
    return awake, woken


def wake_points(woken: Sequence[tuple[int, CapturedStep]], oracle: Oracle) -> tuple[pack.WakePoint, ...]:
    """What steps took longer than expected of them, by how long the device had rested: medians, never falling."""
    from scipy.optimize import isotonic_regression

    bands: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for pause, step in woken:
        extra_ns = step.latency_ns - oracle.answer(query_of(step), 0, 0).latency_ns
        bands[int(math.log(pause / SHORTEST_IDLE_NS, _WAKE_BAND))].append((pause, extra_ns))
    told = [np.array(bands[band]) for band in sorted(bands) if len(bands[band]) >= _FEWEST_IN_BAND]
    if not told:
        return ()
    extra_ns = isotonic_regression([np.median(band[:, 1]) for band in told], weights=[len(band) for band in told]).x
    points = tuple(
        pack.WakePoint(idle_ns=int(np.median(band[:, 0])), extra_ns=max(0, int(extra)))
        for band, extra in zip(told, extra_ns, strict=True)
    )
    return points if points[-1].extra_ns else ()


def after_prefill_factor(unsettled: Sequence[CapturedStep], oracle: Oracle, median_residual: float) -> float | None:
    """How many times as long decode-only steps right after a prompt's take as others; None where that is not told.

    `unsettled`: steps that the model of `oracle` was not fitted to; it answers without residuals, whose median this is.
    """
    ratios = np.array(
        [
            step.latency_ns / oracle.answer(query_of(step), 0, 0).latency_ns
            for step in unsettled
            if step.previous_prefill_tokens
        ]
    )
    if len(ratios) < _FEWEST_AFTER_PREFILL:
        return None
    factor, error = float(np.median(ratios)) / median_residual, _MEDIAN_ERROR * _sigma(ratios) / math.sqrt(len(ratios))
    return factor if abs(factor - 1) > max(_LEAST_AFTER_PREFILL, 2 * error) else None


def moment_scatter(runs: Sequence[CapturedRun], oracle: Oracle) -> tuple[float, int] | None:
    """By how many percent whole moments were longer or shorter than a model says, and of how many moments; None of few.

    The standard deviation of the medians of their steps (half of the way from the 16th to the 84th percentile, which
    holds for a device of two speeds too), without what the scatter of single steps explains of it. `oracle` answers
    without residuals.
    """
    moments: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run in runs:
        for step in run.steps:
            place = step.device_start_ns // (MOMENT_SECONDS * 1_000_000_000)
            moments[run.name, place].append(math.log(step.latency_ns / oracle.answer(query_of(step), 0, 0).latency_ns))
    told = [np.array(logs) for logs in moments.values() if len(logs) >= _FEWEST_IN_MOMENT]
    if len(told) < _FEWEST_MOMENTS:
        return None
    low, high = np.percentile([np.median(logs) for logs in told], (16, 84))
    of_chance = np.mean([(_MEDIAN_ERROR * _sigma(logs)) ** 2 / len(logs) for logs in told])
    return 100 * math.sqrt(max(0.0, float(high - low) ** 2 / 4 - float(of_chance))), len(told)


def _sigma(values: NDArray[np.float64]) -> float:
    """A standard deviation that outliers do not move: from the median deviation."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def settled_runs(runs: Sequence[CapturedRun]) -> tuple[list[CapturedRun], list[CapturedStep]]:
    """The runs without decode-only steps that come right after prefill work, and those steps.

    A batch size of which there are fewer than 8 others keeps its own: late evidence is better than none.
    """
    marked = [(run, settled_of(run.steps)) for run in runs]
    others = Counter(
        step.num_decode_requests
        for run, settled in marked
        for step, is_settled in zip(run.steps, settled, strict=True)
        if is_settled and not step.chunk_tokens
    )
    kept: list[CapturedRun] = []
    unsettled: list[CapturedStep] = []
    for run, settled in marked:
        stays = [
            is_settled or others[step.num_decode_requests] < _FEWEST_SETTLED
            for step, is_settled in zip(run.steps, settled, strict=True)
        ]
        kept.append(replace(run, steps=tuple(compress(run.steps, stays))))
        unsettled += compress(run.steps, map(not_, stays))
    return kept, unsettled


def settled_of(steps: Sequence[CapturedStep]) -> list[bool]:
    """Of each step of a stretch, whether it has prefill work itself or none of the steps before it had."""
    found, since = [], UNSETTLED_STEPS
    for step in steps:
        since = 0 if step.chunk_tokens else since + 1
        found.append(since == 0 or since > UNSETTLED_STEPS)
    return found
