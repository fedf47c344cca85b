"""The slow obvious twin of every kernel: plain Python over plain data, written from the rules and not from the
kernels."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from msgspec.structs import replace

from oracle_server.sampling.draws import draw, fraction_draw, index_below, unit
from oracle_server.sampling.shape import StepQuery
from oracle_server.state.binding import Overlay
from oracle_server.state.identity import EngineIdentity

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
    fixed_buckets: int = 0,
) -> tuple[int, int, float]:
    """Latency, support and distance by LLM-Emu's rule, K = auto or fixed, over the rows of samples.parquet."""

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
    pool: list[tuple[int, int]] = ranked[:fixed_buckets]
    if not fixed_buckets:
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


def ranked_answer(
    samples: Mapping[str, Any],
    query: StepQuery,
    key: int,
    step_index: int,
    *,
    neighbors: str,
    tokens_bucket_width: int = 1,
    concurrency_bucket_width: int = 1,
    context_bucket_width: int = 0,
    min_samples: int = 30,
    max_buckets: int = 0,
    table_rule: str = "prefill_tokens",
    transition: bool = False,
) -> tuple[int, int, float]:
    """Latency, support and distance by the nearest tokens, then concurrency, then context."""

    def place(tokens: int, concurrency: int, context: int) -> tuple[int, ...]:
        widths = (tokens_bucket_width, concurrency_bucket_width, context_bucket_width)
        values = (tokens, concurrency, context)
        return tuple(x // width * width + width // 2 if width else 0 for x, width in zip(values, widths, strict=True))

    prefill = bool(query.chunk_tokens if table_rule == "prefill_tokens" else query.num_new_requests)
    after = transition and not prefill and query.previous_prefill_tokens > 0
    columns = ("table", "previous_prefill_tokens", "total_tokens", "concurrency", "context_tokens", "latency_ns")
    rows = [
        (place(tokens, concurrency, context), latency)
        for table, previous, tokens, concurrency, context, latency in zip(
            *(samples[name].tolist() for name in columns), strict=True
        )
        if bool(table) == prefill and (prefill or not transition or (previous > 0) == after)
    ]
    wanted = place(
        sum(query.chunk_tokens) + query.num_decode_tokens,
        query.concurrency,
        query.decode_context_tokens + sum(query.chunk_context),
    )
    floor = min_samples if neighbors == "hierarchical" else 1
    exact, outside, squares = True, False, 0.0
    for axis, span in enumerate((2.0, 2.0, 2.0) if after else (1.25, 1.25, 2.0)):
        x = wanted[axis]
        held: dict[int, int] = defaultdict(int)
        for point, _ in rows:
            held[point[axis]] += 1
        levels: list[list[int]] = []
        for value in sorted(held):
            pooled = sum(held[other] for other in levels[-1]) if levels else floor
            if pooled >= floor or held[value] >= floor or value > levels[-1][0] * span:
                levels.append([])
            levels[-1].append(value)
        mean = [sum(v * held[v] for v in level) / sum(held[v] for v in level) for level in levels]
        outside = outside or not min(held) <= x <= max(held)
        above = next((number for number, at in enumerate(mean) if at >= x), None)
        if above is None:
            chosen = len(levels) - 1
        elif above == 0 or mean[above] == x:
            chosen = above
        elif neighbors == "nearest":
            chosen = above - 1 if x - mean[above - 1] <= mean[above] - x else above
        else:
            share = unit(draw(key, step_index, 2, axis)) * (mean[above] - mean[above - 1])
            chosen = above if share < x - mean[above - 1] else above - 1
        exact = exact and levels[chosen] == [x]
        if mean[chosen] != x:
            gap = abs(mean[chosen] - x) / max(mean[chosen], x)
            squares += gap * gap
        rows = [row for row in rows if row[0][axis] in levels[chosen]]
    latency = rows[index_below(draw(key, step_index, 1, 0), len(rows))][1]
    return latency, EXACT if exact else (EXTRAPOLATED if outside else INTERPOLATED), math.sqrt(squares)


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
    base += part("moe", tokens) + part("expert_exchange", tokens)
    base += part("logits", query.num_decode_tokens + len(chunks)) + part(
        "sampler", query.num_decode_tokens + len(chunks)
    )
    base += exact("host_ns_per_step", 0) + exact("host_ns_per_sequence", 0) * (n + len(chunks))
    together = "mixed_attention" in operators and n and chunks
    for number, (chunk, history) in enumerate(chunks):
        if number == 0 and together:
            at_mean = part("mixed_attention", chunk, history, n, Fraction(context, n))
            base += at_mean
            if skew := exact("skew_mixed", 0):
                base += skew * max(part("mixed_attention", chunk, history, n, longest) - at_mean, Fraction(0))
        else:
            cost = part("context_attention", chunk, history)
            base += cost if number == 0 else max(cost - exact("launch_floor_ns", 0), Fraction(0))
    if n and not together:
        skew = exact("skew_mixed" if chunks else "skew_decode", 0)
        weight = exact("mixed_decode_factor", 1) if chunks else Fraction(1)
        at_mean = part("generation_attention", n, Fraction(context, n))
        base += weight * at_mean
        if skew:
            base += skew * (part("generation_attention", n, longest) - at_mean)
    if len(chunks) > 1 or (chunks and n and not together) or query.num_decode_tokens > n:
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


def hybrid_answer(
    terms: Sequence[tuple[str, float, float]],
    arrays: Mapping[str, Any],
    query: StepQuery,
    key: int,
    step_index: int,
    *,
    ratios: Sequence[float] = (1.0,),
    shrink_distance: float = 0.7,
    exact_distance: float = 0.1,
    neighbors: int = 8,
    max_context_edge: int = 1 << 53,
    graph_capture_sizes: Sequence[int] = (),
    after_prefill_factor: float = 1.0,
) -> tuple[float, int, float, int]:
    """Latency (before rounding), support, distance and knowledge by the rules of the hybrid model.

    `terms` are (name, above, ns), `arrays` those of model.parquet.
    """

    def physics(chunks: int, requests: int, decode_tokens: int, context: float, longest: float) -> float:
        tokens = sum(query.chunk_tokens) + decode_tokens
        if not chunks:
            tokens = next((size for size in sorted(graph_capture_sizes) if size >= tokens), tokens)
        amounts = {
            "step": 1.0,
            "mixed_step": 1.0 if chunks else 0.0,
            "total_tokens": tokens,
            "decode_requests": requests,
            "decode_context_tokens": context,
            "max_decode_context_tokens": longest,
            "prefill_chunks": chunks,
            "prefill_tokens": sum(query.chunk_tokens),
            "prefill_history_tokens": sum(query.chunk_context),
            "prefill_attention_pairs": pairs,
        }
        return sum(ns * max(0.0, amounts[name] - above) for name, above, ns in terms)

    pairs = sum(t * h + t * (t + 1) // 2 for t, h in zip(query.chunk_tokens, query.chunk_context, strict=True))
    chunks, n, drafted = len(query.chunk_tokens), query.num_decode_requests, query.num_decode_tokens
    context, longest = query.decode_context_tokens, query.max_decode_context_tokens
    known_of = {EXACT: 1, INTERPOLATED: 2, EXTRAPOLATED: 4}
    if not chunks:
        requests_edges, context_edges = [[int(e) for e in arrays[f"decode_{name}"]] for name in ("requests", "context")]
        mean = context / n
        i = bisect_right(requests_edges, n) - 1
        j = bisect_right(context_edges, context // n) - 1

        def cost(at: int) -> float:
            here, there = arrays["decode_ratio"][i][at], arrays["decode_ratio"][min(i + 1, len(requests_edges) - 1)][at]
            share = 0.0
            if i + 1 < len(requests_edges):
                share = (n - requests_edges[i]) / (requests_edges[i + 1] - requests_edges[i])
            kv = context_edges[at]
            return float((here + share * (there - here)) * physics(0, n, n, n * kv, kv))

        slope_of_longest = sum(ns for name, _, ns in terms if name == "max_decode_context_tokens")
        if j + 1 < len(context_edges):
            low, high = context_edges[j], context_edges[j + 1]
            base = cost(j) + (cost(j + 1) - cost(j)) * (mean - low) / (high - low)
        else:
            base = cost(j) * physics(0, n, n, context, mean) / physics(0, n, n, n * context_edges[j], context_edges[j])
        base += slope_of_longest * (longest - mean)
        support = int(arrays["decode_support"][i][j])
        if slope_of_longest and longest >= max_context_edge:
            support = EXTRAPOLATED
        known = known_of[support]
        pool = ratios
        if drafted > n:
            base += physics(0, n, drafted, 0.0, 0.0) - physics(0, n, n, 0.0, 0.0)
            known = max(known, 3)
            pool = list(arrays["mixed_residual"])
        if query.previous_prefill_tokens > 0:
            base *= after_prefill_factor
        return (
            base * pool[index_below(draw(key, step_index, 1, 0), len(pool))],
            support,
            float(arrays["decode_distance"][i][j]),
            known,
        )
    point = (
        math.log(sum(query.chunk_tokens)),
        math.log(chunks),
        math.log(pairs) / 2,
        math.log(1 + n),
        math.log(1 + context / max(1, n)),
    )
    measured = [([float(x) for x in row[:5]], float(row[5])) for row in arrays["mixed_support"]]
    near = sorted((math.dist(point, place), ratio) for place, ratio in measured)[:neighbors]
    weights = [1 / (d * d + 0.01) for d, _ in near]
    mean_ratio = sum(w * (ratio - 1) for w, (_, ratio) in zip(weights, near, strict=True)) / sum(weights)
    d = near[0][0]
    learned = 1 + math.exp(-((d / shrink_distance) ** 2)) * mean_ratio
    inside = all(
        min(place[k] for place, _ in measured) - exact_distance
        <= point[k]
        <= max(place[k] for place, _ in measured) + exact_distance
        for k in range(5)
    )
    support = EXTRAPOLATED
    if inside and d <= shrink_distance:
        support = EXACT if d <= exact_distance else INTERPOLATED
    pool = list(arrays["mixed_residual"])
    latency = physics(chunks, n, drafted, context, longest) * learned
    latency *= pool[index_below(draw(key, step_index, 1, 0), len(pool))]
    known = max(known_of[support], 3 if drafted > n else 1)
    return latency, support, 0.0 if support == EXACT else d, known


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


def overlay_effects(
    overlays: Sequence[Overlay],
    identity: EngineIdentity,
    key: int,
    time_scale: float,
    step_index: int,
    device_time_ns: int,
) -> tuple[float, float, int, bool]:
    """(Constant factor, factor of the step, stalls in ns, whether it fails), as the comments of Overlay say."""
    plain = Overlay()
    only_a_factor = [
        replace(overlay, slow_down_factor=1.0, labels={}, fraction=0.0, fraction_salt="", engine_ids=(), stall_ns=0)
        == plain
        for overlay in overlays
    ]
    server = identity.engine_id.split("/dp")[0]
    constant, factor, stalls, fails = 1.0, 1.0, 0, False
    for place, overlay in enumerate(overlays):
        has_labels = all(identity.labels.get(name) == value for name, value in overlay.labels.items())
        below = overlay.fraction == 0 or fraction_draw(overlay.fraction_salt, server) < overlay.fraction
        is_meant = not overlay.engine_ids or identity.engine_id in overlay.engine_ids or server in overlay.engine_ids
        if not (has_labels and is_meant and below):
            continue
        if only_a_factor[place]:
            constant *= overlay.slow_down_factor
            continue
        if not overlay.begin_step_index <= step_index < (overlay.end_step_index or math.inf):
            continue
        if not overlay.begin_device_time_ns <= device_time_ns < (overlay.end_device_time_ns or math.inf):
            continue
        factor *= overlay.slow_down_factor
        factor *= 1 + overlay.degradation_per_hour * ((device_time_ns - overlay.begin_device_time_ns) / 3.6e12)
        stall_draw, error_draw = (draw(key, step_index, 5, 2 * place + i) for i in range(2))
        if overlay.stall_every_steps and index_below(stall_draw, overlay.stall_every_steps) == 0:
            stalls += overlay.stall_ns if time_scale == 1 else math.floor(overlay.stall_ns * time_scale + 0.5)
        if overlay.error_every_steps and index_below(error_draw, overlay.error_every_steps) == 0:
            fails = True
    return constant, factor, stalls, fails
