"""A server that is sent damaged messages of every method, and what it makes of each."""

from __future__ import annotations

import queue
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from guarantees.message_mutations import damaged_bytes, mutate
from oracle_calls import EXPERIMENT, TIMEOUT, Calls, identity, mixed_steps, upload_messages
from oracle_process import OracleProcess
from oracle_server.rpc.channel import ANONYMOUS, open_channel
from oracle_server.rpc.recompute import Report, recompute_from
from performance.measure import resident_bytes
from step_oracle.v1 import error_reason_pb2, experiment_pb2, oracle_service_pb2, pack_pb2, tenant_pb2, trace_pb2

_SERVICES = (
    oracle_service_pb2.DESCRIPTOR.services_by_name["OracleService"],
    pack_pb2.DESCRIPTOR.services_by_name["ProfilePackService"],
    experiment_pb2.DESCRIPTOR.services_by_name["ExperimentService"],
    tenant_pb2.DESCRIPTOR.services_by_name["TenantService"],
)
_VICTIM = "tenants/default/experiments/victim"
_WEIGHTS = {"StreamSteps": 25, "SampleStep": 25, "AttachEngine": 12, "UploadPack": 0.3}
# Endless, or ends only where something changes: the first message or none in this time is an answer.
_WATCH_SECONDS = 0.05
# Of the step sent after each damaged message of a stream; damaged steps have others.
_SENTINEL = 987_654_321
_RSS_EVERY = 200
_REASONS = {name.removeprefix("ERROR_REASON_") for name in dict(error_reason_pb2.ErrorReason.items())} - {"UNSPECIFIED"}


class FuzzedServer:
    """Owns the process. `problems` are sentences; use as a context manager, on one thread."""

    def __init__(self, folder: Path, pack: Path, draw: random.Random) -> None:
        self.methods: dict[str, MethodDescriptor] = {m.name: m for service in _SERVICES for m in service.methods}
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.problems: list[str] = []
        self.crashes = 0
        self.largest_rss = 0
        self._draw, self._pack = draw, pack
        self._server = OracleProcess(folder / "fuzzed")
        self._trace = folder / "fuzzed.trace"
        self._stream: _RawStream | None = None
        self._names = list(self.methods)
        self._weights = [_WEIGHTS.get(name, 1) for name in self._names]

    def __enter__(self) -> FuzzedServer:
        self._server.start()
        self._calls = Calls(self._server.target)
        # Its calls take and give bytes.
        self._channel: Any = open_channel(self._server.target, ANONYMOUS)
        self._digest = self._calls.upload(self._pack)
        self._valid = self._valid_messages()
        self._mend()
        self._file = self._trace.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._stream is not None:
            self._stream.cancel()
        self._channel.close()
        self._calls.__exit__(None, None, None)
        if self._server.returncode is not None:
            self.crashes += 1
        self._server.stop()

    def send_one(self) -> None:
        """One damaged message to one method, and its answer judged."""
        name = self._draw.choices(self._names, self._weights)[0]
        method = self.methods[name]
        messages = self._valid[name]
        at = self._draw.randrange(len(messages))
        if self._draw.random() < 0.15:
            damaged = damaged_bytes(messages[at].SerializeToString(), self._draw)
        else:
            changed = type(messages[at])()
            changed.CopyFrom(messages[at])
            mutate(changed, self._draw)
            damaged = changed.SerializeToString()
        sent = [message.SerializeToString() for message in messages]
        sent[at] = damaged
        asked = _parsed(type(messages[at]), damaged)
        try:
            if name == "StreamSteps":
                answers = self._stream_one(damaged, asked)
            else:
                answers = self._call(method, sent)
        except grpc.RpcError as error:
            self._judge_refusal(name, error, is_message=asked is not None)
        else:
            self.counts["answered"] += 1
            response_type = message_factory.GetMessageClass(method.output_type)
            for answer in answers:
                response = _parsed(response_type, answer)
                if response is None:
                    self.problems.append(f"{name} answered with what is no {response_type.__name__}")
                elif name == "SampleStep" and asked is not None:
                    self._keep(asked.engine, asked.steps, response.replies)
            if name not in ("StreamSteps", "SampleStep", "AttachEngine") and not name.startswith(("Get", "List")):
                self._mend()
        self._look_at_process()

    def recompute(self) -> Report:
        """All answers to damaged steps, from the folder of the server."""
        self._file.flush()
        return recompute_from(self._server.state_dir, [self._trace])

    def _call(self, method: MethodDescriptor, sent: list[bytes]) -> list[bytes]:
        path = f"/{method.containing_service.full_name}/{method.name}"
        channel = self._channel
        if method.client_streaming:
            return [channel.stream_unary(path)(iter(sent), timeout=TIMEOUT)]
        if not method.server_streaming:
            return [channel.unary_unary(path)(sent[0], timeout=TIMEOUT)]
        call = channel.unary_stream(path)(sent[0], timeout=_WATCH_SECONDS if "Watch" in method.name else TIMEOUT)
        try:
            return [next(call)]
        except grpc.RpcError as error:
            if "Watch" in method.name and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return []
            raise
        finally:
            call.cancel()

    def _stream_one(self, damaged: bytes, asked: Any) -> list[bytes]:
        """On the open stream; then a valid step, whose answer says that the stream goes on."""
        if self._stream is None:
            engine = identity("fuzz")
            incarnation = self._calls.attach(engine).incarnation
            opening = oracle_service_pb2.StreamStepsRequest(
                open=oracle_service_pb2.StreamOpen(engine=engine, incarnation=incarnation)
            )
            self._stream = _RawStream(self._channel, opening)
        try:
            responses = self._stream.ask(damaged)
        except grpc.RpcError:
            self._stream = None
            raise
        if asked is not None:
            replies = [reply for response in responses for reply in response.replies]
            if len(replies) == len(asked.steps):
                self._keep(identity("fuzz"), asked.steps, replies)
            else:
                self.problems.append(f"{len(asked.steps)} steps of a stream got {len(replies)} replies")
        return []

    def _keep(self, engine: Any, steps: Any, replies: Any) -> None:
        """For `recompute`."""
        if len(steps) != len(replies):
            self.problems.append(f"{len(steps)} steps got {len(replies)} replies")
            return
        records = [trace_pb2.TraceRecord(header=trace_pb2.TraceHeader(engine=engine))]
        for step, reply in zip(steps, replies, strict=True):
            records.append(trace_pb2.TraceRecord(step=trace_pb2.TraceStep(request=step, reply=reply)))
        for data in (record.SerializeToString() for record in records):
            self._file.write(struct.pack("<I", len(data)) + data)

    def _judge_refusal(self, name: str, error: grpc.RpcError, *, is_message: bool) -> None:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        info = error_details_pb2.ErrorInfo()
        has_info = status is not None and any(detail.Unpack(info) for detail in status.details)
        if has_info and info.reason in _REASONS:
            self.counts["refused"] += 1
            self.reasons[info.reason] += 1
        elif not has_info and not is_message:
            self.counts["undecodable"] += 1
        else:
            reason = info.reason or "without ErrorInfo"
            self.problems.append(f"{name}: {error.code().name} {reason}: {error.details()}"[:200])

    def _look_at_process(self) -> None:
        self.counts["sent"] += 1
        if self._server.returncode is not None:
            self.crashes += 1
            self.problems.append(f"the server ended with {self._server.returncode}: {self._server.log[-500:]}")
            self._stream = None
            self._server.start()
            self._mend()
        elif self.counts["sent"] % _RSS_EVERY == 0:
            self.largest_rss = max(self.largest_rss, resident_bytes(self._server.pid))

    def _mend(self) -> None:
        """What a damaged change has changed is made good, or all later messages would meet an empty server."""
        quota = tenant_pb2.UpdateTenantRequest(name="tenants/default", quota=tenant_pb2.TenantQuota())
        self._calls.tenants.UpdateTenant(quota, timeout=TIMEOUT)
        for experiment in ("default", "victim"):
            name = f"tenants/default/experiments/{experiment}"
            try:
                found = self._calls.experiments.GetExperiment(
                    experiment_pb2.GetExperimentRequest(name=name), timeout=TIMEOUT
                ).experiment
            except grpc.RpcError:
                self._bound = self._calls.create(self._digest, experiment, seed=3).binding
            else:
                if found.binding != self._bound:
                    self._calls.activate(self._digest, name, seed=3)

    def _valid_messages(self) -> dict[str, list[Message]]:
        """Messages that are taken, by method."""
        pack, engine = f"tenants/default/packs/{self._digest}", identity("fuzz-unary", labels={"rack": "1"})
        rule = {"labels": {"rack": "1"}, "fraction": 0.5, "fraction_salt": "a", "pack_digest": self._digest}
        overlay = {"slow_down_factor": 1.1, "engine_ids": ["nobody"], "stall_every_steps": 9, "stall_ns": 5}
        binding = {"default_pack_digest": self._digest, "seed": 3, "rules": [rule], "overlays": [overlay]}
        steps = mixed_steps(12)
        fields: dict[str, dict[str, Any]] = {
            "StreamSteps": {"steps": steps},
            "SampleStep": {"engine": engine, "steps": steps},
            "AttachEngine": {"engine": engine},
            "GetDevice": {"engine": engine},
            "CreateExperiment": {"parent": "tenants/default", "experiment_id": "made", "binding": binding},
            "ActivateExperiment": {"name": _VICTIM, "binding": binding, "comment": "why"},
            "CreateTenant": {"tenant_id": "made", "quota": {"max_engines": 4}},
            "UpdateTenant": {"name": "tenants/default", "quota": {"max_engines": 4}},
            "IssueToken": {"parent": "tenants/default", "scope": tenant_pb2.TOKEN_SCOPE_ENGINE},
            "RevokeToken": {"name": "tenants/default/tokens/1"},
        }
        valid: dict[str, list[Message]] = {"UploadPack": list(upload_messages(self._pack))}
        for name, method in self.methods.items():
            request_type = message_factory.GetMessageClass(method.input_type)
            if name not in fields and name != "UploadPack":
                known = {"parent": "tenants/default", "name": _VICTIM, "page_size": 5}
                known["name"] = pack if name.endswith("Pack") else "tenants/default" if "Tenant" in name else _VICTIM
                known["parent"] = EXPERIMENT if name == "ListEngines" else "tenants/default"
                there = request_type.DESCRIPTOR.fields_by_name
                fields[name] = {key: value for key, value in known.items() if key in there}
            if name != "UploadPack":
                valid[name] = [request_type(**fields[name])]
        return valid


class _RawStream:
    """A StreamSteps call that sends bytes as they are. Owned by one thread."""

    def __init__(self, channel: Any, opening: Message) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._requests.put(opening.SerializeToString())
        self._call = channel.stream_stream("/step_oracle.v1.OracleService/StreamSteps")(
            iter(self._requests.get, None), timeout=600
        )

    def ask(self, damaged: bytes) -> list[Any]:
        """The responses up to the one of the valid step that follows, which is left out; RpcError."""
        (step,) = mixed_steps(1)
        step.step_index = _SENTINEL
        self._requests.put(damaged)
        self._requests.put(oracle_service_pb2.StreamStepsRequest(steps=[step]).SerializeToString())
        responses: list[Any] = []
        try:
            for data in self._call:
                response = oracle_service_pb2.StreamStepsResponse.FromString(data)
                if response.replies and response.replies[-1].step_index == _SENTINEL:
                    del response.replies[-1]
                    return [*responses, response]
                responses.append(response)
        except grpc.RpcError:
            # Else the thread that waits for what is to be sent stays, one for each stream that was refused.
            self._requests.put(None)
            raise
        raise EOFError("the stream ended without an answer")

    def cancel(self) -> None:
        """End it."""
        self._requests.put(None)
        self._call.cancel()


def _parsed(kind: type[Message], data: bytes) -> Any:
    """The message; None where it is none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None
