"""The oracle in the engine's own process: the server's answers without the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from oracle_server.errors import AcceptanceUnknown, SupportRefused
from oracle_server.sampling import draws
from oracle_server.sampling.answer import SUPPORT_EXTRAPOLATED
from oracle_server.sampling.oracle import Oracle
from oracle_server.sampling.shape import StepQuery
from oracle_server.sampling.wake import WakeCurve
from step_oracle.v1 import step_pb2 as pb
from vllm_shim.lease import message_of
from vllm_shim.stream import PendingStep

NO_WAKE = WakeCurve(())
_NONE: tuple[int, ...] = ()
# vLLM's dummy run has one token; there is no step without any context, so it reads its own.
_DUMMY = StepQuery(_NONE, _NONE, 1, 1, 1, 1, 1, 0, 0)


@dataclass(slots=True)
class SupportCounts:
    """Steps and device time by the support of their answers (numbers of step.proto)."""

    steps: dict[int, int] = field(default_factory=dict)
    device_ns: dict[int, int] = field(default_factory=dict)
    knowledge_steps: dict[int, int] = field(default_factory=dict)

    def add(self, latency_ns: int, support: int, knowledge: int) -> None:
        self.steps[support] = self.steps.get(support, 0) + 1
        self.device_ns[support] = self.device_ns.get(support, 0) + latency_ns
        self.knowledge_steps[knowledge] = self.knowledge_steps.get(knowledge, 0) + 1


class LocalOracle:
    """Takes the place of the shim's stream: every step is answered where it is submitted. Engine thread only.

    Answers are the server's for the same pack, seed and engine id, under a binding with nothing else in it.
    """

    def __init__(
        self,
        oracle: Oracle,
        *,
        seed: int,
        engine_id: str,
        refuse_extrapolated: bool = False,
        latencies_ns: Sequence[int] | None = None,
        wake: WakeCurve = NO_WAKE,
        host: tuple[int, int] = (0, 0),
    ) -> None:
        """`latencies_ns`: answers by order of the steps instead of the oracle's, for a null oracle. `host`: as
        `manifest.host_time` tells it."""
        self._oracle = oracle
        self._key = draws.engine_key(seed, engine_id)
        self._refuse = refuse_extrapolated
        self._given = latencies_ns
        self._wake, self._host = wake, host
        self.latencies_ns: list[int] = []
        self.counts = SupportCounts()
        self.dummy_steps = 0

    def submit(self, request: pb.StepRequest) -> PendingStep:
        pending = PendingStep(request, 0)
        shape = request.shape
        if self._given is None:
            latency_ns, support, distance, knowledge = self._oracle.answer(
                _query(shape), self._key, request.step_index, 1.0
            )
        else:
            latency_ns, support, distance, knowledge = self._given[len(self.latencies_ns)], 0, 0.0, 0
        if support == SUPPORT_EXTRAPOLATED and self._refuse:
            raise SupportRefused(
                f"step {request.step_index} ({len(shape.prefill_chunks)} prefill chunks, {shape.num_decode_requests} "
                f"decode requests with {shape.decode_context_tokens} context tokens) lies outside the pack; take a "
                "pack that covers it or leave --support serve"
            )
        if shape.num_draft_tokens:
            raise AcceptanceUnknown("replay does not know how many draft tokens are accepted; replay without them")
        self.latencies_ns.append(latency_ns)
        self.counts.add(latency_ns, support, knowledge)
        reply = pending.reply = pb.StepReply(
            step_index=request.step_index,
            latency_ns=(latency_ns,),
            prep_ns=self._oracle.prep_ns + self._wake.extra_ns(request.device_idle_ns),
            copy_ns=self._oracle.copy_ns,
            host_ns=self._host_ns(shape),
            generated_tokens=shape.num_decode_requests,
            generation=1,
            support=support,  # type: ignore[arg-type]
            knowledge=knowledge,  # type: ignore[arg-type]
            support_distance=distance,
        )
        for new in shape.new_requests:
            # Every request of a replay ends at its own number of tokens.
            reply.target_output_tokens.add(source=pb.LENGTH_SOURCE_IGNORE_EOS if new.ignore_eos else 0)
        return pending

    def _host_ns(self, shape: pb.StepShape) -> int:
        step_ns, request_ns = self._host
        return step_ns and step_ns + request_ns * (shape.num_decode_requests + len(shape.prefill_chunks))

    def dummy(self, step_index: int) -> tuple[int, int, int]:
        """Latency, preparation and copy of a dummy batch: one decode request without context.

        No step anybody asked for, so its support does not count.
        """
        if self._given is None:
            latency_ns = self._oracle.answer(_DUMMY, self._key, step_index, 1.0).latency_ns
        else:
            latency_ns = self._given[len(self.latencies_ns)]
        self.latencies_ns.append(latency_ns)
        self.dummy_steps += 1
        return latency_ns, self._oracle.prep_ns, self._oracle.copy_ns

    def wait(self, pending: PendingStep) -> pb.StepReply:
        assert pending.reply is not None  # noqa: S101  submit has answered
        return message_of(pending.reply)

    def count_step(self, lateness_ns: int, late_answer_ns: int, reply: object = None) -> None:
        """Nothing is ever late."""

    def close(self) -> None:
        return


def _query(shape: pb.StepShape) -> StepQuery:
    chunks = shape.prefill_chunks
    return StepQuery(
        tuple([chunk.num_tokens for chunk in chunks]) if chunks else _NONE,
        tuple([chunk.context_tokens for chunk in chunks]) if chunks else _NONE,
        shape.num_decode_requests,
        shape.num_decode_tokens,
        shape.decode_context_tokens,
        shape.max_decode_context_tokens,
        shape.concurrency,
        shape.previous_prefill_tokens,
        len(shape.new_requests),
    )
