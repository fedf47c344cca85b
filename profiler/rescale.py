"""Rescales a composed pack to measured steps: one factor for dense work, one for attention, one time for the host.

A step of the pack is dense + attention + communication + host. Measured steps say by how much the first two are off and
how long the host takes; three numbers, so that 50 to 200 steps are enough, and so few that what they say of a step that
was not measured is still the operators' shape. Communication keeps what its link says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument
from oracle_server.pack import CompiledPack, ComposedLatency, open_oracle
from oracle_server.sampling.grids import AXIS0, AXIS0_SIZE, OPERATOR_AXES, PRESENT, VALUES
from oracle_server.sampling.shape import StepQuery
from profiler.hybrid_samples import StepSamples

Reals = NDArray[np.float64]

ATTENTION: Final = ("generation_attention", "context_attention", "mixed_attention")
COMMUNICATION: Final = ("all_reduce", "expert_exchange")
DENSE: Final = tuple(name for name in OPERATOR_AXES if name not in (*ATTENTION, *COMMUNICATION))

FEWEST_STEPS: Final = 30
# A step that takes so many times the fit's answer, or so small a part of it, is a fault of the measurement. Kinds of
# steps that the pack gets wrong by less are its own fault and stay.
_OUTLIER_FACTOR: Final = 2.0
_REPLICATES: Final = 400
_SEED: Final = 1
# A factor whose 90 % interval is wider than a quarter of it each way, or a host time uncertain by a twentieth of a
# step, is not told by the steps.
_WIDEST_FACTOR: Final = 0.25
_WIDEST_HOST: Final = 0.05


@dataclass(frozen=True)
class Estimate:
    """A fitted number and its 90 % interval; held: the steps do not tell it, and the pack's own value stays."""

    value: float
    low: float
    high: float
    held: bool = False


@dataclass(frozen=True)
class Rescaling:
    """Factors of the pack's dense operators and attention, the host's time per step in ns, and how well they fit."""

    dense: Estimate
    attention: Estimate
    host_ns: Estimate
    steps: int
    outliers: int
    # Mean signed and mean absolute error of the steps the fit used, in percent.
    before_percent: tuple[float, float]
    after_percent: tuple[float, float]


@dataclass(frozen=True)
class Parts:
    """What the pack says of each step, float64[n] each, ns. Residuals are left out."""

    dense: Reals
    attention: Reals
    communication: Reals
    host: Reals

    @property
    def total(self) -> Reals:
        """The latency of each step."""
        return self.dense + self.attention + self.communication + self.host

    def rescaled(self, rescaling: Rescaling) -> Reals:
        """The latency of each step after `rescaling`."""
        scaled = rescaling.dense.value * self.dense + rescaling.attention.value * self.attention
        return scaled + self.communication + rescaling.host_ns.value

    def take(self, rows: NDArray[Any]) -> Parts:
        """Some of the steps."""
        return Parts(self.dense[rows], self.attention[rows], self.communication[rows], self.host[rows])


def parts_of(compiled: CompiledPack, queries: Sequence[StepQuery]) -> Parts:
    """Splits each step of a composed pack, by answering it from the pack with all other operators at zero."""
    names = {operator.name for operator in _composed(compiled).operators}
    whole = _latencies(compiled, queries, tuple(OPERATOR_AXES), host=True)
    device = _latencies(compiled, queries, tuple(OPERATOR_AXES), host=False)
    dense = _latencies(compiled, queries, DENSE, host=False)
    # A step without any cost is answered as 1 ns, so what a pack does not have is not asked for.
    if names & set(COMMUNICATION):
        communication = _latencies(compiled, queries, COMMUNICATION, host=False)
    else:
        communication = np.zeros(len(queries))
    return Parts(dense, device - dense - communication, communication, whole - device)


def queries_of(steps: StepSamples) -> list[StepQuery]:
    """The steps as a model is asked for them; chunks of one step are taken to be of one size."""
    found = []
    for n in range(len(steps)):
        chunks, requests = int(steps.chunks[n]), int(steps.decode_requests[n])
        found.append(
            StepQuery(
                chunk_tokens=_shared(int(steps.prefill_tokens[n]), chunks),
                chunk_context=_shared(int(steps.history_tokens[n]), chunks),
                num_decode_requests=requests,
                num_decode_tokens=int(steps.decode_tokens[n]),
                decode_context_tokens=int(steps.context_tokens[n]),
                max_decode_context_tokens=int(steps.max_context_tokens[n]),
                concurrency=requests + chunks,
                previous_prefill_tokens=0,
                num_new_requests=0,
            )
        )
    return found


def _shared(total: int, parts: int) -> tuple[int, ...]:
    """`total` in whole parts that differ by one at most."""
    return tuple(total // parts + (number < total % parts) for number in range(parts))


def fit_rescaling(parts: Parts, latency_ns: Reals) -> Rescaling:
    """Fits the three numbers by least squares of relative errors; none is negative.

    `latency_ns` float64[n] above 0, in the order of capture: intervals come from a bootstrap of blocks of neighbouring
    steps, which are near-copies of one another. Raises InvalidArgument below 30 steps.
    """
    if latency_ns.size < FEWEST_STEPS:
        raise InvalidArgument(f"{latency_ns.size} steps; at least {FEWEST_STEPS} are needed", field="on")
    pack_host = float(parts.host.mean())
    free = [True, bool(parts.attention.any()), True]
    kept = np.ones(latency_ns.size, dtype=bool)
    for _ in range(2):
        values = _solve(parts.take(kept), latency_ns[kept], free, pack_host)
        kept = np.abs(np.log(np.maximum(_predict(parts, values), 1.0) / latency_ns)) < np.log(_OUTLIER_FACTOR)
    used, times = parts.take(kept), latency_ns[kept]
    while True:
        values = _solve(used, times, free, pack_host)
        low, high = _intervals(used, times, free, pack_host)
        # The host first: of all three it is most easily mistaken for the others.
        unsure = [
            number
            for number in (2, 1)
            if free[number] and (high[number] - low[number]) / 2 > _widest(number, values, times)
        ]
        if not unsure:
            break
        free[unsure[0]] = False
    estimates = [Estimate(float(values[n]), float(low[n]), float(high[n]), held=not free[n]) for n in range(3)]
    return Rescaling(
        dense=estimates[0],
        attention=estimates[1],
        host_ns=estimates[2],
        steps=int(times.size),
        outliers=int(latency_ns.size - times.size),
        before_percent=_errors_percent(used.total, times),
        after_percent=_errors_percent(_predict(used, values), times),
    )


def _widest(number: int, values: Reals, latency_ns: Reals) -> float:
    return _WIDEST_HOST * float(np.median(latency_ns)) if number == 2 else _WIDEST_FACTOR * float(values[number])


def _predict(parts: Parts, values: Reals) -> Reals:
    dense, attention, host_ns = map(float, values)
    return dense * parts.dense + attention * parts.attention + parts.communication + host_ns


def _errors_percent(predicted: Reals, latency_ns: Reals) -> tuple[float, float]:
    errors = 100.0 * (predicted / latency_ns - 1.0)
    return float(errors.mean()), float(np.abs(errors).mean())


def _solve(parts: Parts, latency_ns: Reals, free: Sequence[bool], pack_host: float) -> Reals:
    """Least squares of relative errors with no negative number: the best of all sets of numbers that are not 0."""
    values = np.array([0.0 if free[0] else 1.0, 0.0 if free[1] else 1.0, 0.0 if free[2] else pack_host])
    columns = np.stack((parts.dense, parts.attention, np.ones_like(latency_ns)), axis=1) / latency_ns[:, None]
    held = columns @ values
    target = 1.0 - parts.communication / latency_ns - held
    choices = [number for number in range(3) if free[number]]
    best, least = values, np.inf
    for count in range(1, len(choices) + 1):
        for chosen in combinations(choices, count):
            found = np.linalg.lstsq(columns[:, chosen], target, rcond=None)[0]
            rest = float(np.sum((target - columns[:, chosen] @ found) ** 2))
            if (found >= 0.0).all() and rest < least:
                best, least = values.copy(), rest
                best[list(chosen)] = found
    return best


def _intervals(parts: Parts, latency_ns: Reals, free: Sequence[bool], pack_host: float) -> tuple[Reals, Reals]:
    """5 % and 95 % quantiles over resampled blocks of n^(1/3) neighbouring steps (Künsch 1989)."""
    count = latency_ns.size
    length = max(1, round(count ** (1 / 3)))
    random = np.random.default_rng(_SEED)
    found = np.empty((_REPLICATES, 3))
    for replicate in range(_REPLICATES):
        starts = random.integers(0, count - length + 1, size=-(-count // length))
        rows = (starts[:, None] + np.arange(length)).ravel()[:count]
        found[replicate] = _solve(parts.take(rows), latency_ns[rows], free, pack_host)
    low, high = np.quantile(found, (0.05, 0.95), axis=0)
    return low, high


def _latencies(compiled: CompiledPack, queries: Sequence[StepQuery], names: Sequence[str], *, host: bool) -> Reals:
    """Steps of the pack with only some of its operators, without scatter."""
    arrays = {**compiled.arrays, "residuals": np.ones(1, dtype=np.float32)}
    arrays["grid"] = scaled_grid(compiled.arrays, dict.fromkeys(OPERATOR_AXES, 0.0) | dict.fromkeys(names, 1.0))
    composed = _composed(compiled)
    if not host:
        composed = msgspec.structs.replace(composed, host_ns_per_step=0.0, host_ns_per_sequence=0.0)
    if not set(names) & set(ATTENTION):
        composed = msgspec.structs.replace(composed, launch_floor_ns=0.0)
    latency = msgspec.structs.replace(compiled.manifest.latency, composed=composed)
    manifest = msgspec.structs.replace(compiled.manifest, latency=latency)
    oracle = open_oracle(dataclasses.replace(compiled, manifest=manifest, arrays=arrays))
    return np.array([oracle.answer(query, 0, 0).latency_ns for query in queries], dtype=np.float64)


def scaled_grid(arrays: Mapping[str, NDArray[Any]], factors: Mapping[str, float]) -> Reals:
    """The grid of a composed pack with the values of some operators multiplied."""
    grid = np.array(arrays["grid"], dtype=np.float64)
    layout = arrays["layout"]
    for slot, name in enumerate(OPERATOR_AXES):
        if layout[slot, PRESENT]:
            begin = int(layout[slot, VALUES])
            grid[begin : begin + int(np.prod(layout[slot, AXIS0_SIZE:VALUES:2]))] *= factors.get(name, 1.0)
    return grid


def _composed(compiled: CompiledPack) -> ComposedLatency:
    composed = compiled.manifest.latency.composed
    if composed is None:
        raise InvalidArgument(
            f"a {compiled.manifest.kind} pack has no operators to rescale; give a composed pack", field="pack"
        )
    return composed


def axes_of(layout: NDArray[Any], grid: Reals, name: str) -> tuple[Reals, ...]:
    """The grid points of an operator, axis by axis."""
    slot = list(OPERATOR_AXES).index(name)
    return tuple(
        grid[int(layout[slot, AXIS0 + 2 * n]) :][: int(layout[slot, AXIS0_SIZE + 2 * n])]
        for n in range(len(OPERATOR_AXES[name]))
    )
