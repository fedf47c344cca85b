"""What a fit is worth: its terms in numbers, and its errors on regions it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oracle_server.sampling.hybrid_tables import TERM_UNITS
from profiler.hybrid_fit import FitOptions, HybridModel, fit_hybrid, physics, term_costs
from profiler.hybrid_samples import SampleFile, StepSamples

# A region with fewer steps says nothing; a fit without this share of all steps is another fit.
_MIN_HELD_OUT = 10
_MOST_HELD_OUT = 0.6


@dataclass(frozen=True)
class TermLine:
    """One physics term and the share of all time it explains."""

    name: str
    coefficient_ns: float
    unit: str
    time_share: float


@dataclass(frozen=True)
class RegionLine:
    """A model fitted without a region, judged in it. Percent of the truth; `percentiles` 5 and 95 of truth / answer."""

    region: str
    steps: int
    mape: float
    physics_mape: float
    bias: float
    percentiles: tuple[float, float]


def term_lines(model: HybridModel, steps: StepSamples) -> list[TermLine]:
    """Terms by their share of the time of `steps`, largest first."""
    costs = term_costs(steps, model.terms, model.options.graph_capture_sizes).sum(axis=0)
    lines = [
        TermLine(
            term.name + (f" above {term.above:g}" if term.above else ""),
            term.coefficient_ns,
            TERM_UNITS[term.name],
            float(cost / costs.sum()),
        )
        for term, cost in zip(model.terms, costs, strict=True)
    ]
    return sorted(lines, key=lambda line: -line.time_share)


def region_lines(steps: StepSamples, options: FitOptions) -> list[RegionLine]:
    """Leave each region out, fit the rest, predict the region."""
    lines = []
    for name, held_out in regions(steps):
        rest = steps.take(~held_out)
        if np.count_nonzero(held_out) < _MIN_HELD_OUT or min(rest.mixed.sum(), (~rest.mixed).sum()) < _MIN_HELD_OUT:
            continue
        model = fit_hybrid(rest, options)
        lines.append(judge(name, model, steps.take(held_out)))
    return lines


def judge(region: str, model: HybridModel, steps: StepSamples) -> RegionLine:
    """Errors of a model on steps it was not fitted to."""
    predicted = model.predict(steps)
    alone = physics(steps, model.terms, model.options.graph_capture_sizes)
    error = predicted / steps.latency_ns - 1
    low, high = np.percentile(steps.latency_ns / predicted - 1, (5, 95))
    return RegionLine(
        region,
        len(steps),
        float(100 * np.abs(error).mean()),
        float(100 * np.abs(alone / steps.latency_ns - 1).mean()),
        float(100 * error.mean()),
        (float(100 * low), float(100 * high)),
    )


def regions(steps: StepSamples) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Regions of shapes, never single steps: neighbours in time are near-duplicates.

    Every fifth of ten consecutive steps for the middle of the distribution; thirds of concurrency, of mean context and
    of prefill tokens for its holes and its edges.
    """
    yield "in distribution (every fifth ten steps)", np.arange(len(steps)) // 10 % 5 == 4
    concurrency = steps.decode_requests + steps.chunks
    everything = np.ones(len(steps), dtype=bool)
    decodes = steps.decode_requests > 0
    for name, values, among in (
        ("concurrency", concurrency, everything),
        ("mean context tokens", steps.context_tokens // np.maximum(1, steps.decode_requests), decodes),
        ("prefill tokens", steps.prefill_tokens, steps.mixed),
    ):
        if not among.any():
            continue
        first, second = (int(value) for value in np.quantile(values[among], (1 / 3, 2 / 3)))
        for label, rows in (
            (f"below: {name} <= {first}", values <= first),
            (f"hole: {name} {first + 1} to {second}", (values > first) & (values <= second)),
            (f"above: {name} > {second}", values > second),
        ):
            held_out = among & rows
            if 0 < np.count_nonzero(held_out) <= _MOST_HELD_OUT * len(steps):
                yield label, held_out


def residual_sigma_percent(ratios: NDArray[np.float64]) -> tuple[float, float]:
    """Standard deviation of residual ratios, and the robust one (1.4826 x median deviation) that tails do not move."""
    middle = np.median(ratios)
    return float(100 * ratios.std()), float(100 * 1.4826 * np.median(np.abs(ratios - middle)))


def report_lines(file: SampleFile, model: HybridModel, judged: Sequence[RegionLine]) -> list[str]:
    """What `step-oracle fit` prints."""
    steps = file.steps
    mixed = int(np.count_nonzero(steps.mixed))
    left_out = ", ".join(f"{count} {reason}" for reason, count in file.left_out.items()) or "nothing"
    lines = [
        f"  steps: {len(steps)}, {mixed} with prefill chunks, {model.outliers} outliers; left out: {left_out}",
        *(f"  note: {note}" for note in file.notes),
        "  term                              coefficient           share of time",
    ]
    fitted = term_lines(model, steps)
    lines += [
        f"    {line.name:<28} {line.coefficient_ns:>14,.4g} {line.unit:<15} {100 * line.time_share:6.2f} %"
        for line in fitted
    ]
    free = [name for name in TERM_UNITS if not any(term.name == name for term in model.terms)]
    if free:
        lines.append(f"    no evidence, so free: {', '.join(free)}")
    lines.append("  region left out of the fit                   steps  error  physics alone   bias")
    lines += [
        f"    {line.region:<42} {line.steps:>5} {line.mape:5.2f} %        {line.physics_mape:5.2f} % "
        f"{line.bias:+5.2f} %"
        for line in judged
    ]
    for name, ratios in (("decode-only", model.residuals), ("mixed", model.arrays["mixed_residual"])):
        sigma, robust = residual_sigma_percent(np.asarray(ratios))
        lines.append(f"  residuals, {name:<11} sigma {sigma:.2f} %, robust {robust:.2f} %, {ratios.size} samples")
    cells = np.asarray(model.arrays["decode_support"])
    decode = steps.take(~steps.mixed)
    mean = decode.context_tokens // np.maximum(1, decode.decode_requests)
    points = np.asarray(model.arrays["mixed_support"]).shape[0]
    lines.append(
        f"  coverage: {int(decode.decode_requests.min())} to {int(decode.decode_requests.max())} decode requests at "
        f"{int(mean.min())} to {int(mean.max())} mean context tokens ({int((cells == 1).sum())} cells measured, "
        f"{int((cells == 2).sum())} between); {int(steps.prefill_tokens[steps.mixed].min())} to "
        f"{int(steps.prefill_tokens.max())} prefill tokens ({points} measured shapes)"
    )
    return lines
