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
    Answer,
    DecodeRecord,
)
from oracle_server.sampling.buckets import ROW_FIELDS, TABLES
from oracle_server.sampling.draws import signed
from oracle_server.sampling.joint import draw_sample, draw_samples, find_bucket
from oracle_server.sampling.levels import BEGIN, END, LEVEL_FIELDS, bucket_center
from oracle_server.sampling.ranked import draw_ranked, draw_ranked_many, find_level
from oracle_server.sampling.shape import CONTEXT_TOKENS_LIMIT, StepQuery

_KNOWLEDGE: Final = (0, KNOWLEDGE_MEASURED, KNOWLEDGE_INTERPOLATED, KNOWLEDGE_EXTRAPOLATED)

_Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int, int]
_Tree = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]
# More samples than a pack can hold: pooling then ends at the number of buckets.
_NEVER_ENOUGH: Final = 1 << 40
# What a lease carries: entries, and their range on the wire.
_POOL_LIMIT: Final = 256
_POOL_LATENCY_LIMIT: Final = 1 << 63


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
            latency = _times(latency, factor)
        return Answer(latency, support, distance, _KNOWLEDGE[support])

    def answer_many(
        self,
        table: str,
        tokens: NDArray[np.int64],
        concurrency: NDArray[np.int64],
        context: NDArray[np.int64],
        key: int,
        step_index: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Latency (ns), support and distance of many steps of one engine, for whole traces: a call per step costs ten
        times the draw.

        `table` is decode, prefill or, of a pack with transition, after_prefill; the arrays are int64 of one length,
        what `answer` makes of a step: its tokens, concurrency and context tokens, chunks included. The bits are those
        of `answer`. Raises BadStep where a step has no token.
        """
        if tokens.size and tokens.min() < 1:
            raise BadStep("a step without tokens has no latency; do not ask for one", field="shape")
        options = self._options
        drawn_ns, support = np.empty_like(tokens), np.empty_like(tokens)
        distance = np.empty(tokens.size)
        tokens = bucket_center(tokens, options.tokens_bucket_width)
        concurrency = bucket_center(concurrency, options.concurrency_bucket_width)
        if self._trees:
            width = options.context_bucket_width
            context = bucket_center(context, width) if width else np.zeros_like(tokens)
            draw_ranked_many(
                *self._trees[table],
                tokens,
                concurrency,
                context,
                options.neighbors == "hierarchical",
                signed(key),
                step_index,
                drawn_ns,
                support,
                distance,
            )
        else:
            draw_samples(
                *self._tables[table],
                tokens,
                concurrency,
                self._min_samples,
                self._max_buckets,
                signed(key),
                step_index,
                drawn_ns,
                support,
                distance,
            )
        return drawn_ns, support, distance

    def decode_record(
        self,
        num_decode_requests: int,
        context_tokens: int,
        max_context_tokens: int,
        factor: float = 1.0,
    ) -> DecodeRecord | None:
        """The exact cell of a decode-only step without draft tokens, its samples times `factor` in drawing order.

        None where there is none, as what neighbours answer is two draws, and where it has more than 256 samples. With
        `transition` it is the cell of steps that do not follow a prefill.
        """
        options = self._options
        tokens_width = options.tokens_bucket_width
        width = options.concurrency_bucket_width
        tokens_center = num_decode_requests // tokens_width * tokens_width + tokens_width // 2
        concurrency_center = num_decode_requests // width * width + width // 2
        width = options.context_bucket_width if self._trees else 0
        context_begin = context_tokens // width * width if width else 0
        if self._trees:
            at, node, latency = self._trees["decode"]
            found = find_level(at, node, tokens_center, concurrency_center, context_begin + width // 2)
            begin, end = (node[found, BEGIN], node[found, END]) if found >= 0 else (0, 0)
        else:
            rows, row_begin, tokens, sample_begin, latency, _, _ = self._tables["decode"]
            found = find_bucket(rows, row_begin, tokens, tokens_center, concurrency_center)
            begin, end = (sample_begin[found], sample_begin[found + 1]) if found >= 0 else (0, 0)
        if not 0 < end - begin <= _POOL_LIMIT:
            return None
        pool = latency[begin:end].tolist()
        if factor != 1.0:
            pool = [_times(sample, factor) for sample in pool]
        if max(pool) >= _POOL_LATENCY_LIMIT:
            return None
        return DecodeRecord(
            num_decode_requests,
            context_begin,
            context_begin + width if width else CONTEXT_TOKENS_LIMIT,
            0,
            CONTEXT_TOKENS_LIMIT,
            0.0,
            0.0,
            0.0,
            SUPPORT_EXACT,
            KNOWLEDGE_MEASURED,
            0.0,
            options.transition,
            tuple(pool),
        )

    def warm(self) -> None:
        """Compile the kernel, or load it from its cache, so that the first step does not wait for it."""
        if self._trees:
            draw_ranked(*self._trees["decode"], 1, 1, 0, True, 0, 0)
        else:
            draw_sample(*self._tables["decode"], 1, 1, 1, 1, 0, 0)
        self.decode_record(1, 1, 1)


def _times(latency_ns: int, factor: float) -> int:
    return max(1, math.floor(latency_ns * factor + 0.5))


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
