"""What an engine says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """EngineConfig of oracle_service.proto, field by field; defaults are proto's zero values."""

    vllm_version: str = ""
    shim_version: str = ""
    model: str = ""
    model_shape: str = ""
    dtype: str = ""
    quantization: str = ""
    kv_cache_dtype: str = ""
    tensor_parallel_size: int = 0
    pipeline_parallel_size: int = 0
    data_parallel_size: int = 0
    block_size: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    async_scheduling: bool = False
    prefix_caching: bool = False
    chunked_prefill: bool = False
    gpu_memory_utilization: float = 0.0
    num_gpu_blocks_override: int = 0
    kv_cache_memory_bytes: int = 0
    kv_bytes_per_token: int = 0
    num_speculative_tokens: int = 0
    speculative_method: str = ""
    graph_capture_sizes: tuple[int, ...] = ()
    num_kv_blocks: int = 0
