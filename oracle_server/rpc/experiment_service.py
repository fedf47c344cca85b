"""The control plane of experiments."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from oracle_server.errors import InvalidArgument, OracleError
from oracle_server.rpc import pages, wire
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.status import streaming, unary
from oracle_server.rpc.step_stream import Events
from oracle_server.state import names
from oracle_server.state.experiments import LiveExperiment
from oracle_server.state.node import Node
from oracle_server.state.principal import CALLER
from oracle_server.state.store import Author, GenerationRow
from step_oracle.v1 import experiment_pb2 as pb
from step_oracle.v1 import experiment_pb2_grpc


class ExperimentService(experiment_pb2_grpc.ExperimentServiceServicer):
    """Fleets bound to packs. Event loop only."""

    def __init__(self, node: Node, metrics: Metrics, events: Events) -> None:
        self.node = node
        self.metrics = metrics
        self._events = events

    @unary
    async def CreateExperiment(self, request: pb.CreateExperimentRequest, context: Any) -> pb.CreateExperimentResponse:
        """EXPERIMENT_EXISTS, PACK_NOT_FOUND, INVALID_ARGUMENT."""
        tenant = names.parse_tenant(request.parent, "parent")
        await self.node.tenant(tenant)
        live = await self.node.experiments.create(
            tenant, request.experiment_id, wire.read_binding(request.binding), _author(request.comment)
        )
        self._say(live, live.current)
        return pb.CreateExperimentResponse(experiment=self._experiment(live, live.current))

    @unary
    async def GetExperiment(self, request: pb.GetExperimentRequest, context: Any) -> pb.GetExperimentResponse:
        """EXPERIMENT_NOT_FOUND."""
        live = await self._find(request.name, "name")
        return pb.GetExperimentResponse(experiment=self._experiment(live, live.current))

    @unary
    async def ListExperiments(self, request: pb.ListExperimentsRequest, context: Any) -> pb.ListExperimentsResponse:
        """Experiments of a tenant in the order of their names."""
        tenant = names.parse_tenant(request.parent, "parent")
        await self.node.tenant(tenant)
        found = self.node.experiments.page(
            tenant, pages.key_of(request.page_token), pages.size_of(request.page_size) + 1
        )
        page = pages.fill((self._experiment(live, live.current) for live in found), request.page_size)
        token = pages.token_after(found[len(page) - 1].experiment) if len(page) < len(found) else ""
        return pb.ListExperimentsResponse(experiments=page, next_page_token=token)

    @unary
    async def ActivateExperiment(
        self, request: pb.ActivateExperimentRequest, context: Any
    ) -> pb.ActivateExperimentResponse:
        """Make another binding answer, between two steps of every engine."""
        live = await self._find(request.name, "name")
        try:
            activation = await self.node.experiments.activate(
                live.name,
                wire.read_binding(request.binding),
                request.expected_generation,
                frozenset(request.allow_mismatch),
                validate_only=request.validate_only,
                author=_author(request.comment),
            )
        except OracleError as error:
            self._refused(live, error)
            raise
        if not request.validate_only:
            self._activated(live, activation.record)
        return pb.ActivateExperimentResponse(
            experiment=self._experiment(live, activation.record), warnings=activation.warnings
        )

    @unary
    async def RollBackExperiment(
        self, request: pb.RollBackExperimentRequest, context: Any
    ) -> pb.RollBackExperimentResponse:
        """Activate the binding of an earlier generation again, as a new generation."""
        live = await self._find(request.name, "name")
        try:
            activation = await self.node.experiments.roll_back(
                live.name,
                request.to_generation,
                request.expected_generation,
                frozenset(request.allow_mismatch),
                _author(request.comment),
            )
        except OracleError as error:
            self._refused(live, error)
            raise
        self._activated(live, activation.record)
        return pb.RollBackExperimentResponse(experiment=self._experiment(live, activation.record))

    @streaming
    async def WatchExperiment(
        self, request: pb.WatchExperimentRequest, context: Any
    ) -> AsyncIterator[pb.WatchExperimentResponse]:
        """The present state first, then one message per change."""
        live = await self._find(request.name, "name")
        async for watched, record in self.node.experiments.watch(live.name, request.after_generation):
            yield pb.WatchExperimentResponse(experiment=self._experiment(watched, record))

    @unary
    async def ListGenerations(self, request: pb.ListGenerationsRequest, context: Any) -> pb.ListGenerationsResponse:
        """Newest first."""
        live = await self._find(request.name, "name")
        before = _generation_before(request.page_token) or live.current.generation + 1
        rows = await self.node.experiments.generations(live.name, before, pages.size_of(request.page_size) + 1)
        page = pages.fill(map(wire.write_generation, rows), request.page_size)
        token = pages.token_after(str(page[-1].generation)) if len(page) < len(rows) else ""
        return pb.ListGenerationsResponse(generations=page, next_page_token=token)

    @unary
    async def ListEngines(self, request: pb.ListEnginesRequest, context: Any) -> pb.ListEnginesResponse:
        """The engines attached now, in the order of their ids."""
        live = await self._find(request.parent, "parent")
        await self.node.followers.count()
        engines = sorted(self.node.engines_of(live), key=lambda record: record.identity.engine_id)
        return pb.ListEnginesResponse(
            engines=[wire.write_engine(record, live.current.generation) for record in engines]
        )

    @unary
    async def GetShadowReport(self, request: pb.GetShadowReportRequest, context: Any) -> pb.GetShadowReportResponse:
        """What the shadow pack of a generation would have answered."""
        live = await self._find(request.name, "name")
        comparison = await self.node.experiments.compared(live.name, request.generation)
        return wire.write_comparison(comparison)

    @unary
    async def DeleteExperiment(self, request: pb.DeleteExperimentRequest, context: Any) -> pb.DeleteExperimentResponse:
        """Refused while engines are attached."""
        live = await self._find(request.name, "name")
        await self.node.experiments.delete(live.name)
        self._events.info("deleted", experiment=live.name, by=CALLER.get().name)
        return pb.DeleteExperimentResponse()

    async def _find(self, name: str, field: str) -> LiveExperiment:
        tenant, experiment = names.parse_experiment(name, field)
        await self.node.tenant(tenant)
        await self.node.look_for(names.experiment_name(tenant, experiment))
        return self.node.experiments.find(names.experiment_name(tenant, experiment))

    def _experiment(self, live: LiveExperiment, record: GenerationRow) -> pb.Experiment:
        return wire.write_experiment(live, record, len(self.node.engines_of(live)))

    def _activated(self, live: LiveExperiment, record: GenerationRow) -> None:
        self.metrics.count_swap("ok")
        self._say(live, record)

    def _say(self, live: LiveExperiment, record: GenerationRow) -> None:
        self._events.info(
            "activated",
            experiment=live.name,
            generation=record.generation,
            how=record.reason,
            by=record.author.principal,
        )

    def _refused(self, live: LiveExperiment, error: OracleError) -> None:
        self.metrics.count_swap(error.reason)
        self._events.info("refused", experiment=live.name, reason=error.reason, why=error.message)


def _author(comment: str) -> Author:
    return Author(CALLER.get().name, comment)


def _generation_before(page_token: str) -> int:
    key = pages.key_of(page_token)
    if key and not (key.isdecimal() and len(key) < 19):
        raise InvalidArgument(
            "page_token is of another list; give next_page_token of the page before", field="page_token"
        )
    return int(key or "0")
