"""Fits a hybrid model: physics terms by non-negative least squares, a ratio table and neighbours, residual samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument
from oracle_server.sampling.hybrid import HybridOptions, HybridOracle
from oracle_server.sampling.hybrid_tables import (
    MIXED_RESIDUAL_ROWS_LIMIT,
    SUPPORT_ROWS_LIMIT,
    Term,
    build_model,
    long_form,
)
from profiler.hybrid_samples import StepSamples

Reals = NDArray[np.float64]

RESIDUAL_ROWS: Final = 256
SMOOTHS: Final = (0.2, 1.0, 5.0, 25.0)
# A step farther than this from the median of its neighbours in shape, in robust standard deviations of theirs, waited
# for something else than its work: it stays in the residual pool and does not bend a curve.
_OUTLIER_SIGMAS: Final = 4.0
# Steps of one cell differ by so much because their shapes do.
_LEAST_SPREAD: Final = 0.02
_FEWEST_NEIGHBORS: Final = 5
# Kinks of total tokens, four an octave: where a roofline may turn from reading weights to computing. Measured lengths
# of prompts may be an octave apart; what lies between is told by where the costs on both sides meet.
_KINKS: Final = tuple(round(16 * 2 ** (quarter / 4)) for quarter in range(25))
_MIN_STEPS: Final = 8
# Growth from one edge of the decode table to the next.
_REQUESTS_GROWTH: Final = 1.15
_CONTEXT_GROWTH: Final = 1.35
_SLICE: Final = 8192


@dataclass(frozen=True)
class FitOptions:
    """What a fit may not learn. Strengths count in samples: so much evidence moves a ratio half of the way."""

    shrink_distance: float = 0.7
    exact_distance: float = 0.1
    neighbors: int = 8
    ridge: float = 2.0
    # How much of a difference between neighbouring corners of the decode table is noise; None: of `SMOOTHS` the one
    # that predicts best a fifth of the steps, in blocks of ten, from the others.
    smooth: float | None = None
    max_context_known: bool = True
    graph_capture_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class HybridModel:
    """A fitted model, ready to be written or asked."""

    terms: tuple[Term, ...]
    # Arrays of hybrid_tables.ARRAYS.
    arrays: Mapping[str, NDArray[Any]]
    # Of decode-only steps; those of mixed steps are in `arrays`.
    residuals: Reals
    options: HybridOptions
    outliers: int

    def oracle(self) -> HybridOracle:
        """The model without residual noise: what a step is expected to take."""
        one = np.ones(1)
        built = build_model(long_form({**self.arrays, "mixed_residual": one}), self.terms)
        return HybridOracle({**built, "residuals": one}, self.options)

    def predict(self, steps: StepSamples) -> Reals:
        """Expected latency of each step in ns, by the kernels a server answers with."""
        oracle = self.oracle()
        return np.array([oracle.answer(query, 0, 0).latency_ns for query in steps.queries], dtype=np.float64)


def fit_hybrid(steps: StepSamples, options: FitOptions = FitOptions()) -> HybridModel:
    """Fit a model; raises InvalidArgument where either kind of step has too few samples."""
    for name, count in (
        ("decode-only", int(np.count_nonzero(~steps.mixed))),
        ("mixed or prefill", int(np.count_nonzero(steps.mixed))),
    ):
        if count < _MIN_STEPS:
            raise InvalidArgument(
                f"{count} {name} steps; a fit needs {_MIN_STEPS} of either kind, or prefill or decode would be free",
                field="samples",
            )
    fine = ~_outliers(steps)
    kept = steps.take(fine)
    terms = _fit_terms(kept, options)
    decode, mixed = kept.take(~kept.mixed), kept.take(kept.mixed)
    if options.smooth is None:
        options = replace(options, smooth=_best_smooth(decode, mixed, terms, options))
    arrays = _decode_table(decode, terms, options)
    arrays["mixed_support"] = _mixed_support(mixed, terms, options)
    arrays["mixed_residual"] = np.ones(1)
    limits = _limits(decode, options)
    model = HybridModel(terms, arrays, np.ones(1), limits, int(np.count_nonzero(~fine)))
    ratio = steps.latency_ns / model.predict(steps)
    arrays["mixed_residual"] = thin(ratio[steps.mixed], MIXED_RESIDUAL_ROWS_LIMIT)
    return HybridModel(terms, arrays, thin(ratio[~steps.mixed], RESIDUAL_ROWS), limits, model.outliers)


def _limits(decode: StepSamples, options: FitOptions) -> HybridOptions:
    return HybridOptions(
        shrink_distance=options.shrink_distance,
        exact_distance=options.exact_distance,
        neighbors=options.neighbors,
        max_context_edge=int(decode.max_context_tokens.max()) + 1,
        graph_capture_sizes=options.graph_capture_sizes,
    )


def _best_smooth(decode: StepSamples, mixed: StepSamples, terms: tuple[Term, ...], options: FitOptions) -> float:
    held_out = np.arange(len(decode)) // 10 % 5 == 4
    if np.count_nonzero(held_out) < _MIN_STEPS:
        return SMOOTHS[-1]
    rest, test = decode.take(~held_out), decode.take(held_out)
    support = _mixed_support(mixed, terms, options)
    errors = []
    for smooth in SMOOTHS:
        arrays = _decode_table(rest, terms, replace(options, smooth=smooth))
        arrays["mixed_support"] = support
        predicted = HybridModel(terms, arrays, np.ones(1), _limits(rest, options), 0).predict(test)
        errors.append(float(np.abs(predicted / test.latency_ns - 1).mean()))
    return SMOOTHS[int(np.argmin(errors))]


def term_costs(steps: StepSamples, terms: Sequence[Term], capture_sizes: tuple[int, ...]) -> Reals:
    """What each term adds to each step, ns, float64[n, terms]."""
    return np.asarray(_design(steps, terms, capture_sizes) * np.array([term.coefficient_ns for term in terms]))


def physics(steps: StepSamples, terms: Sequence[Term], capture_sizes: tuple[int, ...]) -> Reals:
    """Latency by the physics terms alone, ns."""
    return np.asarray(term_costs(steps, terms, capture_sizes).sum(axis=1))


def thin(ratio: Reals, rows: int) -> Reals:
    """At most `rows` ratios that stand for all of them: the middles of as many quantile intervals, with their mean."""
    if ratio.size <= rows:
        return np.sort(ratio)
    quantiles = np.quantile(ratio, (np.arange(rows) + 0.5) / rows)
    return np.asarray(quantiles * (ratio.mean() / quantiles.mean()))


def log_features(steps: StepSamples) -> Reals:
    """hybrid_tables.MIXED_FEATURES of mixed steps, float64[n, 5]."""
    return np.stack(
        (
            np.log(steps.prefill_tokens),
            np.log(steps.chunks),
            0.5 * np.log(steps.pairs),
            np.log1p(steps.decode_requests),
            np.log1p(_mean_context(steps)),
        ),
        axis=1,
    )


def _mean_context(steps: StepSamples) -> Reals:
    return np.asarray(steps.context_tokens / np.maximum(1, steps.decode_requests))


def _outliers(steps: StepSamples) -> NDArray[np.bool_]:
    """Samples far from the median of their cell: same kind, a third of an octave of requests and prefill tokens."""
    cell = np.stack(
        (
            np.minimum(steps.chunks, 4),
            np.round(3 * np.log2(1 + steps.decode_requests)),
            np.round(2 * np.log2(1 + steps.prefill_tokens)),
            np.round(2 * np.log2(1 + _mean_context(steps))),
        ),
        axis=1,
    )
    inverse = np.unique(cell, axis=0, return_inverse=True)[1].ravel()
    far = np.zeros(len(steps), dtype=bool)
    order = np.argsort(inverse, kind="stable")
    bounds = np.append(np.flatnonzero(np.diff(inverse[order], prepend=-1)), len(steps))
    for begin, end in pairwise(bounds.tolist()):
        rows = order[begin:end]
        if rows.size < _FEWEST_NEIGHBORS:
            continue
        ratio = steps.latency_ns[rows] / np.median(steps.latency_ns[rows])
        spread = max(_LEAST_SPREAD, 1.4826 * float(np.median(np.abs(ratio - 1))))
        far[rows] = np.abs(ratio - 1) > _OUTLIER_SIGMAS * spread
    return far


def _candidates(steps: StepSamples, options: FitOptions) -> list[Term]:
    tokens = steps.prefill_tokens + steps.decode_tokens
    kinks = [kink for kink in _KINKS if np.quantile(tokens, 0.02) < kink < np.quantile(tokens, 0.98)]
    names = [
        ("step", 0),
        ("mixed_step", 0),
        ("total_tokens", 0),
        *(("total_tokens", kink) for kink in kinks),
        ("decode_requests", 0),
        ("decode_context_tokens", 0),
        ("prefill_chunks", 0),
        ("prefill_history_tokens", 0),
        ("prefill_attention_pairs", 0),
    ]
    if options.max_context_known:
        names.append(("max_decode_context_tokens", 0))
    return [Term(name, float(above), 0.0) for name, above in names]


def _design(steps: StepSamples, terms: Sequence[Term], capture_sizes: tuple[int, ...]) -> Reals:
    """What each term's coefficient multiplies, float64[n, terms]."""
    tokens = steps.prefill_tokens + steps.decode_tokens
    if capture_sizes:
        sizes = np.array(sorted(capture_sizes))
        padded = sizes[np.minimum(np.searchsorted(sizes, tokens), sizes.size - 1)]
        tokens = np.where(~steps.mixed & (tokens <= sizes[-1]), padded, tokens)
    amounts = {
        "step": np.ones(len(steps)),
        "mixed_step": steps.mixed.astype(np.float64),
        "total_tokens": tokens,
        "decode_requests": steps.decode_requests,
        "decode_context_tokens": steps.context_tokens,
        "max_decode_context_tokens": steps.max_context_tokens,
        "prefill_chunks": steps.chunks,
        "prefill_tokens": steps.prefill_tokens,
        "prefill_history_tokens": steps.history_tokens,
        "prefill_attention_pairs": steps.pairs,
    }
    return np.stack([np.maximum(0.0, amounts[term.name] - term.above) for term in terms], axis=1)


def _fit_terms(steps: StepSamples, options: FitOptions) -> tuple[Term, ...]:
    """Least squares of (truth - prediction) / prediction over coefficients of 0 and more.

    The first pass weighs by the truth, the others by the prediction: dividing by a noisy truth makes noisy steps count
    less and the sum come out low.
    """
    from scipy.optimize import nnls

    terms = _candidates(steps, options)
    design = _design(steps, terms, options.graph_capture_sizes)
    latency = steps.latency_ns.astype(np.float64)
    weight = 1.0 / latency
    coefficients = np.zeros(len(terms))
    for _ in range(3):
        weighted = design * weight[:, None]
        scale = np.maximum(np.sqrt((weighted**2).sum(axis=0)), 1e-300)
        solution, _ = nnls(weighted / scale, latency * weight)
        coefficients = solution / scale
        weight = 1.0 / np.maximum(design @ coefficients, 0.1 * latency)
    # A step has a cost of its own whatever the data say: without it a table would have a corner that is free.
    if coefficients[0] + coefficients[2] <= 0:
        coefficients[0] = 1e-3 * float(latency.min())
    return tuple(
        term._replace(coefficient_ns=float(value)) for term, value in zip(terms, coefficients, strict=True) if value > 0
    )


def _decode_table(steps: StepSamples, terms: tuple[Term, ...], options: FitOptions) -> dict[str, NDArray[Any]]:
    """Ratios at the corners of a grid of decode requests and mean context, and how well each cell is backed.

    A corner's ratio is 1 + s * theta with s = exp(-(d / shrink_distance)^2) and d the distance from the corner to the
    nearest measured step. theta solves one linear least-squares problem: relative errors of the very interpolation a
    kernel does, plus `ridge` * theta^2 and `smooth` * (difference of neighbours)^2 per octave.
    """
    requests = _edges(steps.decode_requests, 1, _REQUESTS_GROWTH)
    mean = steps.context_tokens // np.maximum(1, steps.decode_requests)
    context = _edges(mean, 0, _CONTEXT_GROWTH)
    measured = np.stack((np.log1p(steps.decode_requests), np.log1p(_mean_context(steps))), axis=1)
    corners = np.stack(np.meshgrid(np.log1p(requests), np.log1p(context), indexing="ij"), axis=-1).reshape(-1, 2)
    shrink = np.exp(-((_nearest(corners, measured) / options.shrink_distance) ** 2))

    row = np.searchsorted(requests, steps.decode_requests, side="right") - 1
    column = np.searchsorted(context, mean, side="right") - 1
    next_row = np.minimum(row + 1, requests.size - 1)
    next_column = np.minimum(column + 1, context.size - 1)
    width = np.maximum(1, requests[next_row] - requests[row])
    share_row = (steps.decode_requests - requests[row]) / width
    share_column = (_mean_context(steps) - context[column]) / np.maximum(1, context[next_column] - context[column])
    per_context = sum(t.coefficient_ns for t in terms if t.name == "decode_context_tokens")
    per_longest = sum(t.coefficient_ns for t in terms if t.name == "max_decode_context_tokens")
    whole = physics(steps, terms, options.graph_capture_sizes)
    fixed = whole - per_context * steps.context_tokens - per_longest * steps.max_context_tokens
    per_mean = per_context * steps.decode_requests + per_longest
    uneven = per_longest * (steps.max_context_tokens - _mean_context(steps))
    size = corners.shape[0]
    normal = np.diag(np.full(size, float(options.ridge)))
    right = np.zeros(size)
    # In slices: the design matrix of all steps at once would not fit into memory.
    for begin in range(0, len(steps), _SLICE):
        part = slice(begin, begin + _SLICE)
        at = np.arange(whole[part].size)
        design = np.zeros((at.size, size))
        for on_row, by_row in ((row, 1 - share_row), (next_row, share_row)):
            for on_column, by_column in ((column, 1 - share_column), (next_column, share_column)):
                cost = (by_row * by_column * (fixed + per_mean * context[on_column]) / whole)[part]
                np.add.at(design, (at, (on_row * context.size + on_column)[part]), cost)
        target = ((steps.latency_ns - uneven) / whole)[part] - design.sum(axis=1)
        design *= shrink
        normal += design.T @ design
        right += design.T @ target
    smooth = SMOOTHS[-1] if options.smooth is None else options.smooth
    grid = np.arange(size).reshape(requests.size, context.size)
    for a, b in ((grid[:-1].ravel(), grid[1:].ravel()), (grid[:, :-1].ravel(), grid[:, 1:].ravel())):
        strength = smooth * np.log(2) / np.maximum(0.05, np.abs(corners[b] - corners[a]).sum(axis=1))
        np.add.at(normal, (a, a), strength)
        np.add.at(normal, (b, b), strength)
        np.add.at(normal, (a, b), -strength)
        np.add.at(normal, (b, a), -strength)
    theta = np.linalg.solve(normal, right)
    ratio = np.clip(1 + shrink * theta, 0.2, 5.0).reshape(grid.shape)
    support, distance = _backing(requests, context, steps.decode_requests, mean, measured, options.shrink_distance)
    return {
        "decode_requests": requests,
        "decode_context": context,
        "decode_ratio": ratio,
        "decode_support": support,
        "decode_distance": distance,
    }


def _edges(values: NDArray[np.int64], first: int, growth: float) -> NDArray[np.int64]:
    """Edges of cells: geometric, the ends of the measured range among them, from `first` to eight times its end."""
    low, high = int(values.min()), int(values.max()) + 1
    edges = {first, low, high}
    for end, stop in ((low, first), (high, 8 * high)):
        edges.add(stop)
        edge = float(end)
        while (edge > stop) if stop < end else (edge < stop):
            edge = edge / 1.5 if stop < end else edge * 1.5
            edges.add(round(min(max(edge, min(end, stop)), max(end, stop))))
            if edge < 2:
                break
    steps = max(1, round(np.log(high / max(1, low)) / np.log(growth)))
    edges |= {round(max(1, low) * (high / max(1, low)) ** (number / steps)) for number in range(1, steps)}
    return np.array(sorted(edge for edge in edges if edge >= first), dtype=np.int64)


def _backing(
    requests: NDArray[np.int64],
    context: NDArray[np.int64],
    measured_requests: NDArray[np.int64],
    measured_mean: NDArray[np.int64],
    measured: Reals,
    reach: float,
) -> tuple[NDArray[np.int64], Reals]:
    """Support and distance of every cell: exact with a measured step in it, extrapolated outside the measured range or
    with none within `reach`."""
    row = np.searchsorted(requests, measured_requests, side="right") - 1
    column = np.searchsorted(context, measured_mean, side="right") - 1
    held = np.zeros((requests.size, context.size), dtype=bool)
    held[row, column] = True
    middles = []
    for edges in (requests, context):
        upper = np.append(edges[1:] - 1, 2 * edges[-1])
        middles.append((np.log1p(edges) + np.log1p(upper)) / 2)
    points = np.stack(np.meshgrid(*middles, indexing="ij"), axis=-1).reshape(-1, 2)
    distance = np.where(held, 0.0, _nearest(points, measured).reshape(held.shape))
    inside = (
        ((requests >= measured_requests.min()) & (requests <= measured_requests.max()))[:, None]
        & ((context >= measured_mean.min()) & (context <= measured_mean.max()))[None, :]
    )  # fmt: skip
    return np.where(held, 1, np.where(inside & (distance <= reach), 2, 3)), distance


def _mixed_support(steps: StepSamples, terms: tuple[Term, ...], options: FitOptions) -> Reals:
    """Measured mixed steps as points with a ratio: cells of log features, each at its mean, grown until they are few.

    A ratio is drawn to 1 as far as `ridge` samples would: one noisy step is weak evidence.
    """
    points = log_features(steps)
    ratio = steps.latency_ns / physics(steps, terms, options.graph_capture_sizes)
    width = options.exact_distance
    while True:
        cell = np.unique(np.floor(points / width), axis=0, return_inverse=True)[1].ravel()
        count = np.bincount(cell)
        if count.size <= SUPPORT_ROWS_LIMIT:
            break
        width *= 1.15
    mean = np.stack([np.bincount(cell, column) / count for column in points.T], axis=1)
    learned = 1 + (np.bincount(cell, ratio) / count - 1) * count / (count + options.ridge)
    return np.column_stack((mean, np.clip(learned, 0.2, 5.0)))


def _nearest(points: Reals, measured: Reals) -> Reals:
    """Distance from each point to the nearest measured one."""
    from scipy.spatial import cKDTree

    return np.asarray(cKDTree(measured).query(points)[0])
