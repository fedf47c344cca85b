from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Support(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUPPORT_UNSPECIFIED: _ClassVar[Support]
    SUPPORT_EXACT: _ClassVar[Support]
    SUPPORT_INTERPOLATED: _ClassVar[Support]
    SUPPORT_EXTRAPOLATED: _ClassVar[Support]

class Knowledge(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KNOWLEDGE_UNSPECIFIED: _ClassVar[Knowledge]
    KNOWLEDGE_MEASURED: _ClassVar[Knowledge]
    KNOWLEDGE_INTERPOLATED: _ClassVar[Knowledge]
    KNOWLEDGE_MODELLED: _ClassVar[Knowledge]
    KNOWLEDGE_EXTRAPOLATED: _ClassVar[Knowledge]
    KNOWLEDGE_SPEED_OF_LIGHT: _ClassVar[Knowledge]

class LengthSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LENGTH_SOURCE_UNSPECIFIED: _ClassVar[LengthSource]
    LENGTH_SOURCE_IGNORE_EOS: _ClassVar[LengthSource]
    LENGTH_SOURCE_HINT: _ClassVar[LengthSource]
    LENGTH_SOURCE_TABLE: _ClassVar[LengthSource]
    LENGTH_SOURCE_NONE: _ClassVar[LengthSource]
SUPPORT_UNSPECIFIED: Support
SUPPORT_EXACT: Support
SUPPORT_INTERPOLATED: Support
SUPPORT_EXTRAPOLATED: Support
KNOWLEDGE_UNSPECIFIED: Knowledge
KNOWLEDGE_MEASURED: Knowledge
KNOWLEDGE_INTERPOLATED: Knowledge
KNOWLEDGE_MODELLED: Knowledge
KNOWLEDGE_EXTRAPOLATED: Knowledge
KNOWLEDGE_SPEED_OF_LIGHT: Knowledge
LENGTH_SOURCE_UNSPECIFIED: LengthSource
LENGTH_SOURCE_IGNORE_EOS: LengthSource
LENGTH_SOURCE_HINT: LengthSource
LENGTH_SOURCE_TABLE: LengthSource
LENGTH_SOURCE_NONE: LengthSource

class StepShape(_message.Message):
    __slots__ = ("prefill_chunks", "num_decode_requests", "num_decode_tokens", "num_draft_tokens", "decode_context_tokens", "max_decode_context_tokens", "concurrency", "previous_prefill_tokens", "new_requests", "num_loras")
    PREFILL_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_LORAS_FIELD_NUMBER: _ClassVar[int]
    prefill_chunks: _containers.RepeatedCompositeFieldContainer[PrefillChunk]
    num_decode_requests: int
    num_decode_tokens: int
    num_draft_tokens: _containers.RepeatedScalarFieldContainer[int]
    decode_context_tokens: int
    max_decode_context_tokens: int
    concurrency: int
    previous_prefill_tokens: int
    new_requests: _containers.RepeatedCompositeFieldContainer[NewRequest]
    num_loras: int
    def __init__(self, prefill_chunks: _Optional[_Iterable[_Union[PrefillChunk, _Mapping]]] = ..., num_decode_requests: _Optional[int] = ..., num_decode_tokens: _Optional[int] = ..., num_draft_tokens: _Optional[_Iterable[int]] = ..., decode_context_tokens: _Optional[int] = ..., max_decode_context_tokens: _Optional[int] = ..., concurrency: _Optional[int] = ..., previous_prefill_tokens: _Optional[int] = ..., new_requests: _Optional[_Iterable[_Union[NewRequest, _Mapping]]] = ..., num_loras: _Optional[int] = ...) -> None: ...

class PrefillChunk(_message.Message):
    __slots__ = ("num_tokens", "context_tokens")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    context_tokens: int
    def __init__(self, num_tokens: _Optional[int] = ..., context_tokens: _Optional[int] = ...) -> None: ...

class NewRequest(_message.Message):
    __slots__ = ("request_key", "prompt_tokens", "max_tokens", "min_tokens", "ignore_eos", "output_tokens_hint", "priority", "lora", "length_class")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_HINT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    LENGTH_CLASS_FIELD_NUMBER: _ClassVar[int]
    request_key: str
    prompt_tokens: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    output_tokens_hint: int
    priority: int
    lora: str
    length_class: str
    def __init__(self, request_key: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., ignore_eos: bool = ..., output_tokens_hint: _Optional[int] = ..., priority: _Optional[int] = ..., lora: _Optional[str] = ..., length_class: _Optional[str] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("step_index", "shape", "device_time_ns", "device_idle_ns")
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDLE_NS_FIELD_NUMBER: _ClassVar[int]
    step_index: int
    shape: StepShape
    device_time_ns: int
    device_idle_ns: int
    def __init__(self, step_index: _Optional[int] = ..., shape: _Optional[_Union[StepShape, _Mapping]] = ..., device_time_ns: _Optional[int] = ..., device_idle_ns: _Optional[int] = ...) -> None: ...

class TargetOutputTokens(_message.Message):
    __slots__ = ("output_tokens", "source")
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    output_tokens: int
    source: LengthSource
    def __init__(self, output_tokens: _Optional[int] = ..., source: _Optional[_Union[LengthSource, str]] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("step_index", "latency_ns", "prep_ns", "copy_ns", "generated_tokens", "accepted_draft_tokens", "target_output_tokens", "generation", "support", "knowledge", "support_distance", "lease", "injected_error", "injected_stall_ns", "host_ns")
    STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    LATENCY_NS_FIELD_NUMBER: _ClassVar[int]
    PREP_NS_FIELD_NUMBER: _ClassVar[int]
    COPY_NS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TARGET_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_FIELD_NUMBER: _ClassVar[int]
    KNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    INJECTED_ERROR_FIELD_NUMBER: _ClassVar[int]
    INJECTED_STALL_NS_FIELD_NUMBER: _ClassVar[int]
    HOST_NS_FIELD_NUMBER: _ClassVar[int]
    step_index: int
    latency_ns: _containers.RepeatedScalarFieldContainer[int]
    prep_ns: int
    copy_ns: int
    generated_tokens: int
    accepted_draft_tokens: _containers.RepeatedScalarFieldContainer[int]
    target_output_tokens: _containers.RepeatedCompositeFieldContainer[TargetOutputTokens]
    generation: int
    support: Support
    knowledge: Knowledge
    support_distance: float
    lease: Lease
    injected_error: bool
    injected_stall_ns: int
    host_ns: int
    def __init__(self, step_index: _Optional[int] = ..., latency_ns: _Optional[_Iterable[int]] = ..., prep_ns: _Optional[int] = ..., copy_ns: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., accepted_draft_tokens: _Optional[_Iterable[int]] = ..., target_output_tokens: _Optional[_Iterable[_Union[TargetOutputTokens, _Mapping]]] = ..., generation: _Optional[int] = ..., support: _Optional[_Union[Support, str]] = ..., knowledge: _Optional[_Union[Knowledge, str]] = ..., support_distance: _Optional[float] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., injected_error: bool = ..., injected_stall_ns: _Optional[int] = ..., host_ns: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("num_decode_requests", "context_tokens_begin", "context_tokens_end", "max_context_tokens_begin", "max_context_tokens_end", "intercept_ns", "slope_ns_per_context_token", "slope_ns_per_max_context_token", "residual_pool", "generation", "lease_id", "prep_ns", "copy_ns", "support", "knowledge", "draw_key", "support_distance", "not_after_prefill", "pool_id", "latency_pool_ns", "host_ns")
    NUM_DECODE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_BEGIN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_END_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_BEGIN_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_END_FIELD_NUMBER: _ClassVar[int]
    INTERCEPT_NS_FIELD_NUMBER: _ClassVar[int]
    SLOPE_NS_PER_CONTEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SLOPE_NS_PER_MAX_CONTEXT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_POOL_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PREP_NS_FIELD_NUMBER: _ClassVar[int]
    COPY_NS_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_FIELD_NUMBER: _ClassVar[int]
    KNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    DRAW_KEY_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_DISTANCE_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_PREFILL_FIELD_NUMBER: _ClassVar[int]
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    LATENCY_POOL_NS_FIELD_NUMBER: _ClassVar[int]
    HOST_NS_FIELD_NUMBER: _ClassVar[int]
    num_decode_requests: int
    context_tokens_begin: int
    context_tokens_end: int
    max_context_tokens_begin: int
    max_context_tokens_end: int
    intercept_ns: float
    slope_ns_per_context_token: float
    slope_ns_per_max_context_token: float
    residual_pool: _containers.RepeatedScalarFieldContainer[float]
    generation: int
    lease_id: int
    prep_ns: int
    copy_ns: int
    support: Support
    knowledge: Knowledge
    draw_key: int
    support_distance: float
    not_after_prefill: bool
    pool_id: int
    latency_pool_ns: _containers.RepeatedScalarFieldContainer[int]
    host_ns: int
    def __init__(self, num_decode_requests: _Optional[int] = ..., context_tokens_begin: _Optional[int] = ..., context_tokens_end: _Optional[int] = ..., max_context_tokens_begin: _Optional[int] = ..., max_context_tokens_end: _Optional[int] = ..., intercept_ns: _Optional[float] = ..., slope_ns_per_context_token: _Optional[float] = ..., slope_ns_per_max_context_token: _Optional[float] = ..., residual_pool: _Optional[_Iterable[float]] = ..., generation: _Optional[int] = ..., lease_id: _Optional[int] = ..., prep_ns: _Optional[int] = ..., copy_ns: _Optional[int] = ..., support: _Optional[_Union[Support, str]] = ..., knowledge: _Optional[_Union[Knowledge, str]] = ..., draw_key: _Optional[int] = ..., support_distance: _Optional[float] = ..., not_after_prefill: bool = ..., pool_id: _Optional[int] = ..., latency_pool_ns: _Optional[_Iterable[int]] = ..., host_ns: _Optional[int] = ...) -> None: ...
