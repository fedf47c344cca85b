"""Steps captured from one made-up workload, and LLM-Emu's own packs of them: controls that know what ours know.

Lengths and rates of each workload stand here; arrivals are Poisson, every generator is seeded.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from builders import build_sampled_pack, sample_columns
from fleet import replies
from oracle_server.pack import KvCache
from replays import replay

ENGINE: Final = ("--engine-args", "--max-model-len 16384 --max-num-seqs 128 --max-num-batched-tokens 2048")
# LLM-Emu's rules by the names of the controls: its default, and the nearest bucket alone.
LLM_EMU: Final[Mapping[str, Mapping[str, str]]] = {"LLM-Emu auto": {}, "LLM-Emu K=1": {"neighbors": "nearest"}}


class Workload(NamedTuple):
    """Poisson arrivals per second, number of requests, (prompt, output) tokens."""

    rate: float
    requests: int
    lengths: Callable[[random.Random], tuple[int, int]]


def lognormal(draw: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    return int(min(high, max(low, median * math.exp(draw.gauss(0, sigma)))))


CAPTURED: Final = Workload(6.0, 240, lambda d: (lognormal(d, 600, 0.9, 16, 4000), lognormal(d, 200, 0.7, 8, 1000)))


def write_requests(path: Path, seed: str, workload: Workload) -> Path:
    draw, now = random.Random(seed), datetime(2026, 1, 1)  # noqa: DTZ001  the trace's own time, in no zone
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for _ in range(workload.requests):
            rows.writerow([now.strftime("%Y-%m-%d %H:%M:%S.%f") + "0", *workload.lengths(draw)])
            now += timedelta(seconds=draw.expovariate(workload.rate))
    return path


def capture(truth: Path, config: Path, folder: Path) -> Path:
    """The step trace of CAPTURED as `truth` answers it; `folder` receives it."""
    (folder / "traces").mkdir(parents=True)
    requests = write_requests(folder / "captured.csv", "captured", CAPTURED)
    traces = str(folder / "traces" / "steps-")
    replay(truth, config, folder, "--requests", str(requests), *ENGINE, "--trace", traces)
    (trace,) = (folder / "traces").glob("*.trace")
    return trace


def llm_emu_packs(trace: Path, folder: Path, kv_blocks: int) -> dict[str, Path]:
    """A pack by LLM-Emu's key for each of LLM_EMU: total tokens and concurrency, decode and prefill apart."""
    cache = KvCache(blocks=kv_blocks, block_size=16, basis="assumed", source="made up for a test")
    samples = sample_columns(map(_sample, replies(trace.parent)))
    packs = {}
    for name, rules in LLM_EMU.items():
        packs[name] = folder / name.replace(" ", "-").replace("=", "")
        build_sampled_pack(packs[name], samples=samples, sampled=rules, kv_cache=cache)
    return packs


def _sample(step: Any) -> tuple[int, int, int, int]:
    """Table, total tokens, concurrency, nanoseconds: LLM-Emu's key and nothing else."""
    shape = step.request.shape
    prefill = sum(chunk.num_tokens for chunk in shape.prefill_chunks)
    tokens = prefill + shape.num_decode_tokens
    return int(prefill > 0), tokens, shape.concurrency, step.reply.latency_ns[0]
