"""What `uses.py` cannot read out of our source, each with the file of ours that relies on it.

Also which absences and other forms we are ready for: everything not listed here counts against a release.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiler.vllm_check.own_source import Name
from profiler.vllm_check.uses import Use

_WORKERS = (("vllm.v1.worker.gpu_worker", "Worker"), ("vllm.v1.worker.cpu_worker", "CPUWorker"))
_SCHEDULERS = (("vllm.v1.core.sched.scheduler", "Scheduler"), ("vllm.v1.core.sched.async_scheduler", "AsyncScheduler"))

# Our classes whose base is chosen while running: the bases it may be.
CHOSEN_BASES: dict[Name, tuple[Name, ...]] = {
    ("profiler.capture.worker", "CaptureWorker"): _WORKERS,
    ("profiler.capture.scheduler", "CaptureScheduler"): _SCHEDULERS,
}


def _needed(part: str, where: str, root: Name, *paths: str) -> list[Use]:
    return [Use(part, where, root, tuple(path.split("."))) for path in paths]


# Read through values whose type our source does not name.
NEEDED: tuple[Use, ...] = (
    *_needed("shim", "vllm_shim/kv_cache.py", ("vllm.v1.kv_cache_interface", "FullAttentionSpec"), "page_size_bytes"),
    *_needed("shim", "vllm_shim/kv_cache.py", ("vllm.v1.kv_cache_interface", "MLAAttentionSpec"), "page_size_bytes"),
    *_needed(
        *("shim", "vllm_shim/executor.py", ("vllm.lora.request", "LoRARequest")),
        *("lora_int_id", "lora_name"),
    ),
    *_needed(
        *("replay", "profiler/replay/engine.py", ("vllm.v1.engine", "EngineCoreOutput")),
        *("request_id", "new_token_ids", "finished"),
    ),
    *_needed("replay", "profiler/replay/engine.py", ("vllm.v1.engine", "EngineCoreOutputs"), "outputs"),
    *(
        use
        for worker in _WORKERS
        for use in _needed(
            "capture", "profiler/capture/worker.py", worker, "rank", "device", "vllm_config", "model_runner"
        )
    ),
    *(
        use
        for scheduler in _SCHEDULERS
        for use in _needed("capture", "profiler/capture/scheduler.py", scheduler, "kv_cache_config")
    ),
    *_needed("capture", "profiler/capture/facts.py", ("vllm.v1.kv_cache_interface", "KVCacheTensor"), "size"),
    *_needed("capture", "profiler/capture/worker.py", ("vllm.config", "ParallelConfig"), "worker_cls"),
    *_needed("capture", "profiler/capture/scheduler.py", ("vllm.config", "SchedulerConfig"), "scheduler_cls"),
)


@dataclass(frozen=True)
class Handled:
    """Why it is no fault that a release lacks something."""

    reason: str
    where: str


# Names, attributes and overridden methods a release may lack.
ABSENCES: dict[str, Handled] = {
    "Executor.supports_async_scheduling": Handled(
        "executors that may schedule asynchronously are a list of names: a built-in name is put back after the start",
        "vllm_shim/executor.py",
    ),
    "Platform.import_ir_kernels": Handled("there are no such kernels to keep out", "vllm_shim/platform.py"),
    "Platform.update_block_size_for_backend": Handled(
        "the backend does not change the block size", "vllm_shim/platform.py"
    ),
    "Platform.manual_seed_all": Handled("nobody seeds the device", "vllm_shim/platform.py"),
    "KVCacheLayout": Handled("the worker is not asked for its KV layouts", "vllm_shim/executor.py"),
}


# Overridden for older releases alone: their absence is the newest form, and a behaviour below tells the two apart.
OLDER_HOOKS = frozenset({"Executor.max_concurrent_batches"})


@dataclass(frozen=True)
class Form:
    """One way a function may be written: words that stand in it, and words that do not."""

    label: str
    has: frozenset[str]
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Behavior:
    """A behaviour we rely on that no signature shows. The first form is that of the newest release tested."""

    part: str
    function: str
    about: str
    where: str
    forms: tuple[Form, ...]


def _form(label: str, has: str = "", lacks: str = "") -> Form:
    return Form(label, frozenset(has.split()), frozenset(lacks.split()))


_CORE = "vllm.v1.engine.core:EngineCore"
BEHAVIORS: tuple[Behavior, ...] = (
    Behavior(
        *("shim", "vllm.v1.executor.abstract:Executor.get_class", "a dotted path chooses the executor"),
        "vllm_shim/platform.py",
        (_form("resolved by name", "resolve_obj_by_qualname distributed_executor_backend"),),
    ),
    Behavior(
        *("shim", f"{_CORE}.__init__", "depth of the batch queue"),
        "vllm_shim/executor.py",
        (
            _form(
                "from the configuration", "vllm_config max_concurrent_batches", "model_executor.max_concurrent_batches"
            ),
            _form("from the executor", "model_executor.max_concurrent_batches"),
        ),
    ),
    Behavior(
        *("shim", f"{_CORE}.step_with_batch_queue", "when a step is handed over while another runs"),
        "vllm_shim/timeline.py",
        (
            _form("at once", "sample_tokens execute_model result", "done"),
            _form("while the oldest future is not done()", "sample_tokens execute_model result done"),
        ),
    ),
    Behavior(
        *("shim", "vllm.v1.executor.abstract:Executor.initialize_from_config", "warming up"),
        "vllm_shim/executor.py",
        (
            _form("a call of its own", "initialize_from_config", "compile_or_warm_up_model"),
            _form("part of initialize_from_config", "initialize_from_config compile_or_warm_up_model"),
        ),
    ),
    Behavior(
        *("shim", "vllm.v1.structured_output:StructuredOutputManager.grammar_bitmask", "rows of a grammar mask"),
        "vllm_shim/tokens.py",
        (
            _form("a fixed block per request", "cumulative_index mask_stride"),
            _form("draft tokens + 1 per request", "cumulative_index scheduled_spec_decode_tokens", "mask_stride"),
        ),
    ),
    Behavior(
        *("shim", "vllm.v1.engine.input_processor:InputProcessor.assign_request_id", "suffix of a request id"),
        "vllm_shim/step_shape.py",
        (_form("random, 8 digits", "random_uuid .8 external_req_id"),),
    ),
    Behavior(
        *("shim", "vllm.platforms:resolve_current_platform_cls_qualname", "platform plugins"),
        "vllm_shim/plugin.py",
        (
            _form(
                "VLLM_TARGET_DEVICE=cpu bypasses them",
                "load_plugins_by_group PLATFORM_PLUGINS_GROUP VLLM_TARGET_DEVICE",
            ),
            _form("always asked", "load_plugins_by_group PLATFORM_PLUGINS_GROUP", "VLLM_TARGET_DEVICE"),
        ),
    ),
    Behavior(
        *("capture", "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker", "--worker-cls"),
        "profiler/capture/worker.py",
        (_form("resolved by name", "resolve_obj_by_qualname worker_cls"),),
    ),
    Behavior(
        *("capture", "vllm.config:SchedulerConfig.get_scheduler_cls", "--scheduler-cls"),
        "profiler/capture/scheduler.py",
        (_form("resolved by name", "resolve_obj_by_qualname scheduler_cls"),),
    ),
)

# Entry-point groups, as constants of vllm.plugins.
PLUGIN_GROUPS = ("vllm.platform_plugins", "vllm.general_plugins")

# Worker calls vLLM's own Executor and EngineCore make that nobody answers, and why that is right.
UNANSWERED_CALLS: dict[str, str] = {
    "compute_weight_checksums": "asked for by a user only; there are no weights",
    "discard": "asked for by a user only; there is no memory to free",
    "get_kv_connector_handshake_metadata": "KV connectors are refused at start",
    "get_simple_cpu_offload_num_cpu_blocks": "only with CPU offload; None is left out",
    "profile": "asked for by a user only; there is no device to trace",
    "save_sharded_state": "asked for by a user only; there are no weights",
    "sleep": "asked for by a user only; there is no memory to free",
    "supports_draft_weight_updates": "None counts as no",
    "synchronize_device": "there is no device queue to wait for",
    "wake_up": "asked for by a user only; there is no memory to fill",
}

# Modules on a request's path whose clock readings replay may leave on the wall: they time the program, not requests.
HARMLESS_CLOCKS: dict[str, str] = {"vllm.v1.engine.core": "how long starting and logging took"}
CLOCK_PATHS = ("vllm/v1/core/", "vllm/v1/engine/__init__.py", "vllm/v1/engine/core.py", "vllm/v1/request.py")

# Classes reported whole when they change between releases; of others only what we use.
WHOLE: tuple[Name, ...] = (
    ("vllm.v1.executor.abstract", "Executor"),
    ("vllm.v1.core.sched.output", "SchedulerOutput"),
    ("vllm.v1.core.sched.output", "NewRequestData"),
    ("vllm.v1.core.sched.output", "CachedRequestData"),
    ("vllm.v1.core.sched.output", "GrammarOutput"),
    ("vllm.v1.outputs", "ModelRunnerOutput"),
    ("vllm.v1.outputs", "DraftTokenIds"),
    ("vllm.v1.outputs", "LogprobsLists"),
    ("vllm.v1.outputs", "LogprobsTensors"),
    ("vllm.v1.kv_cache_interface", "KVCacheConfig"),
    # Whether `size` is the tensor's or the pool's decides the bytes of a token (profiler/capture/facts.py).
    ("vllm.v1.kv_cache_interface", "KVCacheTensor"),
    ("vllm.v1.kv_cache_interface", "AttentionSpec"),
    ("vllm.v1.kv_cache_interface", "FullAttentionSpec"),
    ("vllm.v1.kv_cache_interface", "MLAAttentionSpec"),
    ("vllm.v1.engine", "EngineCoreRequest"),
    ("vllm.v1.worker.worker_base", "WorkerBase"),
)

# Functions whose bodies we have read: a change asks for another reading.
READ_FUNCTIONS: tuple[str, ...] = (
    f"{_CORE}.step",
    f"{_CORE}.step_with_batch_queue",
    f"{_CORE}._initialize_kv_caches",
    f"{_CORE}.post_step",
    f"{_CORE}.preprocess_add_request",
    "vllm.v1.executor.abstract:Executor.get_class",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    "vllm.v1.engine.input_processor:InputProcessor.assign_request_id",
    "vllm.platforms:resolve_current_platform_cls_qualname",
    "vllm.v1.structured_output:StructuredOutputManager.grammar_bitmask",
)
