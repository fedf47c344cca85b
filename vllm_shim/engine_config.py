"""The engine's resolved configuration as the oracle wants it: VllmConfig -> EngineIdentity and EngineConfig."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from step_oracle.v1 import oracle_service_pb2 as pb
from vllm_shim import __version__

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_shim.config import ShimConfig

# Set by the server's first process where it has several data-parallel ranks.
DATA_PARALLEL = "STEP_ORACLE_DATA_PARALLEL_SIZE"


def engine_identity(config: ShimConfig, server_id: str, vllm_config: VllmConfig) -> pb.EngineIdentity:
    """Who this engine core is; a data-parallel rank gets "/dp<rank>" behind the server's id."""
    parallel = vllm_config.parallel_config
    rank = parallel.data_parallel_index
    ranked = os.environ.get(DATA_PARALLEL)
    return pb.EngineIdentity(
        experiment=config.experiment,
        engine_id=f"{server_id}/dp{rank}" if ranked else server_id,
        labels=dict(config.engine_labels),
        model=vllm_config.model_config.model,
        tensor_parallel_size=parallel.tensor_parallel_size,
    )


def engine_config(vllm_config: VllmConfig, kv_bytes_per_token: int) -> pb.EngineConfig:
    """What a pack's cold fields are compared with."""
    from vllm.version import __version__ as vllm_version

    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config
    return pb.EngineConfig(
        vllm_version=vllm_version,
        shim_version=__version__,
        model=model.model,
        model_shape=model_shape(model),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=str(model.quantization or ""),
        kv_cache_dtype=str(cache.cache_dtype),
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        data_parallel_size=parallel.data_parallel_size,
        block_size=cache.block_size,
        max_model_len=model.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        async_scheduling=bool(scheduler.async_scheduling),
        prefix_caching=bool(cache.enable_prefix_caching),
        chunked_prefill=bool(scheduler.enable_chunked_prefill),
        gpu_memory_utilization=cache.gpu_memory_utilization,
        num_gpu_blocks_override=cache.num_gpu_blocks_override or 0,
        kv_cache_memory_bytes=getattr(cache, "kv_cache_memory_bytes", None) or 0,
        kv_bytes_per_token=kv_bytes_per_token,
        num_speculative_tokens=speculative.num_speculative_tokens if speculative else 0,
        speculative_method=str(speculative.method) if speculative else "",
    )


def model_shape(model: ModelConfig) -> str:
    """The line of EngineConfig.model_shape, from the model's text config; a missing field prints as 0."""
    text = model.hf_text_config
    architecture = (getattr(model.hf_config, "architectures", None) or ["unknown"])[0]
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    head_dim = getattr(text, "head_dim", None) or (hidden // heads if heads else 0)
    return (
        f"{architecture} layers={getattr(text, 'num_hidden_layers', 0) or 0} hidden={hidden} "
        f"intermediate={getattr(text, 'intermediate_size', 0) or 0} heads={heads} "
        f"kv_heads={getattr(text, 'num_key_value_heads', 0) or heads} head_dim={head_dim} "
        f"vocab={getattr(text, 'vocab_size', 0) or 0}"
    )
