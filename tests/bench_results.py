"""Results of `vllm bench serve --save-result --save-detailed` (the fields of 0.33.0), made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def bench_result(
    seed: int, *, requests: int = 200, tpot_ms: float = 20.0, ttft_ms: float = 60.0, engine_spread: float = 0.0
) -> dict[str, Any]:
    """Poisson arrivals, log-normal latencies; `engine_spread` is how much engines differ (their standard deviation)."""
    draw = np.random.default_rng(seed)
    engine = float(np.exp(draw.normal(0, engine_spread))) if engine_spread else 1.0
    starts = 1000.0 + np.cumsum(draw.exponential(0.1, requests))
    tokens = draw.integers(20, 120, requests)
    ttfts = ttft_ms * engine * draw.lognormal(0, 0.3, requests) / 1e3
    gaps = [tpot_ms * engine * draw.lognormal(0, 0.1) / 1e3 * draw.lognormal(0, 0.05, n - 1) for n in tokens]
    latencies = ttfts + [float(each.sum()) for each in gaps]
    duration = float(max(starts + latencies) - starts[0])
    return {
        "duration": duration,
        "completed": requests,
        "output_throughput": float(tokens.sum()) / duration,
        "input_lens": [100] * requests,
        "output_lens": tokens.tolist(),
        "ttfts": ttfts.tolist(),
        "itls": [each.tolist() for each in gaps],
        "latencies": latencies.tolist(),
        "start_times": starts.tolist(),
        "errors": [""] * requests,
    }


def write_result(path: Path, seed: int, **options: Any) -> Path:
    """The same as a file."""
    path.write_text(json.dumps(bench_result(seed, **options)), encoding="utf-8")
    return path
