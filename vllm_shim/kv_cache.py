"""KV-cache specs of the emulated ranks, and the memory that gives vLLM exactly the blocks it shall have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def kv_cache_specs(vllm_config: VllmConfig) -> list[dict[str, KVCacheSpec]]:
    """One dict (layer name -> spec) per rank, from the model config alone.

    All layers attend fully (see supported.py).
    """
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    kind = MLAAttentionSpec if model.use_mla else FullAttentionSpec
    spec = kind(
        block_size=cache.block_size,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
    )
    layers = {f"model.layers.{i}.self_attn.attn": spec for i in range(model.get_total_num_hidden_layers())}
    return [dict(layers) for _ in range(parallel.world_size)]


def bytes_per_block(specs: list[dict[str, KVCacheSpec]]) -> int:
    """Bytes one block takes on one rank, all layers."""
    return sum(spec.page_size_bytes for spec in specs[0].values())
