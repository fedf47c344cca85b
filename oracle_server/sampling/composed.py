"""The composed latency model: measured operators summed, each linear on its grid.

A step costs dense(T) + experts(T) + logits(S) + sampler(S) + host + attention, times a residual. T is the tokens,
padded to the next graph capture size in decode-only steps; S the rows of the logits matrix; g(n, kv) the attention of n
decode requests, m(n, kv) that of the largest chunk and n decode requests together.
    decode-only   attention = (1 - skew) g(n, mean) + skew g(n, max)
    mixed         attention = largest prefill chunk + max(0, chunk - launch floor) of the others
                            + factor g(n, mean) + skew_mixed (g(n, max) - g(n, mean))
    mixed, where the pack has mixed_attention
                  attention = m(n, mean) + skew_mixed max(0, m(n, max) - m(n, mean))
                            + max(0, chunk - launch floor) of the others
Decode-only latency is computed from a DecodeRecord, the piece a lease carries, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import BadStep
from oracle_server.sampling.answer import Answer, DecodeRecord
from oracle_server.sampling.composed_kernels import decode_latency, decode_piece, mixed_latency
from oracle_server.sampling.draws import signed
from oracle_server.sampling.grids import AXIS1, OPERATOR_AXES
from oracle_server.sampling.shape import CONTEXT_TOKENS_LIMIT, StepQuery

_LATENCY_LIMIT = float(1 << 62)


class ComposedOptions(NamedTuple):
    """How operators add up; see latency.composed of the manifest."""

    skew_decode: float = 0.0
    skew_mixed: float = 0.0
    mixed_decode_factor: float = 1.0
    launch_floor_ns: float = 0.0
    host_ns_per_step: float = 0.0
    host_ns_per_sequence: float = 0.0
    graph_capture_sizes: tuple[int, ...] = ()


class ComposedOracle:
    """A composed pack ready to answer. Immutable: any thread may call it."""

    kind = "composed"

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], options: ComposedOptions, *, prep_ns: int = 0, copy_ns: int = 0
    ) -> None:
        self.prep_ns = prep_ns
        self.copy_ns = copy_ns
        ratios = np.asarray(arrays["residuals"], dtype=np.float32)
        # The pool as a lease sends it: float32 values, here and in the kernel widened to double.
        self.residual_pool: tuple[float, ...] = tuple(ratios.tolist())
        self._arrays = (
            _frozen(arrays["layout"], np.int64),
            _frozen(arrays["grid"], np.float64),
            _frozen(arrays["knowledge"], np.int8),
            _frozen(np.array(sorted(options.graph_capture_sizes)), np.int64),
            _frozen(np.array(options[:6]), np.float64),
        )
        self._residuals = _frozen(ratios, np.float64)
        self._skewed = options.skew_decode > 0.0
        row = arrays["layout"][list(OPERATOR_AXES).index("generation_attention")]
        self._least_context = float(arrays["grid"][row[AXIS1]])

    def answer(self, query: StepQuery, key: int, step_index: int, factor: float = 1.0) -> Answer:
        """Latency of one step.

        `key` is `draws.engine_key`; `factor` multiplies the coefficients of the record, or the sum of a mixed step,
        before the residual, exactly as in `decode_record(..., factor)`.
        """
        chunk_tokens, chunk_context, requests, decode_tokens, context, longest, _, _, _ = query
        if not chunk_tokens and decode_tokens == requests and requests:
            latency, support, distance, knowledge = decode_latency(
                *self._arrays, self._residuals, requests, context, longest, signed(key), signed(step_index), factor
            )
        elif chunk_tokens or decode_tokens:
            latency, support, distance, knowledge = mixed_latency(
                *self._arrays,
                self._residuals,
                _largest_first(chunk_tokens, chunk_context),
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
        outside = self._is_outside(*piece[:2]) or (self._skewed and self._is_outside(*piece[2:4]))
        return DecodeRecord(num_decode_requests, *piece[:9], None if outside else piece[9])

    def _is_outside(self, begin: int, end: int) -> bool:
        """Whether an interval of context lies beyond the grid: from there on the distance grows with the context."""
        return end == CONTEXT_TOKENS_LIMIT or (begin == 0 and self._least_context > 0)

    def warm(self) -> None:
        """Compile the kernels, or load them from their cache, so that the first step does not wait for them."""
        decode_latency(*self._arrays, self._residuals, 1, 1, 1, 0, 0, 1.0)
        decode_piece(*self._arrays, 1, 1, 1, 1.0)
        mixed_latency(*self._arrays, self._residuals, np.ones((1, 2), dtype=np.int64), 1, 1, 1, 1, 0, 0, 1.0)


def _largest_first(chunk_tokens: tuple[int, ...], chunk_context: tuple[int, ...]) -> NDArray[np.int64]:
    """Chunks as int64[C, 2], in one order whatever the scheduler's: sums of doubles depend on it."""
    chunks = np.empty((len(chunk_tokens), 2), np.int64)
    if len(chunk_tokens) == 1:
        # Most steps with chunks; item by item it is a quarter of what sorting and making an array of tuples take.
        chunks[0, 0], chunks[0, 1] = chunk_tokens[0], chunk_context[0]
    elif chunk_tokens:
        pairs = zip(chunk_tokens, chunk_context, strict=True)
        chunks[:] = sorted(pairs, key=lambda c: (c[0] * (c[0] + 2 * c[1]), c[0]), reverse=True)
    return chunks


def _frozen(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """A plain read-only array whatever it is mapped from: one type, so one compiled variant of each kernel."""
    view = np.ascontiguousarray(np.asarray(array), dtype=dtype).view()
    view.flags.writeable = False
    return view
