"""The kernels of joint neighbours: one step, and many steps of one table."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from oracle_server.sampling.answer import SUPPORT_EXACT, SUPPORT_EXTRAPOLATED, SUPPORT_INTERPOLATED
from oracle_server.sampling.draws import DOMAIN_NEIGHBOR, DOMAIN_RESIDUAL, draw_u64, index_below_u64, unit_u64
from oracle_server.sampling.jit import compiled


@compiled
def lower_bound(values: NDArray[np.int64], begin: int, end: int, wanted: int) -> int:
    """The first place of [begin, end) whose value is not below `wanted`; `end` where there is none.

    np.searchsorted in a kernel, without a view and a look for NaN.
    """
    while begin < end:
        middle = (begin + end) >> 1
        if values[middle] < wanted:
            begin = middle + 1
        else:
            end = middle
    return begin


@compiled
def find_bucket(
    row_concurrency: NDArray[np.int64],
    row_begin: NDArray[np.int64],
    bucket_tokens: NDArray[np.int64],
    tokens: int,
    concurrency: int,
) -> int:
    """The bucket of these centers; -1 where the table has none."""
    rows = row_concurrency.size
    span, offset = row_concurrency[rows - 1] - row_concurrency[0], concurrency - row_concurrency[0]
    if offset < 0 or offset > span:
        return -1
    # Rows that are equally far apart, as most are, need no search.
    row = offset * (rows - 1) // max(1, span)
    if row_concurrency[row] != concurrency:
        row = lower_bound(row_concurrency, 0, rows, concurrency)
    if row_concurrency[row] == concurrency:
        end = row_begin[row + 1]
        at = lower_bound(bucket_tokens, row_begin[row], end, tokens)
        if at < end and bucket_tokens[at] == tokens:
            return at
    return -1


@compiled
def draw_sample(
    row_concurrency: NDArray[np.int64],
    row_begin: NDArray[np.int64],
    bucket_tokens: NDArray[np.int64],
    sample_begin: NDArray[np.int64],
    latency_ns: NDArray[np.int64],
    tokens_low: int,
    tokens_high: int,
    tokens: int,
    concurrency: int,
    min_samples: int,
    max_buckets: int,
    key: int,
    step_index: int,
) -> tuple[int, int, float]:
    """Latency (ns), support and distance of one query, given as bucket centers.

    Arrays as in `buckets.build_index`; `tokens_low` and `tokens_high` are the ends of bucket_tokens.

    An exact bucket takes all the weight, however few samples it has. Else the nearest buckets by
    d^2 = (dtokens / range of tokens)^2 + (dconcurrency / range of concurrency)^2, ranges over the table, (ties: fewer
    tokens, then less concurrency) are added until they hold `min_samples` or are `max_buckets`; one of them is drawn
    with weight 1 / d^2 (Shepard, p = 2) and one of its samples uniformly. Distance is d of the nearest bucket. Source:
    LLM-Emu, K = auto.
    """
    residual = draw_u64(key, step_index, DOMAIN_RESIDUAL, 0)
    exact = find_bucket(row_concurrency, row_begin, bucket_tokens, tokens, concurrency)
    if exact >= 0:
        count = sample_begin[exact + 1] - sample_begin[exact]
        return latency_ns[sample_begin[exact] + index_below_u64(residual, count)], SUPPORT_EXACT, 0.0

    rows = row_concurrency.size
    above = lower_bound(row_concurrency, 0, rows, concurrency)
    tokens_range = np.float64(max(1, tokens_high - tokens_low))
    concurrency_range = np.float64(max(1, row_concurrency[rows - 1] - row_concurrency[0]))
    # Rows open outward from the query's concurrency as soon as their least possible distance can matter; an open row
    # offers its nearest bucket on either side.
    below = above - 1
    open_left = np.empty(rows, dtype=np.int64)
    open_right = np.empty(rows, dtype=np.int64)
    open_row = np.empty(rows, dtype=np.int64)
    num_open = 0
    chosen = np.empty(max_buckets, dtype=np.int64)
    chosen_d2 = np.empty(max_buckets, dtype=np.float64)
    num_chosen = 0
    samples = 0
    while num_chosen < max_buckets and samples < min_samples:
        best_d2 = np.inf
        best_tokens = 0
        best_row = -1
        best_open = -1
        best_is_left = False
        scanned = 0
        while True:
            while scanned < num_open:
                row = open_row[scanned]
                dc = (row_concurrency[row] - concurrency) / concurrency_range
                for side in range(2):
                    at = open_left[scanned] if side == 0 else open_right[scanned]
                    if at < row_begin[row] or at >= row_begin[row + 1]:
                        continue
                    dt = (bucket_tokens[at] - tokens) / tokens_range
                    d2 = dt * dt + dc * dc
                    if d2 < best_d2 or (
                        d2 == best_d2
                        and (
                            bucket_tokens[at] < best_tokens
                            or (bucket_tokens[at] == best_tokens and row_concurrency[row] < row_concurrency[best_row])
                        )
                    ):
                        best_d2 = d2
                        best_tokens = bucket_tokens[at]
                        best_row = row
                        best_open = scanned
                        best_is_left = side == 0
                scanned += 1
            if below < 0 and above >= rows:
                break
            # `below` is nearer on a tie only by chance: both open, as the comparison is <=.
            take_below = above >= rows or (
                below >= 0 and concurrency - row_concurrency[below] <= row_concurrency[above] - concurrency
            )
            row = below if take_below else above
            dc = (row_concurrency[row] - concurrency) / concurrency_range
            if dc * dc > best_d2:
                break
            if take_below:
                below -= 1
            else:
                above += 1
            at = lower_bound(bucket_tokens, row_begin[row], row_begin[row + 1], tokens)
            open_row[num_open] = row
            open_left[num_open] = at - 1
            open_right[num_open] = at
            num_open += 1
        if best_open < 0:
            break
        if best_is_left:
            at = open_left[best_open]
            open_left[best_open] -= 1
        else:
            at = open_right[best_open]
            open_right[best_open] += 1
        chosen[num_chosen] = at
        chosen_d2[num_chosen] = best_d2
        num_chosen += 1
        samples += sample_begin[at + 1] - sample_begin[at]

    pick = 0
    if num_chosen > 1:
        total = 0.0
        for i in range(num_chosen):
            total += 1.0 / chosen_d2[i]
        target = unit_u64(draw_u64(key, step_index, DOMAIN_NEIGHBOR, 0)) * total
        reached = 1.0 / chosen_d2[0]
        while reached <= target and pick < num_chosen - 1:
            pick += 1
            reached += 1.0 / chosen_d2[pick]
    at = chosen[pick]
    count = sample_begin[at + 1] - sample_begin[at]
    latency = latency_ns[sample_begin[at] + index_below_u64(residual, count)]

    inside = tokens_low <= tokens <= tokens_high and row_concurrency[0] <= concurrency <= row_concurrency[rows - 1]
    return latency, SUPPORT_INTERPOLATED if inside else SUPPORT_EXTRAPOLATED, math.sqrt(chosen_d2[0])


@compiled
def draw_samples(
    row_concurrency: NDArray[np.int64],
    row_begin: NDArray[np.int64],
    bucket_tokens: NDArray[np.int64],
    sample_begin: NDArray[np.int64],
    latency_ns: NDArray[np.int64],
    tokens_low: int,
    tokens_high: int,
    tokens: NDArray[np.int64],
    concurrency: NDArray[np.int64],
    min_samples: int,
    max_buckets: int,
    key: int,
    step_index: NDArray[np.int64],
    drawn_ns: NDArray[np.int64],
    support: NDArray[np.int64],
    distance: NDArray[np.float64],
) -> None:
    """`draw_sample` of each item, written into the last three arrays."""
    for i in range(tokens.size):
        drawn_ns[i], support[i], distance[i] = draw_sample(
            row_concurrency,
            row_begin,
            bucket_tokens,
            sample_begin,
            latency_ns,
            tokens_low,
            tokens_high,
            tokens[i],
            concurrency[i],
            min_samples,
            max_buckets,
            key,
            step_index[i],
        )
