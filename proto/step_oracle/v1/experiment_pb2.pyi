from google.protobuf import timestamp_pb2 as _timestamp_pb2
from step_oracle.v1 import step_pb2 as _step_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SupportPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUPPORT_POLICY_UNSPECIFIED: _ClassVar[SupportPolicy]
    SUPPORT_POLICY_SERVE: _ClassVar[SupportPolicy]
    SUPPORT_POLICY_REFUSE: _ClassVar[SupportPolicy]
SUPPORT_POLICY_UNSPECIFIED: SupportPolicy
SUPPORT_POLICY_SERVE: SupportPolicy
SUPPORT_POLICY_REFUSE: SupportPolicy

class Experiment(_message.Message):
    __slots__ = ("name", "generation", "binding", "create_time", "update_time", "attached_engines")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_ENGINES_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    binding: Binding
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    attached_engines: int
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ..., binding: _Optional[_Union[Binding, _Mapping]] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., attached_engines: _Optional[int] = ...) -> None: ...

class Binding(_message.Message):
    __slots__ = ("rules", "default_pack_digest", "seed", "support_policy", "length_table", "draft_acceptance_rate", "time_scale", "overlays", "shadow_pack_digest")
    RULES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PACK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_POLICY_FIELD_NUMBER: _ClassVar[int]
    LENGTH_TABLE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_ACCEPTANCE_RATE_FIELD_NUMBER: _ClassVar[int]
    TIME_SCALE_FIELD_NUMBER: _ClassVar[int]
    OVERLAYS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_PACK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedCompositeFieldContainer[Rule]
    default_pack_digest: str
    seed: int
    support_policy: SupportPolicy
    length_table: LengthTable
    draft_acceptance_rate: float
    time_scale: float
    overlays: _containers.RepeatedCompositeFieldContainer[Overlay]
    shadow_pack_digest: str
    def __init__(self, rules: _Optional[_Iterable[_Union[Rule, _Mapping]]] = ..., default_pack_digest: _Optional[str] = ..., seed: _Optional[int] = ..., support_policy: _Optional[_Union[SupportPolicy, str]] = ..., length_table: _Optional[_Union[LengthTable, _Mapping]] = ..., draft_acceptance_rate: _Optional[float] = ..., time_scale: _Optional[float] = ..., overlays: _Optional[_Iterable[_Union[Overlay, _Mapping]]] = ..., shadow_pack_digest: _Optional[str] = ...) -> None: ...

class Rule(_message.Message):
    __slots__ = ("labels", "model", "tensor_parallel_size", "fraction", "fraction_salt", "pack_digest")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    FRACTION_SALT_FIELD_NUMBER: _ClassVar[int]
    PACK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.ScalarMap[str, str]
    model: str
    tensor_parallel_size: int
    fraction: float
    fraction_salt: str
    pack_digest: str
    def __init__(self, labels: _Optional[_Mapping[str, str]] = ..., model: _Optional[str] = ..., tensor_parallel_size: _Optional[int] = ..., fraction: _Optional[float] = ..., fraction_salt: _Optional[str] = ..., pack_digest: _Optional[str] = ...) -> None: ...

class Overlay(_message.Message):
    __slots__ = ("labels", "fraction", "fraction_salt", "slow_down_factor", "stall_every_steps", "stall_ns", "error_every_steps", "degradation_per_hour", "begin_step_index", "end_step_index", "begin_device_time_ns", "end_device_time_ns", "engine_ids")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LABELS_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    FRACTION_SALT_FIELD_NUMBER: _ClassVar[int]
    SLOW_DOWN_FACTOR_FIELD_NUMBER: _ClassVar[int]
    STALL_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    STALL_NS_FIELD_NUMBER: _ClassVar[int]
    ERROR_EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEGRADATION_PER_HOUR_FIELD_NUMBER: _ClassVar[int]
    BEGIN_STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    END_STEP_INDEX_FIELD_NUMBER: _ClassVar[int]
    BEGIN_DEVICE_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    END_DEVICE_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_IDS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.ScalarMap[str, str]
    fraction: float
    fraction_salt: str
    slow_down_factor: float
    stall_every_steps: int
    stall_ns: int
    error_every_steps: int
    degradation_per_hour: float
    begin_step_index: int
    end_step_index: int
    begin_device_time_ns: int
    end_device_time_ns: int
    engine_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, labels: _Optional[_Mapping[str, str]] = ..., fraction: _Optional[float] = ..., fraction_salt: _Optional[str] = ..., slow_down_factor: _Optional[float] = ..., stall_every_steps: _Optional[int] = ..., stall_ns: _Optional[int] = ..., error_every_steps: _Optional[int] = ..., degradation_per_hour: _Optional[float] = ..., begin_step_index: _Optional[int] = ..., end_step_index: _Optional[int] = ..., begin_device_time_ns: _Optional[int] = ..., end_device_time_ns: _Optional[int] = ..., engine_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class LengthTable(_message.Message):
    __slots__ = ("classes", "provenance")
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    classes: _containers.RepeatedCompositeFieldContainer[LengthClass]
    provenance: str
    def __init__(self, classes: _Optional[_Iterable[_Union[LengthClass, _Mapping]]] = ..., provenance: _Optional[str] = ...) -> None: ...

class LengthClass(_message.Message):
    __slots__ = ("name", "prompt_bin_begin", "quantile_tokens", "quantiles_per_bin")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_BIN_BEGIN_FIELD_NUMBER: _ClassVar[int]
    QUANTILE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUANTILES_PER_BIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    prompt_bin_begin: _containers.RepeatedScalarFieldContainer[int]
    quantile_tokens: _containers.RepeatedScalarFieldContainer[float]
    quantiles_per_bin: int
    def __init__(self, name: _Optional[str] = ..., prompt_bin_begin: _Optional[_Iterable[int]] = ..., quantile_tokens: _Optional[_Iterable[float]] = ..., quantiles_per_bin: _Optional[int] = ...) -> None: ...

class CreateExperimentRequest(_message.Message):
    __slots__ = ("parent", "experiment_id", "binding", "comment")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_ID_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    parent: str
    experiment_id: str
    binding: Binding
    comment: str
    def __init__(self, parent: _Optional[str] = ..., experiment_id: _Optional[str] = ..., binding: _Optional[_Union[Binding, _Mapping]] = ..., comment: _Optional[str] = ...) -> None: ...

class CreateExperimentResponse(_message.Message):
    __slots__ = ("experiment",)
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    experiment: Experiment
    def __init__(self, experiment: _Optional[_Union[Experiment, _Mapping]] = ...) -> None: ...

class GetExperimentRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetExperimentResponse(_message.Message):
    __slots__ = ("experiment",)
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    experiment: Experiment
    def __init__(self, experiment: _Optional[_Union[Experiment, _Mapping]] = ...) -> None: ...

class ListExperimentsRequest(_message.Message):
    __slots__ = ("parent", "page_size", "page_token")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    parent: str
    page_size: int
    page_token: str
    def __init__(self, parent: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListExperimentsResponse(_message.Message):
    __slots__ = ("experiments", "next_page_token")
    EXPERIMENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    experiments: _containers.RepeatedCompositeFieldContainer[Experiment]
    next_page_token: str
    def __init__(self, experiments: _Optional[_Iterable[_Union[Experiment, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ActivateExperimentRequest(_message.Message):
    __slots__ = ("name", "binding", "expected_generation", "allow_mismatch", "validate_only", "comment")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    ALLOW_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    binding: Binding
    expected_generation: int
    allow_mismatch: _containers.RepeatedScalarFieldContainer[str]
    validate_only: bool
    comment: str
    def __init__(self, name: _Optional[str] = ..., binding: _Optional[_Union[Binding, _Mapping]] = ..., expected_generation: _Optional[int] = ..., allow_mismatch: _Optional[_Iterable[str]] = ..., validate_only: bool = ..., comment: _Optional[str] = ...) -> None: ...

class ActivateExperimentResponse(_message.Message):
    __slots__ = ("experiment", "warnings")
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    experiment: Experiment
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, experiment: _Optional[_Union[Experiment, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class RollBackExperimentRequest(_message.Message):
    __slots__ = ("name", "to_generation", "expected_generation", "allow_mismatch", "comment")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TO_GENERATION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    ALLOW_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    to_generation: int
    expected_generation: int
    allow_mismatch: _containers.RepeatedScalarFieldContainer[str]
    comment: str
    def __init__(self, name: _Optional[str] = ..., to_generation: _Optional[int] = ..., expected_generation: _Optional[int] = ..., allow_mismatch: _Optional[_Iterable[str]] = ..., comment: _Optional[str] = ...) -> None: ...

class RollBackExperimentResponse(_message.Message):
    __slots__ = ("experiment",)
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    experiment: Experiment
    def __init__(self, experiment: _Optional[_Union[Experiment, _Mapping]] = ...) -> None: ...

class WatchExperimentRequest(_message.Message):
    __slots__ = ("name", "after_generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    AFTER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    after_generation: int
    def __init__(self, name: _Optional[str] = ..., after_generation: _Optional[int] = ...) -> None: ...

class WatchExperimentResponse(_message.Message):
    __slots__ = ("experiment",)
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    experiment: Experiment
    def __init__(self, experiment: _Optional[_Union[Experiment, _Mapping]] = ...) -> None: ...

class ListGenerationsRequest(_message.Message):
    __slots__ = ("name", "page_size", "page_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_size: int
    page_token: str
    def __init__(self, name: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListGenerationsResponse(_message.Message):
    __slots__ = ("generations", "next_page_token")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    generations: _containers.RepeatedCompositeFieldContainer[GenerationRecord]
    next_page_token: str
    def __init__(self, generations: _Optional[_Iterable[_Union[GenerationRecord, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GenerationRecord(_message.Message):
    __slots__ = ("generation", "binding", "create_time", "reason", "principal", "comment")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    binding: Binding
    create_time: _timestamp_pb2.Timestamp
    reason: str
    principal: str
    comment: str
    def __init__(self, generation: _Optional[int] = ..., binding: _Optional[_Union[Binding, _Mapping]] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., reason: _Optional[str] = ..., principal: _Optional[str] = ..., comment: _Optional[str] = ...) -> None: ...

class ListEnginesRequest(_message.Message):
    __slots__ = ("parent",)
    PARENT_FIELD_NUMBER: _ClassVar[int]
    parent: str
    def __init__(self, parent: _Optional[str] = ...) -> None: ...

class ListEnginesResponse(_message.Message):
    __slots__ = ("engines",)
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[AttachedEngine]
    def __init__(self, engines: _Optional[_Iterable[_Union[AttachedEngine, _Mapping]]] = ...) -> None: ...

class AttachedEngine(_message.Message):
    __slots__ = ("engine_id", "incarnation", "pack_digest", "generation", "model", "vllm_version", "labels", "streaming", "steps", "extrapolated_steps", "late_answers", "leased_steps", "reconnects", "degraded", "lateness_buckets", "lateness_sum_ns")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PACK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    STREAMING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    EXTRAPOLATED_STEPS_FIELD_NUMBER: _ClassVar[int]
    LATE_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    LEASED_STEPS_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    LATENESS_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    LATENESS_SUM_NS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    incarnation: int
    pack_digest: str
    generation: int
    model: str
    vllm_version: str
    labels: _containers.ScalarMap[str, str]
    streaming: bool
    steps: int
    extrapolated_steps: int
    late_answers: int
    leased_steps: int
    reconnects: int
    degraded: bool
    lateness_buckets: _containers.RepeatedScalarFieldContainer[int]
    lateness_sum_ns: int
    def __init__(self, engine_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., pack_digest: _Optional[str] = ..., generation: _Optional[int] = ..., model: _Optional[str] = ..., vllm_version: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., streaming: bool = ..., steps: _Optional[int] = ..., extrapolated_steps: _Optional[int] = ..., late_answers: _Optional[int] = ..., leased_steps: _Optional[int] = ..., reconnects: _Optional[int] = ..., degraded: bool = ..., lateness_buckets: _Optional[_Iterable[int]] = ..., lateness_sum_ns: _Optional[int] = ...) -> None: ...

class DeleteExperimentRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteExperimentResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetShadowReportRequest(_message.Message):
    __slots__ = ("name", "generation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    generation: int
    def __init__(self, name: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class GetShadowReportResponse(_message.Message):
    __slots__ = ("generation", "shadow_pack_digest", "regions", "engines")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SHADOW_PACK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    shadow_pack_digest: str
    regions: _containers.RepeatedCompositeFieldContainer[ShadowRegion]
    engines: _containers.RepeatedCompositeFieldContainer[ShadowedEngine]
    def __init__(self, generation: _Optional[int] = ..., shadow_pack_digest: _Optional[str] = ..., regions: _Optional[_Iterable[_Union[ShadowRegion, _Mapping]]] = ..., engines: _Optional[_Iterable[_Union[ShadowedEngine, _Mapping]]] = ...) -> None: ...

class ShadowedEngine(_message.Message):
    __slots__ = ("engine_id", "pack_digest", "regions")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PACK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    pack_digest: str
    regions: _containers.RepeatedCompositeFieldContainer[ShadowRegion]
    def __init__(self, engine_id: _Optional[str] = ..., pack_digest: _Optional[str] = ..., regions: _Optional[_Iterable[_Union[ShadowRegion, _Mapping]]] = ...) -> None: ...

class ShadowRegion(_message.Message):
    __slots__ = ("mixed", "support", "shadow_support", "steps", "latency_ns", "shadow_latency_ns", "absolute_difference_ns", "min_difference_ns", "max_difference_ns", "longer_steps", "shorter_steps", "relative_difference_buckets")
    MIXED_FIELD_NUMBER: _ClassVar[int]
    SUPPORT_FIELD_NUMBER: _ClassVar[int]
    SHADOW_SUPPORT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_NS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_LATENCY_NS_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_DIFFERENCE_NS_FIELD_NUMBER: _ClassVar[int]
    MIN_DIFFERENCE_NS_FIELD_NUMBER: _ClassVar[int]
    MAX_DIFFERENCE_NS_FIELD_NUMBER: _ClassVar[int]
    LONGER_STEPS_FIELD_NUMBER: _ClassVar[int]
    SHORTER_STEPS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_DIFFERENCE_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    mixed: bool
    support: _step_pb2.Support
    shadow_support: _step_pb2.Support
    steps: int
    latency_ns: int
    shadow_latency_ns: int
    absolute_difference_ns: int
    min_difference_ns: int
    max_difference_ns: int
    longer_steps: int
    shorter_steps: int
    relative_difference_buckets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, mixed: bool = ..., support: _Optional[_Union[_step_pb2.Support, str]] = ..., shadow_support: _Optional[_Union[_step_pb2.Support, str]] = ..., steps: _Optional[int] = ..., latency_ns: _Optional[int] = ..., shadow_latency_ns: _Optional[int] = ..., absolute_difference_ns: _Optional[int] = ..., min_difference_ns: _Optional[int] = ..., max_difference_ns: _Optional[int] = ..., longer_steps: _Optional[int] = ..., shorter_steps: _Optional[int] = ..., relative_difference_buckets: _Optional[_Iterable[int]] = ...) -> None: ...
