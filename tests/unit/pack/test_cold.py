"""Which differences between pack and engine are told, which refuse, and how many KV blocks an engine gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from builders import MODEL_SHAPE, build_manifest
from oracle_server.errors import EngineMismatch
from oracle_server.pack import (
    ComposedLatency,
    Engine,
    EngineFacts,
    KvCache,
    Latency,
    Manifest,
    Model,
    Operator,
    Parallel,
    cold_differences,
    kv_blocks_basis,
    plan_kv_blocks,
)

GIB = 1 << 30
CACHE = KvCache(blocks=1000, block_size=16, bytes_per_token=1024, basis="measured", source="a test")
ENGINE = Engine(
    vllm_version="0.19.0",
    max_model_len=8192,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    graph_capture_sizes=(1, 2, 4),
    async_scheduling=True,
    prefix_caching=True,
    chunked_prefill=True,
    gpu_memory_utilization=0.9,
)
MODEL = Model(id="test/model", shape=MODEL_SHAPE, dtype="bfloat16", quantization="none", kv_cache_dtype="auto")
FACTS = EngineFacts(
    vllm_version="0.19.0",
    model_shape=MODEL_SHAPE,
    dtype="torch.bfloat16",
    quantization="",
    kv_cache_dtype="bfloat16",
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    data_parallel_size=1,
    block_size=16,
    max_model_len=8192,
    max_num_seqs=256,
    max_num_batched_tokens=2048,
    async_scheduling=True,
    prefix_caching=True,
    chunked_prefill=True,
    gpu_memory_utilization=0.9,
    kv_bytes_per_token=1024,
    graph_capture_sizes=(1, 2, 4),
    num_kv_blocks=1000,
)


def manifest(**overrides: Any) -> Manifest:
    fields: dict[str, Any] = {"model": MODEL, "engine": ENGINE, "kv_cache": CACHE, "parallel": Parallel()}
    return build_manifest(Latency(composed=ComposedLatency(operators=())), **{**fields, **overrides})


@pytest.mark.parametrize("frozen", [False, True])
def test_an_engine_like_the_pack_has_no_difference(frozen: bool) -> None:
    assert cold_differences(manifest(), FACTS, frozen=frozen) == ()


@pytest.mark.parametrize(
    ("field", "value", "at_attach", "at_activation"),
    [
        ("model_shape", "LlamaForCausalLM layers=2", "refuse", "refuse"),
        ("dtype", "float16", "refuse", "refuse"),
        ("quantization", "fp8", "refuse", "refuse"),
        ("kv_cache_dtype", "fp8", "refuse", "refuse"),
        ("tensor_parallel_size", 2, "refuse", "refuse"),
        ("pipeline_parallel_size", 2, "refuse", "refuse"),
        ("block_size", 32, "refuse", "refuse"),
        ("max_model_len", 4096, "warn", "refuse"),
        ("max_num_seqs", 128, "warn", "refuse"),
        ("max_num_batched_tokens", 4096, "warn", "refuse"),
        ("graph_capture_sizes", (), "warn", "refuse"),
        ("async_scheduling", False, "warn", "warn"),
        ("prefix_caching", False, "warn", "warn"),
        ("chunked_prefill", False, "warn", "warn"),
        ("gpu_memory_utilization", 0.8, "warn", "warn"),
        ("vllm_version", "0.26.0", "warn", "warn"),
    ],
)
def test_each_cold_field_is_compared(field: str, value: Any, at_attach: str, at_activation: str) -> None:
    facts = replace(FACTS, **{field: value})
    for frozen, severity in ((False, at_attach), (True, at_activation)):
        # A difference may also move the number of KV blocks; that is a field of its own.
        found = [d for d in cold_differences(manifest(), facts, frozen=frozen) if d.field != "num_kv_blocks"]
        assert [(d.field, d.severity) for d in found] == [(field, severity)]
        assert found[0].pack_value != found[0].engine_value


def test_the_number_of_data_parallel_ranks_matters_where_they_share_experts() -> None:
    moe = (Operator(id=0, name="moe", axes=("total_tokens",)),)
    shared = manifest(parallel=Parallel(data=2))
    assert cold_differences(shared, FACTS) == ()
    shared = msgspec.structs.replace(shared, latency=Latency(composed=ComposedLatency(operators=moe)))
    assert [tuple(d) for d in cold_differences(shared, FACTS)] == [("data_parallel_size", "2", "1", "refuse")]
    assert cold_differences(shared, replace(FACTS, data_parallel_size=2)) == ()


def test_what_either_side_does_not_know_is_not_compared() -> None:
    unknown = manifest(model=Model(id="x"), engine=Engine())
    assert cold_differences(unknown, FACTS, frozen=True) == ()
    facts = EngineFacts(async_scheduling=True, prefix_caching=True, chunked_prefill=True, graph_capture_sizes=(1, 2, 4))
    assert cold_differences(manifest(), facts, frozen=True) == ()


def test_an_engine_that_says_nothing_of_quantization_has_none() -> None:
    quantized = manifest(model=msgspec.structs.replace(MODEL, quantization="fp8"))
    assert [tuple(d) for d in cold_differences(quantized, FACTS)] == [("quantization", "fp8", "none", "refuse")]


def test_an_automatic_cache_dtype_is_the_dtype_of_the_model() -> None:
    fp8 = manifest(model=msgspec.structs.replace(MODEL, kv_cache_dtype="fp8"))
    (difference,) = cold_differences(fp8, replace(FACTS, kv_cache_dtype="auto"))
    assert (difference.pack_value, difference.engine_value) == ("fp8", "bfloat16")


def test_a_running_engine_keeps_its_kv_blocks() -> None:
    facts = replace(FACTS, num_kv_blocks=900)
    assert cold_differences(manifest(), facts) == ()
    assert [tuple(d) for d in cold_differences(manifest(), facts, frozen=True)] == [
        ("num_kv_blocks", "1000", "900", "refuse")
    ]
    # The engine's own override decides, whatever pack comes.
    assert cold_differences(manifest(), replace(facts, num_gpu_blocks_override=900), frozen=True) == ()


@pytest.mark.parametrize("override", [{"num_gpu_blocks_override": 7}, {"kv_cache_memory_bytes": 7}])
def test_the_engines_own_override_comes_first(override: dict[str, Any]) -> None:
    plan = plan_kv_blocks(manifest(), replace(FACTS, gpu_memory_utilization=0.5, **override))
    assert plan == (0, "engine_override", "measured", None)


def test_a_matching_engine_gets_the_packs_blocks() -> None:
    assert plan_kv_blocks(manifest(), FACTS) == (1000, "pack", "measured", None)
    assert plan_kv_blocks(manifest(), EngineFacts()) == (1000, "pack", "measured", None)


def test_a_count_that_is_not_the_pack_s_own_is_not_called_measured() -> None:
    plans = (
        plan_kv_blocks(manifest(), facts)
        for facts in (FACTS, replace(FACTS, gpu_memory_utilization=0.95), replace(FACTS, num_gpu_blocks_override=7))
    )
    assert [kv_blocks_basis(plan) for plan in plans] == ["measured", "scaled from measured", "engine option"]
    assert plan_kv_blocks(manifest(engine=Engine()), replace(FACTS, gpu_memory_utilization=0.1)).blocks == 1000


@pytest.mark.parametrize(
    ("facts", "blocks"),
    [
        # Half the blocks of twice the size; half the blocks of twice the bytes per token (1024 -> 2048).
        ({"block_size": 32}, 500),
        ({"kv_bytes_per_token": 2048}, 500),
        ({"tensor_parallel_size": 2, "kv_bytes_per_token": 512}, 2000),
        # 0.01 of 80 GiB more, in blocks of 16 KiB.
        ({"gpu_memory_utilization": 0.91}, 1000 + round(0.01 * 80 * GIB) // (16 * 1024)),
        # Limits move activations, which the pack does not know: the count stays, with a warning.
        ({"max_num_seqs": 512}, 1000),
    ],
)
def test_an_engine_that_differs_gets_a_scaled_count_and_a_warning(facts: dict[str, Any], blocks: int) -> None:
    plan = plan_kv_blocks(manifest(), replace(FACTS, **facts))
    assert (plan.blocks, plan.source, plan.basis) == (blocks, "scaled", "measured")
    assert plan.warning is not None
    assert all(name in plan.warning for name in facts)


def test_without_bytes_only_the_block_size_is_scaled() -> None:
    unknown = manifest(kv_cache=msgspec.structs.replace(CACHE, bytes_per_token=0))
    plan = plan_kv_blocks(unknown, replace(FACTS, kv_bytes_per_token=0, block_size=8, gpu_memory_utilization=0.5))
    assert plan.blocks == 2000
    assert plan.warning is not None
    assert "bytes per token are unknown" in plan.warning


def test_an_engine_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(EngineMismatch, match="no KV block is left") as refusal:
        plan_kv_blocks(manifest(), replace(FACTS, gpu_memory_utilization=0.5))
    assert refusal.value.items == ("gpu_memory_utilization 0.5 instead of 0.9",)
