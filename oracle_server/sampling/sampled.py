"""The sampled latency model: LLM-Emu's oracle (arXiv 2605.00616) with draws that are pure functions, and ranked
neighbours in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import BadStep
from oracle_server.sampling.answer import (
    KNOWLEDGE_EXTRAPOLATED,
    KNOWLEDGE_INTERPOLATED,
    KNOWLEDGE_MEASURED,
    SUPPORT_EXACT,
    SUPPORT_EXTRAPOLATED,
    SUPPORT_INTERPOLATED,
    Answer,
    DecodeRecord,
)
from oracle_server.sampling.buckets import ROW_FIELDS, TABLES
from oracle_server.sampling.draws import (
    DOMAIN_NEIGHBOR,
    DOMAIN_RESIDUAL,
    draw_u64,
    index_below_u64,
    signed,
    unit_u64,
)
from oracle_server.sampling.jit import compiled
from oracle_server.sampling.levels import LEVEL_FIELDS
from oracle_server.sampling.ranked import draw_ranked
from oracle_server.sampling.shape import StepQuery

_KNOWLEDGE: Final = (0, KNOWLEDGE_MEASURED, KNOWLEDGE_INTERPOLATED, KNOWLEDGE_EXTRAPOLATED)

_Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int, int]
_Tree = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]
# More samples than a pack can hold: pooling then ends at the number of buckets.
_NEVER_ENOUGH: Final = 1 << 40


class SampledOptions(NamedTuple):
    """How buckets are made and pooled; see latency.sampled of the manifest."""

    tokens_bucket_width: int = 1
    concurrency_bucket_width: int = 1
    min_samples: int = 30
    max_buckets: int = 32
    prefill_by_new_requests: bool = False
    transition: bool = False
    # joint, nearest or hierarchical.
    neighbors: str = "joint"
    # Of joint neighbours: pool exactly so many buckets; 0: by min_samples.
    fixed_buckets: int = 0
    # Of hierarchical neighbours; 0: context is no axis.
    context_bucket_width: int = 0


class SampledOracle:
    """A sampled pack ready to answer. Immutable: any thread may call it."""

    kind = "sampled"
    residual_pool: tuple[float, ...] = ()

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], options: SampledOptions, *, prep_ns: int = 0, copy_ns: int = 0
    ) -> None:
        self.prep_ns = prep_ns
        self.copy_ns = copy_ns
        self._options = options
        names = [name for name in TABLES if name != "after_prefill" or options.transition]
        self._tables: dict[str, _Table] = {}
        self._trees: dict[str, _Tree] = {}
        if options.neighbors == "joint":
            self._tables = {name: _table(arrays, name) for name in names}
        else:
            self._trees = {name: _tree(arrays, name) for name in names}
        self._min_samples = _NEVER_ENOUGH if options.fixed_buckets else options.min_samples
        self._max_buckets = options.fixed_buckets or options.max_buckets

    def answer(self, query: StepQuery, key: int, step_index: int, factor: float = 1.0) -> Answer:
        """Draw the latency of one step.

        `key` is `draws.engine_key`; `factor` multiplies the drawn sample (rounded half up, at least 1 ns).
        """
        chunk_tokens, chunk_context, _, decode_tokens, context, _, concurrency, previous_prefill, new_requests = query
        tokens = sum(chunk_tokens) + decode_tokens
        if tokens < 1:
            raise BadStep("a step without tokens has no latency; do not ask for one", field="shape")
        options = self._options
        if new_requests if options.prefill_by_new_requests else chunk_tokens:
            table = "prefill"
        elif options.transition and previous_prefill:
            table = "after_prefill"
        else:
            table = "decode"
        tokens_width = options.tokens_bucket_width
        width = options.concurrency_bucket_width
        tokens_center = tokens // tokens_width * tokens_width + tokens_width // 2
        concurrency_center = concurrency // width * width + width // 2
        if self._trees:
            width = options.context_bucket_width
            latency, support, distance = draw_ranked(
                *self._trees[table],
                tokens_center,
                concurrency_center,
                (context + sum(chunk_context)) // width * width + width // 2 if width else 0,
                options.neighbors == "hierarchical",
                signed(key),
                signed(step_index),
            )
        else:
            latency, support, distance = draw_sample(
                *self._tables[table],
                tokens_center,
                concurrency_center,
                self._min_samples,
                self._max_buckets,
                signed(key),
                signed(step_index),
            )
        if factor != 1.0:
            latency = max(1, math.floor(latency * factor + 0.5))
        return Answer(latency, support, distance, _KNOWLEDGE[support])

    def decode_record(
        self,
        num_decode_requests: int,
        context_tokens: int,
        max_context_tokens: int,
        factor: float = 1.0,
    ) -> DecodeRecord | None:
        """None: a bucket of samples is not a piece that is linear in context tokens."""
        return None

    def warm(self) -> None:
        """Compile the kernel, or load it from its cache, so that the first step does not wait for it."""
        if self._trees:
            draw_ranked(*self._trees["decode"], 1, 1, 0, True, 0, 0)
        else:
            draw_sample(*self._tables["decode"], 1, 1, 1, 1, 0, 0)


def _tree(arrays: Mapping[str, NDArray[Any]], name: str) -> _Tree:
    at, node, latency = (arrays[f"{name}.{field}"] for field in LEVEL_FIELDS)
    return _plain(at, np.float64), _plain(node, np.int64), _plain(latency, np.int64)


def _plain(array: NDArray[Any], kind: Any) -> NDArray[Any]:
    """A plain read-only array whatever it is mapped from: one type, so one compiled variant."""
    view = np.ascontiguousarray(np.asarray(array, dtype=kind)).view()
    view.flags.writeable = False
    return view


def _table(arrays: Mapping[str, NDArray[Any]], name: str) -> _Table:
    row_concurrency, row_begin, bucket_tokens, sample_begin, latency = (
        _plain(arrays[f"{name}.{field}"], np.int64) for field in ROW_FIELDS
    )
    return (
        row_concurrency,
        row_begin,
        bucket_tokens,
        sample_begin,
        latency,
        int(bucket_tokens.min()),
        int(bucket_tokens.max()),
    )


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
    rows = row_concurrency.size
    above = np.searchsorted(row_concurrency, concurrency)
    tokens_range = np.float64(max(1, tokens_high - tokens_low))
    concurrency_range = np.float64(max(1, row_concurrency[rows - 1] - row_concurrency[0]))
    residual = draw_u64(key, step_index, DOMAIN_RESIDUAL, 0)
    if above < rows and row_concurrency[above] == concurrency:
        at = row_begin[above] + np.searchsorted(bucket_tokens[row_begin[above] : row_begin[above + 1]], tokens)
        if at < row_begin[above + 1] and bucket_tokens[at] == tokens:
            count = sample_begin[at + 1] - sample_begin[at]
            return latency_ns[sample_begin[at] + index_below_u64(residual, count)], SUPPORT_EXACT, 0.0

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
            at = row_begin[row] + np.searchsorted(bucket_tokens[row_begin[row] : row_begin[row + 1]], tokens)
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
