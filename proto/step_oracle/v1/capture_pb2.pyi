from step_oracle.v1 import step_pb2 as _step_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CaptureTiming(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPTURE_TIMING_UNSPECIFIED: _ClassVar[CaptureTiming]
    CAPTURE_TIMING_HOST: _ClassVar[CaptureTiming]
    CAPTURE_TIMING_CUDA_EVENTS: _ClassVar[CaptureTiming]
CAPTURE_TIMING_UNSPECIFIED: CaptureTiming
CAPTURE_TIMING_HOST: CaptureTiming
CAPTURE_TIMING_CUDA_EVENTS: CaptureTiming

class CaptureRecord(_message.Message):
    __slots__ = ("header", "scheduled", "device")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    header: CaptureHeader
    scheduled: ScheduledSteps
    device: DeviceSteps
    def __init__(self, header: _Optional[_Union[CaptureHeader, _Mapping]] = ..., scheduled: _Optional[_Union[ScheduledSteps, _Mapping]] = ..., device: _Optional[_Union[DeviceSteps, _Mapping]] = ...) -> None: ...

class CaptureHeader(_message.Message):
    __slots__ = ("version", "rank", "data_parallel_rank", "timing", "monotonic_ns", "unix_ns")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DATA_PARALLEL_RANK_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_NS_FIELD_NUMBER: _ClassVar[int]
    UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    version: str
    rank: int
    data_parallel_rank: int
    timing: CaptureTiming
    monotonic_ns: int
    unix_ns: int
    def __init__(self, version: _Optional[str] = ..., rank: _Optional[int] = ..., data_parallel_rank: _Optional[int] = ..., timing: _Optional[_Union[CaptureTiming, str]] = ..., monotonic_ns: _Optional[int] = ..., unix_ns: _Optional[int] = ...) -> None: ...

class ScheduledSteps(_message.Message):
    __slots__ = ("base_ns", "steps", "hook_ns", "writer_cpu_ns", "beside_ns")
    BASE_NS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    HOOK_NS_FIELD_NUMBER: _ClassVar[int]
    WRITER_CPU_NS_FIELD_NUMBER: _ClassVar[int]
    BESIDE_NS_FIELD_NUMBER: _ClassVar[int]
    base_ns: int
    steps: _containers.RepeatedCompositeFieldContainer[ScheduledStep]
    hook_ns: int
    writer_cpu_ns: int
    beside_ns: int
    def __init__(self, base_ns: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[ScheduledStep, _Mapping]]] = ..., hook_ns: _Optional[int] = ..., writer_cpu_ns: _Optional[int] = ..., beside_ns: _Optional[int] = ...) -> None: ...

class ScheduledStep(_message.Message):
    __slots__ = ("step_index", "shape", "dispatch_ns", "result_ns", "generated_tokens", "host_ns")
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_NS_FIELD_NUMBER: _ClassVar[int]
    RESULT_NS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HOST_NS_FIELD_NUMBER: _ClassVar[int]
    step_index: int
    shape: _step_pb2.StepShape
    dispatch_ns: int
    result_ns: int
    generated_tokens: int
    host_ns: int
    def __init__(self, step_index: _Optional[int] = ..., shape: _Optional[_Union[_step_pb2.StepShape, _Mapping]] = ..., dispatch_ns: _Optional[int] = ..., result_ns: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., host_ns: _Optional[int] = ...) -> None: ...

class DeviceSteps(_message.Message):
    __slots__ = ("base_ns", "steps", "hook_ns", "writer_cpu_ns")
    BASE_NS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    HOOK_NS_FIELD_NUMBER: _ClassVar[int]
    WRITER_CPU_NS_FIELD_NUMBER: _ClassVar[int]
    base_ns: int
    steps: _containers.RepeatedCompositeFieldContainer[DeviceStep]
    hook_ns: int
    writer_cpu_ns: int
    def __init__(self, base_ns: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[DeviceStep, _Mapping]]] = ..., hook_ns: _Optional[int] = ..., writer_cpu_ns: _Optional[int] = ...) -> None: ...

class DeviceStep(_message.Message):
    __slots__ = ("step_index", "total_tokens", "entry_ns", "start_ns", "end_ns", "return_ns", "was_idle")
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENTRY_NS_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    END_NS_FIELD_NUMBER: _ClassVar[int]
    RETURN_NS_FIELD_NUMBER: _ClassVar[int]
    WAS_IDLE_FIELD_NUMBER: _ClassVar[int]
    step_index: int
    total_tokens: int
    entry_ns: int
    start_ns: int
    end_ns: int
    return_ns: int
    was_idle: bool
    def __init__(self, step_index: _Optional[int] = ..., total_tokens: _Optional[int] = ..., entry_ns: _Optional[int] = ..., start_ns: _Optional[int] = ..., end_ns: _Optional[int] = ..., return_ns: _Optional[int] = ..., was_idle: bool = ...) -> None: ...
