"""KV-cache blocks of a device nobody measured: memory that is left after weights, activations and overheads."""

from __future__ import annotations

from dataclasses import dataclass

from oracle_server.errors import InvalidArgument
from profiler.model_config import ModelConfig

# What CUDA context, graphs, libraries and fragmentation take beside weights and activations. One constant brings the
# formula onto three measured counts (H100 CodeLlama-34B TP2 26,602, H100 Llama-2-70B TP4 31,356, RTX 4090 Llama-3.1-8B
# 2,588 blocks of 16): three points, two GPUs.
OVERHEAD_BYTES = int(1.05 * (1 << 30))

# Buffers NCCL holds per rank, as aiconfigurator-core 0.12.0 states them for NCCL 2.27 (342 and 392 MiB).
_NCCL_BYTES = {1: 0, 2: 358_612_992, 4: 411_041_792, 8: 411_041_792}

# Peak activations in multiples of (tokens x heads x head_dim x 2 bytes), by tensor-parallel size: the coefficients of
# aiconfigurator-core 0.12.0 for dense and mixture-of-experts models alike.
_ACTIVATION_MULTIPLES = {1: 10, 2: 6, 4: 5, 8: 5}
_MIN_ACTIVATION_BYTES = 70 << 20


@dataclass(frozen=True)
class KvEstimate:
    """Blocks and the terms they follow from; bytes are of one rank."""

    blocks: int
    budget_bytes: float
    weight_bytes: float
    activation_bytes: float
    nccl_bytes: int
    sentence: str


def estimate_kv_blocks(
    model: ModelConfig,
    *,
    memory_bytes: int,
    tensor_parallel: int,
    gpu_memory_utilization: float,
    max_num_batched_tokens: int,
    block_size: int,
) -> KvEstimate:
    """KV blocks per rank = (utilization x memory - weights - activations - NCCL - overhead) / bytes per block.

    Raises InvalidArgument where nothing is left.
    """
    rank = min((size for size in _NCCL_BYTES if size >= tensor_parallel), default=8)
    weights = model.weight_bytes_of_rank(tensor_parallel)
    activations = max(
        _MIN_ACTIVATION_BYTES,
        2 * max_num_batched_tokens * model.num_heads * model.head_dim * _ACTIVATION_MULTIPLES[rank],
    )
    budget = gpu_memory_utilization * memory_bytes - weights - activations - _NCCL_BYTES[rank] - OVERHEAD_BYTES
    blocks = int(budget // (model.kv_bytes_per_token_of_rank(tensor_parallel) * block_size))
    if blocks < 1:
        raise InvalidArgument(
            f"{model.model_id} does not fit: {weights / 1e9:.1f} GB of weights and {activations / 1e9:.1f} GB of "
            f"activations leave no KV cache in {gpu_memory_utilization:g} of {memory_bytes / 1e9:.1f} GB; "
            "raise --tp or --gpu-memory-utilization",
            field="kv_blocks",
        )
    sentence = (
        f"{gpu_memory_utilization:g} x {memory_bytes / 2**30:.2f} GiB - weights {weights / 2**30:.2f} - "
        f"activations {activations / 2**30:.2f} - NCCL {_NCCL_BYTES[rank] / 2**30:.2f} - overhead "
        f"{OVERHEAD_BYTES / 2**30:.2f} GiB = {budget / 2**30:.2f} GiB of KV cache per rank"
    )
    return KvEstimate(blocks, budget, weights, activations, _NCCL_BYTES[rank], sentence)
