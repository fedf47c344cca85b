"""Packs of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders import build_composed_pack, build_sampled_pack

SAMPLES = 276_000
CONCURRENCY_WIDTH = 5
MAX_REQUESTS = 256
MAX_TOKENS = 8192
_RATIOS = 256


def sample_columns(samples: int = SAMPLES, seed: int = 1) -> dict[str, NDArray[Any]]:
    """Samples in the density of LLM-Emu's published packs: nearly three quarters in full decode buckets, the others in
    6,600 sparse prefill buckets (where there are enough), nine of ten below 16 samples."""
    random = np.random.default_rng(seed)
    decode = samples * 73 // 100
    requests = np.arange(decode) % MAX_REQUESTS + 1
    prefill = samples - decode
    buckets = min(6600, prefill)
    concurrency = random.integers(1, MAX_REQUESTS, size=buckets)
    tokens = random.integers(concurrency + 1, MAX_TOKENS)
    weights = random.exponential(1.0, buckets) ** 2
    chosen = np.concatenate((np.arange(buckets), random.choice(buckets, prefill - buckets, p=weights / weights.sum())))
    latency = np.concatenate(
        (
            5_000_000 + 50_000 * requests + random.integers(0, 400_000, decode),
            6_000_000 + 30_000 * tokens[chosen] + random.integers(0, 2_000_000, prefill),
        )
    )
    return {
        "table": np.concatenate((np.zeros(decode), np.ones(prefill))).astype(np.int8),
        "total_tokens": np.concatenate((requests, tokens[chosen])).astype(np.int32),
        "concurrency": np.concatenate((requests, concurrency[chosen])).astype(np.int32),
        "context_tokens": np.full(samples, -1, dtype=np.int64),
        "previous_prefill_tokens": np.full(samples, -1, dtype=np.int32),
        "latency_ns": latency.astype(np.int64),
    }


def build_large_sampled_pack(folder: Path, samples: int = SAMPLES, seed: int = 1) -> str:
    """A sampled pack of `sample_columns`; its digest."""
    return build_sampled_pack(
        folder,
        samples=sample_columns(samples, seed),
        sampled={"concurrency_bucket_width": CONCURRENCY_WIDTH},
        name=f"bench-{samples}-{seed}",
    )


def build_leasable_pack(folder: Path, seed: int = 1) -> str:
    """A composed pack with a full residual pool; its digest."""
    ratios = np.random.default_rng(seed).normal(1.0, 0.02, _RATIOS).clip(0.9, 1.2)
    return build_composed_pack(folder, ratios=[float(ratio) for ratio in ratios], name=f"bench-composed-{seed}")
