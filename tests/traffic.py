"""A fleet that talks to a server without vLLM: engines that attach, ask for steps and report what a shim would."""

from __future__ import annotations

from collections.abc import Sequence

from oracle_calls import EXPERIMENT, Calls, Stream, decode, identity
from step_oracle.v1 import oracle_service_pb2

# Of 100 steps: most within 10 us, one beyond a millisecond, one beyond 50 ms.
LATENESS = (80, 10, 5, 2, 0, 1, 0, 1, 0, 0, 0, 1)


class Engine:
    """One attached engine and its stream. Owned by one thread."""

    def __init__(self, calls: Calls, engine_id: str, experiment: str = EXPERIMENT) -> None:
        self.engine = identity(engine_id, experiment)
        self.incarnation = calls.attach(self.engine).incarnation
        self.stream: Stream = calls.open(self.engine, self.incarnation)
        self.steps = 0

    def step(
        self,
        asked: int,
        leased: int = 0,
        *,
        context: int = 4000,
        late: int = 0,
        reconnects: int = 0,
        lateness: Sequence[int] = LATENESS,
    ) -> None:
        """Ask for so many decode steps, and say that so many more were answered from leases."""
        steps = [decode(self.steps + i, context=context) for i in range(asked)]
        self.steps += asked + leased
        counts = oracle_service_pb2.ShimCounts(
            steps=asked + leased,
            leased_steps=leased,
            leased_steps_by_support=[0, 0, leased, 0],
            late_answers=late,
            late_answer_ns=late * 3_000_000,
            reconnects=reconnects,
            lateness_buckets=lateness,
            lateness_sum_ns=1_000_000,
        )
        self.stream.send(steps=steps, counts=counts)
        while not self.stream.receive().replies:
            pass

    def close(self) -> None:
        """End the stream as an engine does that is stopped."""
        self.stream.close()
