"""The data plane: devices, attaching engines, steps."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from oracle_server.errors import InvalidArgument, NotFound, OracleError
from oracle_server.rpc import wire
from oracle_server.rpc.metrics import Metrics
from oracle_server.rpc.status import unary
from oracle_server.rpc.step_stream import Events, StepStream
from oracle_server.state.experiments import not_here_yet
from oracle_server.state.node import Node
from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import oracle_service_pb2_grpc

MAX_SAMPLE_STEPS = 4096
# Streams that tell a new generation in one turn of the loop.
PUSHES_IN_A_TURN = 4

_KV_SOURCES = {
    "engine_override": pb.KV_BLOCKS_SOURCE_ENGINE_OVERRIDE,
    "pack": pb.KV_BLOCKS_SOURCE_PACK,
    "scaled": pb.KV_BLOCKS_SOURCE_SCALED,
}


class OracleService(oracle_service_pb2_grpc.OracleServiceServicer):
    """Answers steps. Event loop only."""

    def __init__(
        self, node: Node, metrics: Metrics, events: Events, *, leases: bool = True, max_stream_age_seconds: float = 0.0
    ) -> None:
        self.node = node
        self.metrics = metrics
        self._events = events
        self._leases = leases
        self._max_stream_age_seconds = max_stream_age_seconds
        self._pushes = asyncio.Semaphore(PUSHES_IN_A_TURN)

    @unary
    async def GetDevice(self, request: pb.GetDeviceRequest, context: Any) -> pb.GetDeviceResponse:
        """The device an engine has to look like."""
        identity = wire.read_identity(request.engine)
        await self.node.tenant_of(identity.experiment)
        snapshot = self.node.experiments.find(identity.experiment).snapshot
        pack = snapshot.pack_for(identity)
        device = pack.manifest.device
        return pb.GetDeviceResponse(
            device=pb.DeviceDescription(
                name=device.name,
                memory_bytes=device.memory_bytes,
                capability_major=device.capability_major,
                capability_minor=device.capability_minor,
            ),
            generation=snapshot.generation,
            pack_digest=pack.digest,
            block_size=pack.manifest.kv_cache.block_size,
            model_runner=pack.manifest.engine.model_runner or "",
        )

    @unary
    async def AttachEngine(self, request: pb.AttachEngineRequest, context: Any) -> pb.AttachEngineResponse:
        """Lets an engine core in."""
        identity = wire.read_identity(request.engine)
        facts = wire.read_facts(request.config)
        try:
            await self.node.tenant_of(identity.experiment)
            attached = await self.node.attachments.attach(
                identity, facts, request.device_generation, frozenset(request.allow_mismatch)
            )
        except OracleError as refusal:
            error = not_here_yet(refusal, request.device_generation)
            self._events.info(
                "refused",
                experiment=identity.experiment,
                engine=identity.engine_id,
                reason=error.reason,
                why=error.message,
            )
            raise error from None
        self.metrics.attached += 1
        self._events.info(
            "attached",
            experiment=identity.experiment,
            engine=identity.engine_id,
            incarnation=attached.incarnation,
            generation=attached.generation,
            pack=attached.pack.digest,
            warnings=len(attached.warnings),
        )
        return pb.AttachEngineResponse(
            incarnation=attached.incarnation,
            generation=attached.generation,
            pack_digest=attached.pack.digest,
            num_kv_blocks=attached.kv_blocks.blocks,
            kv_blocks_source=_KV_SOURCES[attached.kv_blocks.source],
            kv_blocks_basis=attached.kv_blocks.basis,
            differences=wire.write_differences(attached.differences),
            warnings=attached.warnings,
        )

    async def StreamSteps(self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One engine's steps. The handler reads and writes the context itself: a push has to share the writer."""
        stream = StepStream(
            self.node,
            self.metrics,
            self._events,
            context,
            pushes=self._pushes,
            leases=self._leases,
            max_age_seconds=self._max_stream_age_seconds,
        )
        await stream.run()

    @unary
    async def SampleStep(self, request: pb.SampleStepRequest, context: Any) -> pb.SampleStepResponse:
        """Answers steps without a stream."""
        identity = wire.read_identity(request.engine)
        try:
            await self.node.tenant_of(identity.experiment)
            live = self.node.experiments.find(identity.experiment)
        except NotFound as error:
            raise not_here_yet(error, request.min_generation) from None
        if len(request.steps) > MAX_SAMPLE_STEPS:
            raise InvalidArgument(f"{len(request.steps)} steps; allowed in one call: {MAX_SAMPLE_STEPS}", field="steps")
        if live.snapshot.generation < request.min_generation:
            await self.node.catch_up(live, request.min_generation)
        snapshot = live.snapshot
        plan = snapshot.plan(identity)
        steps_by_support = self.metrics.steps_of(live.tenant)
        response = pb.SampleStepResponse()
        for step in request.steps:
            query, drafts, new_requests = wire.read_step(step)
            answer = plan.answer(step.step_index, query, drafts, new_requests, step.device_time_ns, step.device_idle_ns)
            wire.write_reply(response.replies.add(), step.step_index, plan.generation, answer)
            steps_by_support[answer.support] += 1
            live.sampled_steps += 1
        return response
