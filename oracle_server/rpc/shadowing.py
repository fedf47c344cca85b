"""The steps of one stream beside those of a shadow pack: compared once the real reply is on its way."""

from __future__ import annotations

from oracle_server.errors import OracleError
from oracle_server.sampling.shape import StepQuery
from oracle_server.state.experiments import LiveExperiment
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.snapshot import EnginePlan, Snapshot, StepAnswer


class Shadowing:
    """One engine under one generation. Owned by the stream's task."""

    def __init__(self, live: LiveExperiment, plan: EnginePlan, engine_id: str, pack_digest: str) -> None:
        """`plan` is the shadow's, `pack_digest` the pack that answers."""
        self._live = live
        self._plan = plan
        self._engine_id = engine_id
        self._pack_digest = pack_digest
        # Answered, not yet compared.
        self._taken: list[tuple[int, StepQuery, int, StepAnswer]] = []

    def take(self, step_index: int, query: StepQuery, device_time_ns: int, answer: StepAnswer) -> None:
        """Remember an answered step."""
        self._taken.append((step_index, query, device_time_ns, answer))

    def compare(self) -> None:
        """Ask the shadow pack for the steps taken since, and count the differences."""
        taken, self._taken = self._taken, []
        for step_index, query, device_time_ns, answer in taken:
            try:
                latency_ns, support = self._plan.latency(step_index, query, device_time_ns)
            except OracleError:
                # A latency beyond the range: the engine's step is answered all the same.
                continue
            comparison = self._live.shadows.comparison(self._plan.generation, self._plan.pack_digest)
            engine = comparison.engine(self._engine_id, self._pack_digest)
            engine.add((bool(query.chunk_tokens), answer.support, support), answer.latency_ns, latency_ns)


def shadowing_of(live: LiveExperiment, snapshot: Snapshot, identity: EngineIdentity) -> Shadowing | None:
    """What compares the engine's steps under this generation; None where it has no shadow pack."""
    plan = snapshot.shadow_plan(identity)
    return None if plan is None else Shadowing(live, plan, identity.engine_id, snapshot.pack_for(identity).digest)
