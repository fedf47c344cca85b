"""The fakes the design names. ScriptedOracle answers over a real gRPC channel; only its answers are scripted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import oracle_service_pb2_grpc as rpc
from step_oracle.v1 import step_pb2

Answer = Callable[[step_pb2.StepRequest], step_pb2.StepReply]


def constant(latency_ns: int) -> Answer:
    """Every step takes `latency_ns`; hints decide output lengths; no draft is accepted."""

    def answer(request: step_pb2.StepRequest) -> step_pb2.StepReply:
        shape = request.shape
        return step_pb2.StepReply(
            step_index=request.step_index,
            latency_ns=[latency_ns],
            generated_tokens=shape.num_decode_requests,
            accepted_draft_tokens=[0] * len(shape.num_draft_tokens),
            target_output_tokens=[
                step_pb2.TargetOutputTokens(
                    output_tokens=0 if new.ignore_eos else new.output_tokens_hint,
                    source=step_pb2.LENGTH_SOURCE_HINT,
                )
                for new in shape.new_requests
            ],
            generation=1,
            support=step_pb2.SUPPORT_EXACT,
            knowledge=step_pb2.KNOWLEDGE_MEASURED,
        )

    return answer


class ScriptedOracle(rpc.OracleServiceServicer):
    """An oracle server whose answers the test scripts. Records what it was asked."""

    def __init__(self, answer: Answer, *, kv_blocks: int = 1000, address: str = "127.0.0.1:0") -> None:
        self.answer = answer
        self.kv_blocks = kv_blocks
        self.requests: list[step_pb2.StepRequest] = []
        self.opened: list[pb.StreamOpen] = []
        self.attached: list[pb.AttachEngineRequest] = []
        self.counts: list[pb.ShimCounts] = []
        # Called once per stream message before it is answered; may abort through the context.
        self.before_answer: Callable[[pb.StreamStepsRequest, grpc.ServicerContext], None] | None = None
        # Ends the stream without an error after so many messages, or at the next one beyond; 0: the engine ends it.
        self.messages_per_stream = 0
        self.device = pb.DeviceDescription(
            name="NVIDIA H100 80GB HBM3", memory_bytes=80 << 30, capability_major=9, capability_minor=0
        )
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(16))
        rpc.add_OracleServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(address)
        self.target = f"127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedOracle:
        self._server.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.stop(None).wait()

    def GetDevice(self, request: pb.GetDeviceRequest, context: grpc.ServicerContext) -> pb.GetDeviceResponse:
        return pb.GetDeviceResponse(device=self.device, generation=1, pack_digest="sha256:scripted", block_size=16)

    def AttachEngine(self, request: pb.AttachEngineRequest, context: grpc.ServicerContext) -> pb.AttachEngineResponse:
        with self._lock:
            self.attached.append(request)
            incarnation = len(self.attached)
        return pb.AttachEngineResponse(
            incarnation=incarnation,
            generation=1,
            pack_digest="sha256:scripted",
            num_kv_blocks=self.kv_blocks,
            kv_blocks_source=pb.KV_BLOCKS_SOURCE_PACK,
            kv_blocks_basis="assumed",
        )

    def StreamSteps(
        self, request_iterator: Iterator[pb.StreamStepsRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StreamStepsResponse]:
        for number, message in enumerate(request_iterator, 1):
            response = pb.StreamStepsResponse()
            with self._lock:
                if message.HasField("open"):
                    self.opened.append(message.open)
                    response.opened.incarnation = message.open.incarnation
                    response.opened.generation = 1
                if message.HasField("counts"):
                    self.counts.append(message.counts)
                self.requests.extend(message.steps)
            if self.before_answer is not None:
                self.before_answer(message, context)
            response.replies.extend(self.answer(step) for step in message.steps)
            yield response
            if 0 < self.messages_per_stream <= number:
                return
