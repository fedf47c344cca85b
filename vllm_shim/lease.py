"""Pieces of the latency model the oracle has handed over: decode-only steps inside one never leave the process."""

from array import array
from collections.abc import Sequence
from math import floor
from typing import Any

from step_oracle.v1 import step_pb2 as pb
from vllm_shim.draws import StepDraws

_DOMAIN_RESIDUAL = 1
# Pieces an engine keeps; one takes about 500 bytes, a pool of 256 ratios 8 KiB, one of 256 latencies 2 KiB.
_MOST_LEASES = 4096
_NUMBERS = (
    *("num_decode_requests", "intercept_ns", "slope_ns_per_context_token", "slope_ns_per_max_context_token"),
    *("context_tokens_begin", "context_tokens_end", "max_context_tokens_begin", "max_context_tokens_end"),
    *("generation", "not_after_prefill", "prep_ns", "copy_ns", "host_ns", "support"),
)
_OF_THE_REPLY = ("generation", "prep_ns", "copy_ns", "host_ns", "support", "knowledge", "support_distance")


class HeldLease:
    """A Lease as plain values under the same names: reading a message field by field costs more than the answer."""

    __slots__ = (*_NUMBERS, "draws", "latency_pool_ns", "reply", "residual_pool")

    def __init__(self, lease: pb.Lease, residual_pool: Sequence[float], draws: StepDraws) -> None:
        self.draws = draws
        for name in _NUMBERS:
            setattr(self, name, getattr(lease, name))
        # The second one is of this lease alone; plain integers would take five times the room.
        self.residual_pool, self.latency_pool_ns = residual_pool, array("Q", lease.latency_pool_ns)
        # Every answer but for its step and its latency.
        self.reply = pb.StepReply(
            generated_tokens=lease.num_decode_requests, **{name: getattr(lease, name) for name in _OF_THE_REPLY}
        )


class LeaseTable:
    """The leases of one generation, from whichever replica. Owned by one thread; bounded."""

    def __init__(self) -> None:
        # By number of requests, the newest first.
        self._held: dict[int, list[Any]] = {}
        self._pools: dict[int, tuple[float, ...]] = {}
        # Of this engine, so the same for all its leases, unless the seed changes.
        self._draws = StepDraws(0, _DOMAIN_RESIDUAL)
        self._size = 0

    def take(self, lease: pb.Lease) -> None:
        """Keeps a lease; one whose pool is not known any more is of no use."""
        if lease.residual_pool:
            self._pools[lease.pool_id] = tuple(lease.residual_pool)
        if self._size == _MOST_LEASES:
            self._held, self._size = {}, 0
        if lease.draw_key != self._draws.key:
            self._draws = StepDraws(lease.draw_key, _DOMAIN_RESIDUAL)
        if (pool := self._pools.get(lease.pool_id, ())) or lease.latency_pool_ns:
            held = HeldLease(lease, pool, self._draws)
            self._held.setdefault(lease.num_decode_requests, []).insert(0, held)
            self._size += 1

    def find(
        self, num_decode_requests: int, context_tokens: int, max_context_tokens: int, previous_prefill_tokens: int
    ) -> Any:
        """The HeldLease for a decode-only step without draft tokens; None: ask the oracle."""
        for lease in self._held.get(num_decode_requests, ()):
            if (
                lease.context_tokens_begin <= context_tokens < lease.context_tokens_end
                and lease.max_context_tokens_begin <= max_context_tokens < lease.max_context_tokens_end
            ):
                return None if previous_prefill_tokens and lease.not_after_prefill else lease
        return None

    def clear(self) -> None:
        """Another generation, or a stream that broke: nothing that was granted holds any more."""
        self._held, self._pools, self._size = {}, {}, 0


def leased_latency_ns(lease: Any, step_index: int, context_tokens: int, max_context_tokens: int) -> int:
    """The expression of step.proto's Lease: Python floats are IEEE doubles and nothing is fused."""
    pool = lease.latency_pool_ns or lease.residual_pool
    drawn = pool[((lease.draws.of(step_index) >> 32) * len(pool)) >> 32]
    if lease.latency_pool_ns:
        return drawn
    base = lease.intercept_ns + lease.slope_ns_per_context_token * context_tokens
    base += lease.slope_ns_per_max_context_token * max_context_tokens
    return max(1, floor(base * drawn + 0.5))


class LeasedReply:
    """What the server would have sent to a step of the lease: the fields that an engine reads, as StepReply names them.

    Making a message and reading it field by field costs more than the answer.
    """

    __slots__ = ("_lease", "copy_ns", "generation", "host_ns", "latency_ns", "prep_ns", "step_index", "support")

    injected_error = False
    accepted_draft_tokens: Sequence[int] = ()
    target_output_tokens: Sequence[pb.TargetOutputTokens] = ()

    def __init__(self, lease: Any, step_index: int, context_tokens: int, max_context_tokens: int) -> None:
        self._lease = lease
        self.step_index = step_index
        self.latency_ns = (leased_latency_ns(lease, step_index, context_tokens, max_context_tokens),)
        self.prep_ns, self.copy_ns, self.host_ns = lease.prep_ns, lease.copy_ns, lease.host_ns
        self.generation, self.support = lease.generation, lease.support

    def message(self) -> pb.StepReply:
        """The message itself."""
        reply = pb.StepReply(step_index=self.step_index, latency_ns=self.latency_ns)
        reply.MergeFrom(self._lease.reply)
        return reply


Reply = pb.StepReply | LeasedReply


def message_of(reply: Reply) -> pb.StepReply:
    """The answer as a message, wherever it is from."""
    return reply.message() if isinstance(reply, LeasedReply) else reply
