"""The hybrid latency model: physics terms, times a ratio learned from measured steps, times a residual sample.

    latency = max(1, floor(physics(shape) * ratio(shape) * residual + 0.5))

The ratio goes to 1 with the distance from measured steps, so far from them the answer is physics alone. For decode-only
steps it is a table over decode requests and mean context whose cells are linear in context (README.md): their latency
is computed from a DecodeRecord, the piece a lease carries, and from nothing else. A step without chunks right after one
with some takes `after_prefill_factor` times as long; no lease holds for it then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import BadStep
from oracle_server.sampling.answer import Answer, DecodeRecord
from oracle_server.sampling.draws import signed
from oracle_server.sampling.hybrid_kernels import box_of, decode_latency, decode_piece, mixed_latency
from oracle_server.sampling.shape import StepQuery

_LATENCY_LIMIT = float(1 << 62)


class HybridOptions(NamedTuple):
    """How far a measured step speaks for others; see latency.hybrid of the manifest."""

    shrink_distance: float = 0.7
    exact_distance: float = 0.1
    neighbors: int = 8
    max_context_edge: int = 1 << 53
    graph_capture_sizes: tuple[int, ...] = ()
    after_prefill_factor: float = 1.0


class HybridOracle:
    """A hybrid pack ready to answer. Immutable: any thread may call it."""

    kind = "hybrid"

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], options: HybridOptions, *, prep_ns: int = 0, copy_ns: int = 0
    ) -> None:
        self.prep_ns = prep_ns
        self.copy_ns = copy_ns
        ratios = np.asarray(arrays["residuals"], dtype=np.float32)
        # The pool as a lease sends it: float32 values, here and in the kernel widened to double.
        self.residual_pool: tuple[float, ...] = tuple(ratios.tolist())
        self._residuals = _frozen(ratios, np.float64)
        self._arrays = (
            _frozen(arrays["decode_requests"], np.int64),
            _frozen(arrays["decode_context"], np.int64),
            _frozen(arrays["decode_ratio"], np.float64),
            _frozen(arrays["decode_support"], np.int64),
            _frozen(arrays["decode_distance"], np.float64),
            _frozen(arrays["term_feature"], np.int64),
            _frozen(arrays["term_above"], np.float64),
            _frozen(arrays["term_ns"], np.float64),
            _frozen(np.array(sorted(options.graph_capture_sizes)), np.int64),
            _frozen(np.array(options[:4], dtype=np.float64), np.float64),
        )
        self._after_prefill_factor = options.after_prefill_factor
        self._mixed = (
            _frozen(arrays["mixed_support"], np.float64),
            _frozen(box_of(arrays["mixed_support"]), np.float64),
            _frozen(arrays["mixed_residual"], np.float64),
        )

    def answer(self, query: StepQuery, key: int, step_index: int, factor: float = 1.0) -> Answer:
        """Latency of one step.

        `key` is `draws.engine_key`; `factor` multiplies the coefficients of the record, or the cost of another step,
        before the residual, exactly as in `decode_record(..., factor)`.
        """
        chunk_tokens, chunk_context, requests, decode_tokens, context, longest, _, previous_prefill, _ = query
        if previous_prefill > 0 and not chunk_tokens:
            factor *= self._after_prefill_factor
        if not chunk_tokens and decode_tokens == requests and requests:
            latency, support, distance, knowledge = decode_latency(
                *self._arrays, self._residuals, requests, context, longest, signed(key), signed(step_index), factor
            )
        elif chunk_tokens or decode_tokens:
            latency, support, distance, knowledge = mixed_latency(
                *self._arrays,
                *self._mixed,
                len(chunk_tokens),
                sum(chunk_tokens),
                sum(chunk_context),
                attention_pairs(chunk_tokens, chunk_context),
                requests,
                decode_tokens,
                context,
                longest,
                signed(key),
                signed(step_index),
                factor,
            )
        else:
            raise BadStep("a step without tokens has no latency; do not ask for one", field="shape")
        if not latency < _LATENCY_LIMIT:
            raise BadStep(f"the latency of {query} leaves the range of 2^62 ns", field="shape")
        return Answer(int(latency), support, distance, knowledge)

    def decode_record(
        self, num_decode_requests: int, context_tokens: int, max_context_tokens: int, factor: float = 1.0
    ) -> DecodeRecord | None:
        """The piece that holds a decode-only step of at least one request without draft tokens."""
        piece = decode_piece(*self._arrays, num_decode_requests, context_tokens, max_context_tokens, factor)
        return DecodeRecord(num_decode_requests, *piece, not_after_prefill=self._after_prefill_factor != 1.0)

    def warm(self) -> None:
        """Compile the kernels, or load them from their cache, so that the first step does not wait for them."""
        decode_latency(*self._arrays, self._residuals, 1, 1, 1, 0, 0, 1.0)
        decode_piece(*self._arrays, 1, 1, 1, 1.0)
        mixed_latency(*self._arrays, *self._mixed, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1.0)


def attention_pairs(chunk_tokens: tuple[int, ...], chunk_context: tuple[int, ...]) -> int:
    """Query-key pairs of prefill attention: each token reads its history and the chunk up to itself."""
    return sum(
        tokens * history + tokens * (tokens + 1) // 2
        for tokens, history in zip(chunk_tokens, chunk_context, strict=True)
    )


def _frozen(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """A plain read-only array whatever it is mapped from: one type, so one compiled variant of each kernel."""
    view = np.ascontiguousarray(np.asarray(array), dtype=dtype).view()
    view.flags.writeable = False
    return view
