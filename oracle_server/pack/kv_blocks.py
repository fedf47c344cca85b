"""How many KV-cache blocks an emulated engine gets."""

from __future__ import annotations

from typing import Literal, NamedTuple

from oracle_server.errors import EngineMismatch
from oracle_server.pack.facts import EngineFacts
from oracle_server.pack.manifest import Manifest


class KvPlan(NamedTuple):
    """KV blocks of every rank (0: the engine's own override decides), their source, and a sentence for the log."""

    blocks: int
    source: Literal["engine_override", "pack", "scaled"]
    # How the pack knows its count: measured, estimated or assumed.
    basis: str
    warning: str | None = None


def kv_blocks_basis(plan: KvPlan) -> str:
    """How the engine's count is known: as the pack's own, by scaling it, or by the engine's own options."""
    return {"pack": plan.basis, "scaled": f"scaled from {plan.basis}", "engine_override": "engine option"}[plan.source]


def plan_kv_blocks(manifest: Manifest, facts: EngineFacts) -> KvPlan:
    """The engine's own override, else the pack's count where utilization, parallel sizes, block size and limits match,
    else the pack's pool of bytes, moved by the difference in utilization, divided by the engine's bytes per block.

    Values the pack or the engine does not know count as matching. Raises EngineMismatch where no block would be left.
    """
    cache = manifest.kv_cache
    if facts.num_gpu_blocks_override or facts.kv_cache_memory_bytes:
        return KvPlan(0, "engine_override", cache.basis)
    differences = [
        f"{name} {theirs} instead of {ours}"
        for name, ours, theirs in (
            ("gpu_memory_utilization", manifest.engine.gpu_memory_utilization, facts.gpu_memory_utilization),
            ("tensor_parallel_size", manifest.parallel.tensor, facts.tensor_parallel_size),
            ("pipeline_parallel_size", manifest.parallel.pipeline, facts.pipeline_parallel_size),
            ("block_size", cache.block_size, facts.block_size),
            ("kv_bytes_per_token", cache.bytes_per_token, facts.kv_bytes_per_token),
            ("max_model_len", manifest.engine.max_model_len, facts.max_model_len),
            ("max_num_seqs", manifest.engine.max_num_seqs, facts.max_num_seqs),
            ("max_num_batched_tokens", manifest.engine.max_num_batched_tokens, facts.max_num_batched_tokens),
        )
        if ours and theirs and abs(ours - theirs) > 1e-9
    ]
    if not differences:
        return KvPlan(cache.blocks, "pack", cache.basis)
    ours_per_token = cache.bytes_per_token or facts.kv_bytes_per_token
    theirs_per_token = facts.kv_bytes_per_token or ours_per_token
    block_size = facts.block_size or cache.block_size
    if not ours_per_token:
        # Nobody knows bytes: only the block size can be accounted for.
        blocks = cache.blocks * cache.block_size // block_size
        how = "bytes per token are unknown, so only the block size is accounted for"
    else:
        pool = cache.blocks * cache.block_size * ours_per_token
        ours, theirs = manifest.engine.gpu_memory_utilization, facts.gpu_memory_utilization
        if ours and theirs:
            pool += round((theirs - ours) * manifest.device.memory_bytes)
        blocks = pool // (block_size * theirs_per_token)
        how = f"scaled to {pool} bytes of KV cache; weights and activations are taken to be the pack's"
    if blocks < 1:
        raise EngineMismatch(
            f"no KV block is left for the engine ({', '.join(differences)}; {how}); give it --num-gpu-blocks-override "
            "or a pack taken with its configuration",
            differences,
        )
    return KvPlan(
        blocks,
        "scaled",
        cache.basis,
        f"KV blocks: the pack has {cache.blocks}, but the engine differs ({', '.join(differences)}); "
        f"it gets {blocks} ({how})",
    )
