"""What contract tests say to a real server, and what its errors mean."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from oracle_server.rpc.channel import ANONYMOUS, Access
from oracle_server.rpc.client import Client
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, pack_pb2, step_pb2

EXPERIMENT = "tenants/default/experiments/default"
TIMEOUT = 20.0


class Calls:
    """The four services of one server as a test speaks to them. Use as a context manager."""

    def __init__(self, target: str, access: Access = ANONYMOUS) -> None:
        self.client = Client(target, access=access)
        self.oracle = self.client.oracle
        self.packs = self.client.packs
        self.experiments = self.client.experiments
        self.tenants = self.client.tenants

    def __enter__(self) -> Calls:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.__exit__(None, None, None)

    def upload(self, directory: Path, tenant: str = "default") -> str:
        """Store a pack; its digest."""
        return str(self.client.upload(f"tenants/{tenant}", directory).pack.digest)

    def create(
        self, digest: str, experiment_id: str = "default", tenant: str = "default", **binding: Any
    ) -> experiment_pb2.Experiment:
        """A new experiment with one pack for all."""
        request = experiment_pb2.CreateExperimentRequest(
            parent=f"tenants/{tenant}",
            experiment_id=experiment_id,
            binding=experiment_pb2.Binding(default_pack_digest=digest, **binding),
        )
        return self.experiments.CreateExperiment(request, timeout=TIMEOUT).experiment  # type: ignore[no-any-return]

    def activate(
        self, digest: str, name: str = EXPERIMENT, *, request: dict[str, Any] | None = None, **binding: Any
    ) -> experiment_pb2.ActivateExperimentResponse:
        """Another pack for all."""
        message = experiment_pb2.ActivateExperimentRequest(
            name=name, binding=experiment_pb2.Binding(default_pack_digest=digest, **binding), **(request or {})
        )
        return self.experiments.ActivateExperiment(message, timeout=TIMEOUT)  # type: ignore[no-any-return]

    def attach(
        self, engine: oracle_service_pb2.EngineIdentity, **fields: Any
    ) -> oracle_service_pb2.AttachEngineResponse:
        """Attach an engine."""
        request = oracle_service_pb2.AttachEngineRequest(engine=engine, **fields)
        return self.oracle.AttachEngine(request, timeout=TIMEOUT)  # type: ignore[no-any-return]

    def sample(
        self, engine: oracle_service_pb2.EngineIdentity, steps: Iterable[step_pb2.StepRequest], min_generation: int = 0
    ) -> list[step_pb2.StepReply]:
        """Answer steps without a stream."""
        request = oracle_service_pb2.SampleStepRequest(engine=engine, steps=steps, min_generation=min_generation)
        return list(self.oracle.SampleStep(request, timeout=TIMEOUT).replies)

    def open(
        self,
        engine: oracle_service_pb2.EngineIdentity,
        incarnation: int,
        config: oracle_service_pb2.EngineConfig | None = None,
        *,
        leases: bool = False,
    ) -> Stream:
        """The engine's stream, opened."""
        stream = Stream(self.oracle)
        opening = oracle_service_pb2.StreamOpen(engine=engine, incarnation=incarnation, config=config, leases=leases)
        stream.send(open=opening)
        stream.opened = stream.receive().opened
        return stream

    def join(self, engine_id: str, **fields: Any) -> Stream:
        """Attach an engine of the default experiment and open its stream."""
        engine = identity(engine_id)
        return self.open(engine, self.attach(engine, **fields).incarnation, fields.get("config"))


class Stream:
    """One StreamSteps call driven by hand. Owned by one thread."""

    opened: oracle_service_pb2.StreamOpened

    def __init__(self, oracle: Any) -> None:
        self._requests: queue.Queue[oracle_service_pb2.StreamStepsRequest | None] = queue.Queue()
        self.call = oracle.StreamSteps(iter(self._requests.get, None), timeout=120)

    def send(self, **fields: Any) -> None:
        """Put one message on the stream."""
        self._requests.put(oracle_service_pb2.StreamStepsRequest(**fields))

    def receive(self) -> oracle_service_pb2.StreamStepsResponse:
        """The next message; grpc.RpcError where the server ends the stream, StopIteration where it is closed."""
        return next(self.call)  # type: ignore[no-any-return]

    def ask(self, *steps: step_pb2.StepRequest, min_generation: int = 0) -> list[step_pb2.StepReply]:
        """Answers to one message; pushed generations are passed over."""
        self.send(steps=steps, min_generation=min_generation)
        while True:
            response = self.receive()
            if response.replies:
                return list(response.replies)

    def close(self) -> None:
        """Close the sending side and wait for the end."""
        self._requests.put(None)
        for _ in self.call:
            pass


def identity(engine_id: str, experiment: str = EXPERIMENT, **fields: Any) -> oracle_service_pb2.EngineIdentity:
    """An engine of the default experiment."""
    return oracle_service_pb2.EngineIdentity(experiment=experiment, engine_id=engine_id, **fields)


def decode(step_index: int, requests: int = 4, context: int = 4000, **fields: Any) -> step_pb2.StepRequest:
    """A decode step of equal requests."""
    shape = step_pb2.StepShape(
        num_decode_requests=requests,
        num_decode_tokens=requests,
        decode_context_tokens=context,
        max_decode_context_tokens=-(-context // requests),
        concurrency=requests,
    )
    shape.MergeFrom(step_pb2.StepShape(**fields))
    return step_pb2.StepRequest(step_index=step_index, shape=shape)


def prefill(step_index: int, *chunks: tuple[int, int], **fields: Any) -> step_pb2.StepRequest:
    """A step of prefill chunks (tokens, context) alone."""
    shape = step_pb2.StepShape(
        prefill_chunks=[step_pb2.PrefillChunk(num_tokens=n, context_tokens=c) for n, c in chunks],
        concurrency=len(chunks),
        **fields,
    )
    return step_pb2.StepRequest(step_index=step_index, shape=shape)


def mixed_steps(count: int) -> list[step_pb2.StepRequest]:
    """Steps of many shapes, fixed."""
    steps = []
    for i in range(count):
        if i % 5 == 0:
            steps.append(prefill(i, (1 + 37 * i % 900, 16 * (i % 7))))
        else:
            steps.append(decode(i, requests=1 + i % 60, context=(1 + i % 60) * (20 + 11 * i % 3000)))
    return steps


def upload_messages(directory: Path, **begin: Any) -> Iterator[pack_pb2.UploadPackRequest]:
    """The messages of an upload, for tests that change them."""
    manifest = begin.pop("manifest_json", None) or (directory / "manifest.json").read_bytes()
    fields = {"parent": "tenants/default", "manifest_json": manifest, **begin}
    yield pack_pb2.UploadPackRequest(begin=pack_pb2.UploadPackBegin(**fields))
    for name in ("operators.parquet", "residuals.parquet", "samples.parquet"):
        if (directory / name).exists():
            data = (directory / name).read_bytes()
            for begin_at in range(0, len(data), 1 << 20):
                chunk = pack_pb2.UploadPackChunk(file=name, data=data[begin_at : begin_at + (1 << 20)])
                yield pack_pb2.UploadPackRequest(chunk=chunk)


def reason_of(error: grpc.RpcError) -> tuple[str, str]:
    """(gRPC code, ErrorInfo.reason) of a failed call."""
    return error.code().name, info_of(error).reason


def info_of(error: grpc.RpcError) -> Any:
    """google.rpc.ErrorInfo of a failed call; fails where there is none."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, f"no google.rpc.Status: {error!r}"
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            assert info.domain == "step-oracle"
            return info
    raise AssertionError(f"no ErrorInfo in {status}")
