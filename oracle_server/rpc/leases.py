"""What one stream is granted: pieces of the latency model that the engine evaluates itself."""

from __future__ import annotations

from oracle_server.rpc import wire
from oracle_server.sampling.shape import StepQuery
from oracle_server.state.snapshot import EnginePlan
from step_oracle.v1 import step_pb2


class Leases:
    """Grants of one stream. An engine asks for a decode-only step because it has no piece for it: it gets that piece.

    Owned by the stream's task.
    """

    def __init__(self) -> None:
        self._granted = 0
        # Whose pool this engine has.
        self._plan: EnginePlan | None = None

    def grant(self, reply: step_pb2.StepReply, plan: EnginePlan, query: StepQuery) -> None:
        """Adds the piece that a decode-only step without draft tokens was answered from, where it may be leased."""
        record = plan.lease(query)
        if record is None:
            return
        self._granted += 1
        wire.write_lease(reply.lease, plan, record)
        reply.lease.lease_id = self._granted
        # A plan has one residual pool, number 0; it goes with the first lease of the plan, and the others name it.
        if plan is not self._plan:
            self._plan = plan
            reply.lease.residual_pool.extend(plan.residual_pool)
