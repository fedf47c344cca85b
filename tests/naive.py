"""The slow obvious twin of every kernel: plain Python over plain data, written from the rules and not from the
kernels."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from oracle_server.sampling.draws import draw, index_below, unit
from oracle_server.sampling.shape import StepQuery

Grid = Mapping[tuple[int, ...], float]
EXACT, INTERPOLATED, EXTRAPOLATED = 1, 2, 3


def sampled_answer(
    samples: Mapping[str, Any],
    query: StepQuery,
    key: int,
    step_index: int,
    *,
    tokens_bucket_width: int = 1,
    concurrency_bucket_width: int = 1,
    min_samples: int = 30,
    max_buckets: int = 32,
    table_rule: str = "prefill_tokens",
    transition: bool = False,
) -> tuple[int, int, float]:
    """Latency, support and distance by LLM-Emu's rule, K = auto, over the rows of samples.parquet."""

    def center(value: int, width: int) -> int:
        return value // width * width + width // 2

    prefill = bool(query.chunk_tokens if table_rule == "prefill_tokens" else query.num_new_requests)
    after = transition and not prefill and query.previous_prefill_tokens > 0
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for table, tokens, concurrency, previous, latency in zip(
        samples["table"],
        samples["total_tokens"],
        samples["concurrency"],
        samples["previous_prefill_tokens"],
        samples["latency_ns"],
        strict=True,
    ):
        if bool(table) == prefill and (prefill or not transition or (previous > 0) == after):
            cell = center(int(tokens), tokens_bucket_width), center(int(concurrency), concurrency_bucket_width)
            cells[cell].append(int(latency))
    at_tokens = center(sum(query.chunk_tokens) + query.num_decode_tokens, tokens_bucket_width)
    at_concurrency = center(query.concurrency, concurrency_bucket_width)
    residual = draw(key, step_index, 1, 0)
    all_tokens = [tokens for tokens, _ in cells]
    all_concurrency = [concurrency for _, concurrency in cells]
    if (at_tokens, at_concurrency) in cells:
        found = cells[at_tokens, at_concurrency]
        return found[index_below(residual, len(found))], EXACT, 0.0

    def square(cell: tuple[int, int]) -> float:
        dt = (cell[0] - at_tokens) / ((max(all_tokens) - min(all_tokens)) or 1)
        dc = (cell[1] - at_concurrency) / ((max(all_concurrency) - min(all_concurrency)) or 1)
        return dt * dt + dc * dc

    ranked = sorted(cells, key=lambda cell: (square(cell), cell))
    pool: list[tuple[int, int]] = []
    while len(pool) < min(max_buckets, len(ranked)) and sum(len(cells[cell]) for cell in pool) < min_samples:
        pool.append(ranked[len(pool)])
    weights = [1.0 / square(cell) for cell in pool]
    chosen = pool[-1]
    target = unit(draw(key, step_index, 2, 0)) * sum_in_order(weights)
    for number, cell in enumerate(pool):
        if target < sum_in_order(weights[: number + 1]):
            chosen = cell
            break
    inside = min(all_tokens) <= at_tokens <= max(all_tokens) and (
        min(all_concurrency) <= at_concurrency <= max(all_concurrency)
    )
    found = cells[chosen]
    latency = found[index_below(residual, len(found))]
    return latency, INTERPOLATED if inside else EXTRAPOLATED, math.sqrt(square(pool[0]))


def composed_answer(
    operators: Mapping[str, Grid],
    query: StepQuery,
    key: int,
    step_index: int,
    *,
    knowledge: Mapping[str, int] | None = None,
    ratios: Sequence[float] = (1.0,),
    factor: float = 1.0,
    **options: Any,
) -> tuple[float, int, float, int]:
    """Latency before rounding (ns), support, distance and knowledge of a step, in exact arithmetic.

    `operators` are grids {point: ns}, `knowledge` the Knowledge of all points of an operator, `options` those of
    ComposedLatency. `ratios` are float32 values.
    """
    known_of = knowledge or {}
    support, distance, known = EXACT, 0.0, 1

    def part(name: str, *point: int | Fraction) -> Fraction:
        nonlocal support, distance, known
        if name not in operators:
            return Fraction(0)
        cost, part_support, part_distance = grid_value(operators[name], [Fraction(x) for x in point])
        support = max(support, part_support)
        distance = max(distance, part_distance)
        known = max(known, known_of.get(name, 1))
        return cost

    def exact(name: str, default: float) -> Fraction:
        return Fraction(options.get(name, default))

    chunks = sorted(
        zip(query.chunk_tokens, query.chunk_context, strict=True), key=lambda c: (c[0] * (c[0] + 2 * c[1]), c[0])
    )[::-1]
    n, context, longest = query.num_decode_requests, query.decode_context_tokens, query.max_decode_context_tokens
    tokens = sum(query.chunk_tokens) + query.num_decode_tokens
    if not chunks:
        tokens = next((size for size in options.get("graph_capture_sizes", ()) if size >= tokens), tokens)
    base = part("dense_gemm", tokens) + part("dense_elementwise", tokens) + part("all_reduce", tokens)
    base += part("logits", query.num_decode_tokens + len(chunks))
    base += exact("host_ns_per_step", 0) + exact("host_ns_per_sequence", 0) * (n + len(chunks))
    for number, (chunk, history) in enumerate(chunks):
        cost = part("context_attention", chunk, history)
        base += cost if number == 0 else max(cost - exact("launch_floor_ns", 0), Fraction(0))
    if n:
        skew = exact("skew_mixed" if chunks else "skew_decode", 0)
        weight = exact("mixed_decode_factor", 1) if chunks else Fraction(1)
        at_mean = part("generation_attention", n, Fraction(context, n))
        base += weight * at_mean
        if skew:
            base += skew * (part("generation_attention", n, longest) - at_mean)
    if len(chunks) > 1 or (chunks and n) or query.num_decode_tokens > n:
        known = max(known, 3)
    known = max(known, {EXACT: 1, INTERPOLATED: 2, EXTRAPOLATED: 4}[support])
    ratio = ratios[index_below(draw(key, step_index, 1, 0), len(ratios))]
    return float(base * Fraction(factor) * Fraction(ratio)), support, distance, known


def grid_value(grid: Grid, point: Sequence[Fraction]) -> tuple[Fraction, int, float]:
    """Value, support and distance of a point: linear on each axis in turn, the last one outermost.

    Above an axis the line of the last two grid points goes on but never falls; below it the first value holds.
    """
    support, distance = EXACT, 0.0
    rows: dict[tuple[int, ...], Any] = dict(grid)
    for x in point:
        # Collapse the first remaining axis.
        axis = sorted({key[0] for key in rows})
        at = bisect_right(axis, x) - 1
        if x < axis[0]:
            support, distance = EXTRAPOLATED, max(distance, (float(x) - axis[0]) / -axis[0])
        elif x > axis[-1]:
            support, distance = EXTRAPOLATED, max(distance, (float(x) - axis[-1]) / axis[-1])
        elif x != axis[at]:
            support = max(support, INTERPOLATED)
        collapsed: dict[tuple[int, ...], Any] = {}
        for rest in {key[1:] for key in rows}:
            values = [Fraction(rows[position, *rest]) for position in axis]
            if x < axis[0]:
                collapsed[rest] = values[0]
            elif at == len(axis) - 1:
                slope = (values[at] - values[at - 1]) / (axis[at] - axis[at - 1])
                collapsed[rest] = values[at] + max(slope, Fraction(0)) * (x - axis[at])
            else:
                share = (x - axis[at]) / (axis[at + 1] - axis[at])
                collapsed[rest] = values[at] + (values[at + 1] - values[at]) * share
        rows = collapsed
    return rows[()], support, distance


def output_tokens(begins: Sequence[int], bins: Sequence[Sequence[float]], value: int, prompt_tokens: int) -> int:
    """Output tokens by the interpolated quantile of the prompt's bin."""
    chosen = [quantiles for begin, quantiles in zip(begins, bins, strict=True) if begin <= prompt_tokens][-1]
    share = unit(value)
    for left in range(len(chosen) - 1):
        low, high = left / (len(chosen) - 1), (left + 1) / (len(chosen) - 1)
        if low <= share <= high:
            part = (share - low) / (high - low)
            return max(1, math.floor(chosen[left] + (chosen[left + 1] - chosen[left]) * part + 0.5))
    return max(1, math.floor(chosen[-1] + 0.5))


def sum_in_order(values: Sequence[float]) -> float:
    """Left to right in doubles: `sum` compensates rounding from Python 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total
