"""What every latency model can be asked."""

from __future__ import annotations

from typing import Protocol

from oracle_server.sampling.answer import Answer, DecodeRecord
from oracle_server.sampling.shape import StepQuery


class Oracle(Protocol):
    """One pack compiled and ready to answer: `SampledOracle`, `ComposedOracle` or `HybridOracle`.

    Immutable and pure: the same arguments give the same bits in every process and thread.
    """

    @property
    def kind(self) -> str:
        """The latency model: sampled, composed or hybrid."""
        ...

    # Executor entry to first kernel on an idle device, and last kernel to visible result; 0 where the pack does not
    # know.
    prep_ns: int
    copy_ns: int

    @property
    def residual_pool(self) -> tuple[float, ...]:
        """Ratios a decode record's base is multiplied by, as float32 values; empty where there are no records."""
        ...

    def answer(self, query: StepQuery, key: int, step_index: int, factor: float = 1.0) -> Answer:
        """Latency of one step, times `factor`; `key` is `draws.engine_key`. Raises BadStep if there is no token."""
        ...

    def decode_record(
        self, num_decode_requests: int, context_tokens: int, max_context_tokens: int, factor: float = 1.0
    ) -> DecodeRecord | None:
        """The piece that a decode-only step without draft tokens is answered from; None where the model has none."""
        ...

    def warm(self) -> None:
        """Compile or load every kernel."""
        ...
