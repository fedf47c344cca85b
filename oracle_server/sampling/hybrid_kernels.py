"""Kernels of the hybrid latency model: the piece of a decode-only step, a step with prefill chunks or draft tokens.

Arguments shared by all: the arrays of `hybrid_tables.build_model`, `capture_sizes` ascending int64 (empty: no padding),
`options` float64[4] = shrink_distance, exact_distance, neighbors, max_context_edge. Times in ns, all else in tokens and
requests.
"""

from __future__ import annotations

# Integers of a kernel are numba's int64 and array items are scalars: the annotations say what a caller passes and gets.
# mypy: disable-error-code="arg-type,assignment,no-any-return,return-value"
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.sampling.answer import (
    KNOWLEDGE_EXTRAPOLATED,
    KNOWLEDGE_INTERPOLATED,
    KNOWLEDGE_MEASURED,
    KNOWLEDGE_MODELLED,
    SUPPORT_EXACT,
    SUPPORT_EXTRAPOLATED,
    SUPPORT_INTERPOLATED,
)
from oracle_server.sampling.draws import DOMAIN_RESIDUAL, draw_u64, index_below_u64
from oracle_server.sampling.jit import compiled
from oracle_server.sampling.shape import CONTEXT_TOKENS_LIMIT

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

_FEATURES: Final = 5
_MOST_NEIGHBORS: Final = 16
# Keeps a measured point from taking all the weight of its neighbours, whose noise is as large.
_SOFTENING: Final = 0.01

# Context interval, maximum-context interval, intercept, two slopes, support, knowledge, distance.
_Piece = tuple[int, int, int, int, float, float, float, int, int, float]


@compiled
def decode_latency(
    requests_edge: Ints,
    context_edge: Ints,
    ratio: Reals,
    support: Ints,
    distance: Reals,
    feature: Ints,
    above: Reals,
    coefficient: Reals,
    capture_sizes: Ints,
    options: Reals,
    residuals: Reals,
    requests: int,
    context: int,
    longest: int,
    key: int,
    step_index: int,
    factor: float,
) -> tuple[float, int, float, int]:
    """Latency, support, distance and knowledge of a decode-only step, by the expression of step.proto's Lease."""
    piece = decode_piece(
        requests_edge,
        context_edge,
        ratio,
        support,
        distance,
        feature,
        above,
        coefficient,
        capture_sizes,
        options,
        requests,
        context,
        longest,
        factor,
    )
    drawn = residuals[index_below_u64(draw_u64(key, step_index, DOMAIN_RESIDUAL, 0), residuals.size)]
    base = (piece[4] + piece[5] * np.float64(context)) + piece[6] * np.float64(longest)
    return max(1.0, np.floor(base * drawn + 0.5)), piece[7], piece[9], piece[8]


@compiled
def decode_piece(
    requests_edge: Ints,
    context_edge: Ints,
    ratio: Reals,
    support: Ints,
    distance: Reals,
    feature: Ints,
    above: Reals,
    coefficient: Reals,
    capture_sizes: Ints,
    options: Reals,
    requests: int,
    context: int,
    longest: int,
    factor: float,
) -> _Piece:
    """The piece around one decode-only shape.

    Physics of a decode-only step is linear in context, so ratio * physics is known at the context edges around the mean
    context and the cost is the line between these two values: linear in the sum of contexts for one number of requests.
    The ratio of a number of requests between two edges is the line between theirs. Beyond the last edge of either axis
    the ratio of that edge goes on.
    """
    rows = requests_edge.size
    row = np.searchsorted(requests_edge, requests, side="right") - 1
    share = 0.0
    next_row = row
    if row < rows - 1:
        next_row = row + 1
        share = np.float64(requests - requests_edge[row]) / np.float64(requests_edge[row + 1] - requests_edge[row])
    fixed, per_context, per_longest = _decode_terms(feature, above, coefficient, capture_sizes, requests)

    columns = context_edge.size
    # mean >= edge exactly when sum >= edge * requests: whole numbers, so a piece ends where a lease says it does.
    column = np.searchsorted(context_edge, context // requests, side="right") - 1
    low = np.float64(context_edge[column])
    low_ratio = ratio[row, column] + share * (ratio[next_row, column] - ratio[row, column])
    # A step whose contexts are all `low` costs so much; max context adds its own slope below.
    per_mean = per_context * np.float64(requests) + per_longest
    low_cost = low_ratio * (fixed + per_mean * low)
    begin = context_edge[column] * requests
    if column < columns - 1:
        high = np.float64(context_edge[column + 1])
        high_ratio = ratio[row, column + 1] + share * (ratio[next_row, column + 1] - ratio[row, column + 1])
        slope = (high_ratio * (fixed + per_mean * high) - low_cost) / (high - low)
        end = context_edge[column + 1] * requests
    else:
        slope = low_ratio * per_mean
        end = np.int64(CONTEXT_TOKENS_LIMIT)

    max_begin = np.int64(0)
    max_end = np.int64(CONTEXT_TOKENS_LIMIT)
    supported = support[row, column]
    if per_longest > 0.0:
        edge = np.int64(options[3])
        if longest < edge:
            max_end = edge
        else:
            max_begin = edge
            supported = SUPPORT_EXTRAPOLATED
    return (
        begin,
        end,
        max_begin,
        max_end,
        (low_cost - slope * low) * factor,
        (slope - per_longest) / np.float64(requests) * factor,
        per_longest * factor,
        supported,
        _knowledge(supported),
        distance[row, column],
    )


@compiled
def mixed_latency(
    requests_edge: Ints,
    context_edge: Ints,
    ratio: Reals,
    support: Ints,
    distance: Reals,
    feature: Ints,
    above: Reals,
    coefficient: Reals,
    capture_sizes: Ints,
    options: Reals,
    mixed_support: Reals,
    mixed_box: Reals,
    mixed_residual: Reals,
    chunks: int,
    prefill: int,
    history: int,
    pairs: int,
    requests: int,
    decode_tokens: int,
    context: int,
    longest: int,
    key: int,
    step_index: int,
    factor: float,
) -> tuple[float, int, float, int]:
    """Latency, support, distance and knowledge of a step with prefill chunks or draft tokens.

    `pairs` are the query-key pairs of prefill attention, sum of tokens * history + tokens * (tokens + 1) / 2 over the
    chunks. Without a chunk the cost is that of the decode-only step plus its draft tokens. Draft tokens are `modelled`:
    no fit has seen them.
    """
    drawn = mixed_residual[index_below_u64(draw_u64(key, step_index, DOMAIN_RESIDUAL, 0), mixed_residual.size)]
    if chunks == 0:
        piece = decode_piece(
            requests_edge,
            context_edge,
            ratio,
            support,
            distance,
            feature,
            above,
            coefficient,
            capture_sizes,
            options,
            requests,
            context,
            longest,
            1.0,
        )
        base = (piece[4] + piece[5] * np.float64(context)) + piece[6] * np.float64(longest)
        with_drafts = _decode_terms(feature, above, coefficient, capture_sizes, decode_tokens)[0]
        base += with_drafts - _decode_terms(feature, above, coefficient, capture_sizes, requests)[0]
        base -= _requests_terms(feature, coefficient) * np.float64(decode_tokens - requests)
        known = max(piece[8], KNOWLEDGE_MODELLED)
        return max(1.0, np.floor(base * factor * drawn + 0.5)), piece[7], piece[9], known

    physics = 0.0
    for i in range(feature.size):
        kind = feature[i]
        if kind <= 1:
            amount = 1.0
        elif kind == 2:
            amount = np.float64(prefill + decode_tokens)
        elif kind == 3:
            amount = np.float64(requests)
        elif kind == 4:
            amount = np.float64(context)
        elif kind == 5:
            amount = np.float64(longest)
        elif kind == 6:
            amount = np.float64(chunks)
        elif kind == 7:
            amount = np.float64(prefill)
        elif kind == 8:
            amount = np.float64(history)
        else:
            amount = np.float64(pairs)
        physics += coefficient[i] * max(0.0, amount - above[i])

    point = np.empty(_FEATURES)
    point[0] = math.log(np.float64(prefill))
    point[1] = math.log(np.float64(chunks))
    point[2] = 0.5 * math.log(np.float64(pairs))
    point[3] = math.log(1.0 + np.float64(requests))
    point[4] = math.log(1.0 + np.float64(context) / np.float64(max(1, requests)))
    inside = True
    for j in range(_FEATURES):
        if point[j] < mixed_box[0, j] - options[1] or point[j] > mixed_box[1, j] + options[1]:
            inside = False

    count = min(np.int64(options[2]), mixed_support.shape[0])
    near_d2 = np.full(_MOST_NEIGHBORS, np.inf)
    near_ratio = np.ones(_MOST_NEIGHBORS)
    worst = np.inf
    for i in range(mixed_support.shape[0]):
        d2 = 0.0
        for j in range(_FEATURES):
            difference = mixed_support[i, j] - point[j]
            d2 += difference * difference
        if d2 < worst:
            at = count - 1
            while at > 0 and near_d2[at - 1] > d2:
                near_d2[at] = near_d2[at - 1]
                near_ratio[at] = near_ratio[at - 1]
                at -= 1
            near_d2[at] = d2
            near_ratio[at] = mixed_support[i, 5]
            worst = near_d2[count - 1]
    weight = 0.0
    total = 0.0
    for i in range(count):
        share = 1.0 / (near_d2[i] + _SOFTENING)
        weight += share
        total += share * (near_ratio[i] - 1.0)
    nearest = math.sqrt(near_d2[0])
    scaled = nearest / options[0]
    learned = 1.0 + math.exp(-(scaled * scaled)) * (total / weight)

    if not inside:
        supported = SUPPORT_EXTRAPOLATED
    elif nearest <= options[1]:
        supported = SUPPORT_EXACT
        nearest = 0.0
    elif nearest <= options[0]:
        supported = SUPPORT_INTERPOLATED
    else:
        supported = SUPPORT_EXTRAPOLATED
    known = _knowledge(supported)
    if decode_tokens > requests:
        known = max(known, KNOWLEDGE_MODELLED)
    return max(1.0, np.floor(physics * learned * factor * drawn + 0.5)), supported, nearest, known


@compiled
def _decode_terms(
    feature: Ints, above: Reals, coefficient: Reals, capture_sizes: Ints, requests: int
) -> tuple[float, float, float]:
    """Physics of a decode-only step: what context does not change, ns per context token, ns per token of the
    longest."""
    tokens = requests
    if capture_sizes.size > 0 and tokens <= capture_sizes[capture_sizes.size - 1]:
        tokens = capture_sizes[np.searchsorted(capture_sizes, tokens)]
    fixed = 0.0
    per_context = 0.0
    per_longest = 0.0
    for i in range(feature.size):
        kind = feature[i]
        if kind == 0:
            fixed += coefficient[i]
        elif kind == 2:
            fixed += coefficient[i] * max(0.0, np.float64(tokens) - above[i])
        elif kind == 3:
            fixed += coefficient[i] * np.float64(requests)
        elif kind == 4:
            per_context += coefficient[i]
        elif kind == 5:
            per_longest += coefficient[i]
    return fixed, per_context, per_longest


@compiled
def _requests_terms(feature: Ints, coefficient: Reals) -> float:
    """Physics per decode request, which a draft token is not."""
    cost = 0.0
    for i in range(feature.size):
        if feature[i] == 3:
            cost += coefficient[i]
    return cost


@compiled
def _knowledge(support: int) -> int:
    if support == SUPPORT_EXACT:
        return KNOWLEDGE_MEASURED
    if support == SUPPORT_INTERPOLATED:
        return KNOWLEDGE_INTERPOLATED
    return KNOWLEDGE_EXTRAPOLATED


def box_of(mixed_support: NDArray[Any]) -> Reals:
    """Least and largest of each feature of the measured mixed steps, float64[2, 5]."""
    points = np.asarray(mixed_support, dtype=np.float64)[:, :_FEATURES]
    return np.stack((points.min(axis=0), points.max(axis=0)))
