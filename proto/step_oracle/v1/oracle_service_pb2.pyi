from step_oracle.v1 import step_pb2 as _step_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvBlocksSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_BLOCKS_SOURCE_UNSPECIFIED: _ClassVar[KvBlocksSource]
    KV_BLOCKS_SOURCE_ENGINE_OVERRIDE: _ClassVar[KvBlocksSource]
    KV_BLOCKS_SOURCE_PACK: _ClassVar[KvBlocksSource]
    KV_BLOCKS_SOURCE_SCALED: _ClassVar[KvBlocksSource]
KV_BLOCKS_SOURCE_UNSPECIFIED: KvBlocksSource
KV_BLOCKS_SOURCE_ENGINE_OVERRIDE: KvBlocksSource
KV_BLOCKS_SOURCE_PACK: KvBlocksSource
KV_BLOCKS_SOURCE_SCALED: KvBlocksSource

class EngineIdentity(_message.Message):
    __slots__ = ("experiment", "engine_id", "labels", "model", "tensor_parallel_size")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    experiment: str
    engine_id: str
    labels: _containers.ScalarMap[str, str]
    model: str
    tensor_parallel_size: int
    def __init__(self, experiment: _Optional[str] = ..., engine_id: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., model: _Optional[str] = ..., tensor_parallel_size: _Optional[int] = ...) -> None: ...

class GetDeviceRequest(_message.Message):
    __slots__ = ("engine",)
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    engine: EngineIdentity
    def __init__(self, engine: _Optional[_Union[EngineIdentity, _Mapping]] = ...) -> None: ...

class GetDeviceResponse(_message.Message):
    __slots__ = ("device", "generation", "pack_digest", "block_size", "model_runner")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PACK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODEL_RUNNER_FIELD_NUMBER: _ClassVar[int]
    device: DeviceDescription
    generation: int
    pack_digest: str
    block_size: int
    model_runner: str
    def __init__(self, device: _Optional[_Union[DeviceDescription, _Mapping]] = ..., generation: _Optional[int] = ..., pack_digest: _Optional[str] = ..., block_size: _Optional[int] = ..., model_runner: _Optional[str] = ...) -> None: ...

class DeviceDescription(_message.Message):
    __slots__ = ("name", "memory_bytes", "capability_major", "capability_minor")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_MAJOR_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_MINOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    memory_bytes: int
    capability_major: int
    capability_minor: int
    def __init__(self, name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., capability_major: _Optional[int] = ..., capability_minor: _Optional[int] = ...) -> None: ...

class EngineConfig(_message.Message):
    __slots__ = ("vllm_version", "shim_version", "model", "model_shape", "dtype", "quantization", "kv_cache_dtype", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "async_scheduling", "prefix_caching", "chunked_prefill", "gpu_memory_utilization", "num_gpu_blocks_override", "kv_cache_memory_bytes", "kv_bytes_per_token", "num_speculative_tokens", "speculative_method", "graph_capture_sizes", "num_kv_blocks")
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHIM_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ASYNC_SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHING_FIELD_NUMBER: _ClassVar[int]
    CHUNKED_PREFILL_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    NUM_GPU_BLOCKS_OVERRIDE_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_SPECULATIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPECULATIVE_METHOD_FIELD_NUMBER: _ClassVar[int]
    GRAPH_CAPTURE_SIZES_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    vllm_version: str
    shim_version: str
    model: str
    model_shape: str
    dtype: str
    quantization: str
    kv_cache_dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    async_scheduling: bool
    prefix_caching: bool
    chunked_prefill: bool
    gpu_memory_utilization: float
    num_gpu_blocks_override: int
    kv_cache_memory_bytes: int
    kv_bytes_per_token: int
    num_speculative_tokens: int
    speculative_method: str
    graph_capture_sizes: _containers.RepeatedScalarFieldContainer[int]
    num_kv_blocks: int
    def __init__(self, vllm_version: _Optional[str] = ..., shim_version: _Optional[str] = ..., model: _Optional[str] = ..., model_shape: _Optional[str] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., kv_cache_dtype: _Optional[str] = ..., tensor_parallel_size: _Optional[int] = ..., pipeline_parallel_size: _Optional[int] = ..., data_parallel_size: _Optional[int] = ..., block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., async_scheduling: bool = ..., prefix_caching: bool = ..., chunked_prefill: bool = ..., gpu_memory_utilization: _Optional[float] = ..., num_gpu_blocks_override: _Optional[int] = ..., kv_cache_memory_bytes: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., num_speculative_tokens: _Optional[int] = ..., speculative_method: _Optional[str] = ..., graph_capture_sizes: _Optional[_Iterable[int]] = ..., num_kv_blocks: _Optional[int] = ...) -> None: ...

class AttachEngineRequest(_message.Message):
    __slots__ = ("engine", "config", "device_generation", "allow_mismatch")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    DEVICE_GENERATION_FIELD_NUMBER: _ClassVar[int]
    ALLOW_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    engine: EngineIdentity
    config: EngineConfig
    device_generation: int
    allow_mismatch: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engine: _Optional[_Union[EngineIdentity, _Mapping]] = ..., config: _Optional[_Union[EngineConfig, _Mapping]] = ..., device_generation: _Optional[int] = ..., allow_mismatch: _Optional[_Iterable[str]] = ...) -> None: ...

class AttachEngineResponse(_message.Message):
    __slots__ = ("incarnation", "generation", "pack_digest", "num_kv_blocks", "kv_blocks_source", "kv_blocks_basis", "differences", "warnings")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PACK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_SOURCE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_BASIS_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    generation: int
    pack_digest: str
    num_kv_blocks: int
    kv_blocks_source: KvBlocksSource
    kv_blocks_basis: str
    differences: _containers.RepeatedCompositeFieldContainer[ManifestDifference]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, incarnation: _Optional[int] = ..., generation: _Optional[int] = ..., pack_digest: _Optional[str] = ..., num_kv_blocks: _Optional[int] = ..., kv_blocks_source: _Optional[_Union[KvBlocksSource, str]] = ..., kv_blocks_basis: _Optional[str] = ..., differences: _Optional[_Iterable[_Union[ManifestDifference, _Mapping]]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class ManifestDifference(_message.Message):
    __slots__ = ("field", "pack_value", "engine_value", "severity")
    class Severity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        SEVERITY_UNSPECIFIED: _ClassVar[ManifestDifference.Severity]
        SEVERITY_WARN: _ClassVar[ManifestDifference.Severity]
        SEVERITY_REFUSE: _ClassVar[ManifestDifference.Severity]
    SEVERITY_UNSPECIFIED: ManifestDifference.Severity
    SEVERITY_WARN: ManifestDifference.Severity
    SEVERITY_REFUSE: ManifestDifference.Severity
    FIELD_FIELD_NUMBER: _ClassVar[int]
    PACK_VALUE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VALUE_FIELD_NUMBER: _ClassVar[int]
    SEVERITY_FIELD_NUMBER: _ClassVar[int]
    field: str
    pack_value: str
    engine_value: str
    severity: ManifestDifference.Severity
    def __init__(self, field: _Optional[str] = ..., pack_value: _Optional[str] = ..., engine_value: _Optional[str] = ..., severity: _Optional[_Union[ManifestDifference.Severity, str]] = ...) -> None: ...

class StreamStepsRequest(_message.Message):
    __slots__ = ("open", "steps", "min_generation", "counts")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MIN_GENERATION_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    open: StreamOpen
    steps: _containers.RepeatedCompositeFieldContainer[_step_pb2.StepRequest]
    min_generation: int
    counts: ShimCounts
    def __init__(self, open: _Optional[_Union[StreamOpen, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[_step_pb2.StepRequest, _Mapping]]] = ..., min_generation: _Optional[int] = ..., counts: _Optional[_Union[ShimCounts, _Mapping]] = ...) -> None: ...

class StreamOpen(_message.Message):
    __slots__ = ("engine", "config", "incarnation", "allow_mismatch", "leases")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ALLOW_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    engine: EngineIdentity
    config: EngineConfig
    incarnation: int
    allow_mismatch: _containers.RepeatedScalarFieldContainer[str]
    leases: bool
    def __init__(self, engine: _Optional[_Union[EngineIdentity, _Mapping]] = ..., config: _Optional[_Union[EngineConfig, _Mapping]] = ..., incarnation: _Optional[int] = ..., allow_mismatch: _Optional[_Iterable[str]] = ..., leases: bool = ...) -> None: ...

class ShimCounts(_message.Message):
    __slots__ = ("steps", "leased_steps", "last_leased_step_index", "late_answers", "late_answer_ns", "lateness_buckets", "lateness_sum_ns", "reconnects", "leased_steps_by_support")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LEASED_STEPS_FIELD_NUMBER: _ClassVar[int]
    LAST_LEASED_STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    LATE_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    LATE_ANSWER_NS_FIELD_NUMBER: _ClassVar[int]
    LATENESS_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    LATENESS_SUM_NS_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    LEASED_STEPS_BY_SUPPORT_FIELD_NUMBER: _ClassVar[int]
    steps: int
    leased_steps: int
    last_leased_step_index: int
    late_answers: int
    late_answer_ns: int
    lateness_buckets: _containers.RepeatedScalarFieldContainer[int]
    lateness_sum_ns: int
    reconnects: int
    leased_steps_by_support: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, steps: _Optional[int] = ..., leased_steps: _Optional[int] = ..., last_leased_step_index: _Optional[int] = ..., late_answers: _Optional[int] = ..., late_answer_ns: _Optional[int] = ..., lateness_buckets: _Optional[_Iterable[int]] = ..., lateness_sum_ns: _Optional[int] = ..., reconnects: _Optional[int] = ..., leased_steps_by_support: _Optional[_Iterable[int]] = ...) -> None: ...

class StreamStepsResponse(_message.Message):
    __slots__ = ("opened", "replies", "new_generation")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    NEW_GENERATION_FIELD_NUMBER: _ClassVar[int]
    opened: StreamOpened
    replies: _containers.RepeatedCompositeFieldContainer[_step_pb2.StepReply]
    new_generation: int
    def __init__(self, opened: _Optional[_Union[StreamOpened, _Mapping]] = ..., replies: _Optional[_Iterable[_Union[_step_pb2.StepReply, _Mapping]]] = ..., new_generation: _Optional[int] = ...) -> None: ...

class StreamOpened(_message.Message):
    __slots__ = ("incarnation", "generation")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    generation: int
    def __init__(self, incarnation: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class SampleStepRequest(_message.Message):
    __slots__ = ("engine", "steps", "min_generation")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MIN_GENERATION_FIELD_NUMBER: _ClassVar[int]
    engine: EngineIdentity
    steps: _containers.RepeatedCompositeFieldContainer[_step_pb2.StepRequest]
    min_generation: int
    def __init__(self, engine: _Optional[_Union[EngineIdentity, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[_step_pb2.StepRequest, _Mapping]]] = ..., min_generation: _Optional[int] = ...) -> None: ...

class SampleStepResponse(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[_step_pb2.StepReply]
    def __init__(self, replies: _Optional[_Iterable[_Union[_step_pb2.StepReply, _Mapping]]] = ...) -> None: ...
