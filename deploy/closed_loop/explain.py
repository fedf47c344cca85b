"""Where the errors of the time between tokens come from, step by step: `make closed-loop ARGS="--explain"`.

The real runs are captured as the plan is and the emulated ones traced, so the pack is asked about the real engine's own
steps, and what lies between steps is seen on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from deploy.closed_loop.comparison import COLUMNS
from profiler.capture.steps import CapturedStep
from step_oracle.v1 import trace_pb2


@dataclass(frozen=True)
class StepPeriods:
    """Steps of a run with requests that decode. One array each, a value per step; times in nanoseconds.

    `between_ns`: the device had nothing to do between the step before and this one, without a capture's own time.
    """

    decode_requests: NDArray[np.float64]
    latency_ns: NDArray[np.float64]
    between_ns: NDArray[np.float64]

    def per_token_ns(self, values: NDArray[np.float64]) -> float:
        """Mean over the tokens: a step counts as often as it has requests that decode."""
        return float(np.average(values, weights=self.decode_requests))


@dataclass(frozen=True)
class Explanation:
    """Of one run or the mean of several. Times are means over tokens in milliseconds, errors percent of the real one's
    time between tokens, at the engine: that of the sum is the sum of the three before it.
    """

    real_ms: float
    emulated_ms: float
    real_requests: float
    emulated_requests: float
    # What the pack says of the real run's own steps; what is between steps; and what the emulated run's steps are
    # beside the real one's: batches of other sizes and lengths, and draws.
    pack_percent: float
    between_percent: float
    steps_percent: float
    total_percent: float


def captured_periods(steps: Sequence[CapturedStep]) -> tuple[StepPeriods, NDArray[np.bool_]]:
    """Of a captured run, and which of its steps they are."""
    own_ns = [
        after.dispatch_ns - before.result_ns - after.host_ns if after.host_ns else 0
        for before, after in pairwise(steps)
    ]
    between = [
        after.device_start_ns - before.device_end_ns - own
        for (before, after), own in zip(pairwise(steps), own_ns, strict=True)
    ]
    requests = np.array([step.num_decode_requests for step in steps], dtype=np.float64)
    counts = requests > 0
    counts[:1] = False
    return _periods(requests, [step.latency_ns for step in steps], [0, *between], counts), counts


def traced_periods(records: Iterable[trace_pb2.TraceStep]) -> StepPeriods:
    """Of a run of an emulated engine."""
    steps = list(records)
    between = [after.device_start_ns - before.device_finish_ns for before, after in pairwise(steps)]
    requests = np.array([step.request.shape.num_decode_requests for step in steps], dtype=np.float64)
    counts = requests > 0
    counts[:1] = False
    latencies = [step.device_finish_ns - step.device_start_ns for step in steps]
    return _periods(requests, latencies, [0, *between], counts)


def _periods(
    requests: NDArray[np.float64], latencies: Sequence[int], between: Sequence[int], counts: NDArray[np.bool_]
) -> StepPeriods:
    latency_ns, between_ns = (np.array(values, dtype=np.float64)[counts] for values in (latencies, between))
    return StepPeriods(requests[counts], latency_ns, between_ns)


def explain(real: StepPeriods, expected_ns: NDArray[np.float64], emulated: StepPeriods) -> Explanation:
    """`expected_ns`: of each step of the real run, what the pack says of it."""
    real_ns, emulated_ns = (each.per_token_ns(each.latency_ns + each.between_ns) for each in (real, emulated))
    pack_ns = real.per_token_ns(expected_ns - real.latency_ns)
    between_ns = emulated.per_token_ns(emulated.between_ns) - real.per_token_ns(real.between_ns)
    total_ns = emulated_ns - real_ns
    percents = (100 * each / real_ns for each in (pack_ns, between_ns, total_ns - pack_ns - between_ns, total_ns))
    sizes = (each.per_token_ns(each.decode_requests) for each in (real, emulated))
    return Explanation(real_ns / 1e6, emulated_ns / 1e6, *sizes, *percents)


def mean_of(explanations: Sequence[Explanation]) -> Explanation:
    """Each run counts once."""
    return Explanation(*np.mean([astuple(each) for each in explanations], axis=0).tolist())


def print_explanations(rows: Sequence[tuple[str, Sequence[Explanation]]]) -> None:
    """A row per workload: its name, and an explanation of each repeat."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("time between tokens, at the engine")
    for head in ("real\nms", "emulated\nms", "error\n%", "pack\n%", "between steps\n%", "other steps\n%"):
        table.add_column(head, justify="right")
    for head in ("requests\nreal", "\nemulated", "pack, by repeat\n%"):
        table.add_column(head, justify="right")
    for name, explanations in rows:
        mean = mean_of(explanations)
        errors = (mean.total_percent, mean.pack_percent, mean.between_percent, mean.steps_percent)
        table.add_row(
            name,
            *(f"{mean.real_ms:.2f}", f"{mean.emulated_ms:.2f}", *(f"{error:+.1f}" for error in errors)),
            *(f"{mean.real_requests:.2f}", f"{mean.emulated_requests:.2f}"),
            " ".join(f"{each.pack_percent:+.1f}" for each in explanations),
        )
    Console(width=COLUMNS, markup=False, highlight=False).print(table)
    print("error = pack (what it says of the real runs' own steps) + between steps (host, preparation, copy) + other")
    print("steps (the emulated runs' batches beside the real ones'); requests: that decode in a step, by token")
