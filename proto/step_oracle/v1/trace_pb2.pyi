from step_oracle.v1 import oracle_service_pb2 as _oracle_service_pb2
from step_oracle.v1 import step_pb2 as _step_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TraceRecord(_message.Message):
    __slots__ = ("header", "step")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    header: TraceHeader
    step: TraceStep
    def __init__(self, header: _Optional[_Union[TraceHeader, _Mapping]] = ..., step: _Optional[_Union[TraceStep, _Mapping]] = ...) -> None: ...

class TraceHeader(_message.Message):
    __slots__ = ("engine", "config", "incarnation", "target", "wait_mode")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    WAIT_MODE_FIELD_NUMBER: _ClassVar[int]
    engine: _oracle_service_pb2.EngineIdentity
    config: _oracle_service_pb2.EngineConfig
    incarnation: int
    target: str
    wait_mode: str
    def __init__(self, engine: _Optional[_Union[_oracle_service_pb2.EngineIdentity, _Mapping]] = ..., config: _Optional[_Union[_oracle_service_pb2.EngineConfig, _Mapping]] = ..., incarnation: _Optional[int] = ..., target: _Optional[str] = ..., wait_mode: _Optional[str] = ...) -> None: ...

class TraceStep(_message.Message):
    __slots__ = ("request", "reply", "dispatch_ns", "device_start_ns", "device_finish_ns", "deadline_ns", "answer_ns", "resolved_ns", "leased", "after_ns")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_NS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_START_NS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FINISH_NS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_NS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_NS_FIELD_NUMBER: _ClassVar[int]
    RESOLVED_NS_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    AFTER_NS_FIELD_NUMBER: _ClassVar[int]
    request: _step_pb2.StepRequest
    reply: _step_pb2.StepReply
    dispatch_ns: int
    device_start_ns: int
    device_finish_ns: int
    deadline_ns: int
    answer_ns: int
    resolved_ns: int
    leased: bool
    after_ns: int
    def __init__(self, request: _Optional[_Union[_step_pb2.StepRequest, _Mapping]] = ..., reply: _Optional[_Union[_step_pb2.StepReply, _Mapping]] = ..., dispatch_ns: _Optional[int] = ..., device_start_ns: _Optional[int] = ..., device_finish_ns: _Optional[int] = ..., deadline_ns: _Optional[int] = ..., answer_ns: _Optional[int] = ..., resolved_ns: _Optional[int] = ..., leased: bool = ..., after_ns: _Optional[int] = ...) -> None: ...
