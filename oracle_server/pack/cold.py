"""Compares an engine's configuration with the cold fields of a pack."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from oracle_server.errors import EngineMismatch
from oracle_server.pack.facts import EngineFacts
from oracle_server.pack.kv_blocks import plan_kv_blocks
from oracle_server.pack.manifest import Manifest

Severity = Literal["warn", "refuse"]


class Difference(NamedTuple):
    """One field in which engine and pack differ; `field` is the name `allow_mismatch` takes."""

    field: str
    pack_value: str
    engine_value: str
    severity: Severity


# Fields an engine freezes at its start: they may differ from the pack at attach, when the engine was told, but a pack
# activated later must not move them.
_FROZEN: Final = frozenset(
    {"max_model_len", "max_num_seqs", "max_num_batched_tokens", "graph_capture_sizes", "num_kv_blocks"}
)
_REFUSED: Final = frozenset(
    {
        "model_shape",
        "dtype",
        "quantization",
        "kv_cache_dtype",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "block_size",
    }
)


def cold_differences(manifest: Manifest, facts: EngineFacts, *, frozen: bool = False) -> tuple[Difference, ...]:
    """All differences, in a fixed order.

    `frozen`: the engine runs already (an activation), so limits, graph sizes and KV blocks are refused too. What either
    side does not know (null, empty, 0) is not compared; booleans of the engine are always known.
    """
    engine = manifest.engine
    compared: list[tuple[str, object, object]] = [
        ("model_shape", manifest.model.shape, facts.model_shape),
        ("dtype", _dtype(manifest.model.dtype), _dtype(facts.dtype)),
        # An engine without quantization says nothing; a pack that says nothing does not know.
        ("quantization", manifest.model.quantization.lower(), facts.quantization.lower() or "none"),
        (
            "kv_cache_dtype",
            _cache_dtype(manifest.model.kv_cache_dtype, manifest.model.dtype),
            _cache_dtype(facts.kv_cache_dtype, facts.dtype),
        ),
        ("tensor_parallel_size", manifest.parallel.tensor, facts.tensor_parallel_size),
        ("pipeline_parallel_size", manifest.parallel.pipeline, facts.pipeline_parallel_size),
        # Ranks of a dense model are engines of their own, whose latency does not depend on how many there are.
        ("data_parallel_size", manifest.parallel.data if _has_experts(manifest) else None, facts.data_parallel_size),
        ("block_size", manifest.kv_cache.block_size, facts.block_size),
        ("max_model_len", engine.max_model_len, facts.max_model_len),
        ("max_num_seqs", engine.max_num_seqs, facts.max_num_seqs),
        ("max_num_batched_tokens", engine.max_num_batched_tokens, facts.max_num_batched_tokens),
        ("gpu_memory_utilization", engine.gpu_memory_utilization, facts.gpu_memory_utilization),
        ("vllm_version", engine.vllm_version, facts.vllm_version),
    ]
    differences = [(name, ours, theirs) for name, ours, theirs in compared if ours and theirs and ours != theirs]
    flags: list[tuple[str, object, object]] = [
        # An empty list says that the engine runs without graphs.
        ("graph_capture_sizes", engine.graph_capture_sizes, facts.graph_capture_sizes),
        ("async_scheduling", engine.async_scheduling, facts.async_scheduling),
        ("prefix_caching", engine.prefix_caching, facts.prefix_caching),
        ("chunked_prefill", engine.chunked_prefill, facts.chunked_prefill),
    ]
    differences += [(name, ours, theirs) for name, ours, theirs in flags if ours is not None and ours != theirs]
    if frozen and facts.num_kv_blocks:
        planned = _planned_blocks(manifest, facts)
        if planned is not None and planned != facts.num_kv_blocks:
            differences.append(("num_kv_blocks", planned, facts.num_kv_blocks))
    refused = _REFUSED | _FROZEN if frozen else _REFUSED
    return tuple(
        Difference(name, _text(ours), _text(theirs), "refuse" if name in refused else "warn")
        for name, ours, theirs in differences
    )


def _has_experts(manifest: Manifest) -> bool:
    """Whether a step costs what all data-parallel ranks bring to the experts."""
    composed = manifest.latency.composed
    return composed is not None and any(operator.name == "moe" for operator in composed.operators)


def _planned_blocks(manifest: Manifest, facts: EngineFacts) -> int | None:
    """Blocks the pack would give the engine; None where the engine's own override decides."""
    try:
        return plan_kv_blocks(manifest, facts).blocks or None
    except EngineMismatch:
        return 0


def _dtype(name: str) -> str:
    return name.lower().removeprefix("torch.")


def _cache_dtype(name: str, model_dtype: str) -> str:
    """ "auto" is the model's dtype."""
    return _dtype(model_dtype) if name.lower() == "auto" else _dtype(name)


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)
