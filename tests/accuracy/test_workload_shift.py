"""A pack fitted to one workload's steps, replayed on workloads it has never seen; LLM-Emu's key on the same steps
beside it.

The truth is a composed pack (RTX PRO 6000, measured operators), so the function class favours physics: read the
distance between the two models, not the last digit. Lengths and rates of each workload stand below; arrivals are
Poisson, every generator is seeded.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from builders import build_sampled_pack, sample_columns
from fleet import replies, step_oracle
from gates import Gates
from oracle_server.pack import KvCache
from replays import replay

pytestmark = [pytest.mark.accuracy, pytest.mark.slow, pytest.mark.nightly]

GATE = "workload shift, hybrid pack"
KV_BLOCKS = 35_000
ENGINE = ("--engine-args", "--max-model-len 16384 --max-num-seqs 128 --max-num-batched-tokens 2048")
BOUNDS = {"ttft": 10.0, "tpot": 5.0, "e2e": 5.0}


class Workload(NamedTuple):
    """Poisson arrivals per second, number of requests, (prompt, output) tokens."""

    rate: float
    requests: int
    lengths: Callable[[random.Random], tuple[int, int]]


def lognormal(draw: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    return int(min(high, max(low, median * math.exp(draw.gauss(0, sigma)))))


CAPTURED = Workload(6.0, 240, lambda d: (lognormal(d, 600, 0.9, 16, 4000), lognormal(d, 200, 0.7, 8, 1000)))
UNSEEN = {
    "long context": Workload(0.8, 60, lambda d: (d.randint(4000, 12000), lognormal(d, 200, 0.5, 16, 600))),
    "short chat": Workload(12.0, 300, lambda d: (lognormal(d, 90, 0.6, 8, 300), lognormal(d, 80, 0.6, 4, 300))),
    "reasoning": Workload(0.6, 50, lambda d: (lognormal(d, 200, 0.6, 16, 800), d.randint(1500, 5000))),
    "code": Workload(3.0, 200, lambda d: (lognormal(d, 1800, 0.7, 100, 7000), lognormal(d, 20, 0.8, 2, 120))),
}


@pytest.fixture(scope="module")
def config(data_folder: Path) -> Path:
    return data_folder / "llmservingsim" / "Llama-3.1-8B.config.json"


@pytest.fixture(scope="module")
def packs(data_folder: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The truth, the hybrid fitted to one workload's steps of it, and LLM-Emu's key on the same steps."""
    folder = tmp_path_factory.mktemp("shift")
    made = {name: folder / name for name in ("truth", "hybrid", "key")}
    bundle = str(data_folder / "llmservingsim" / "RTXPRO6000-Llama-3.1-8B-tp1")
    blocks = ("--kv-blocks-assumed", str(KV_BLOCKS))
    model = ("--model-config", str(config))
    step_oracle("import", "llmservingsim", bundle, *model, "--tp", "1", *blocks, "-o", str(made["truth"]))
    (folder / "traces").mkdir()
    requests = write_requests(folder / "captured.csv", "captured", CAPTURED)
    traces = str(folder / "traces" / "steps-")
    replay(made["truth"], config, folder, "--requests", str(requests), *ENGINE, "--trace", traces)
    trace = next((folder / "traces").glob("*.trace"))
    device = ("--device", "NVIDIA RTX PRO 6000", "--device-memory-gib", "96")
    step_oracle("fit", str(trace), *device, *blocks, "-o", str(made["hybrid"]))
    cache = KvCache(blocks=KV_BLOCKS, block_size=16, basis="assumed", source="made up for a test")
    samples = sample_columns(map(sample, replies(folder / "traces")))
    build_sampled_pack(made["key"], samples=samples, kv_cache=cache)
    return made


def sample(step: Any) -> tuple[int, int, int, int]:
    """Table, total tokens, concurrency, nanoseconds: LLM-Emu's key and nothing else."""
    shape = step.request.shape
    prefill = sum(chunk.num_tokens for chunk in shape.prefill_chunks)
    tokens = prefill + shape.num_decode_tokens
    return int(prefill > 0), tokens, shape.concurrency, step.reply.latency_ns[0]


def write_requests(path: Path, seed: str, workload: Workload) -> Path:
    draw, now = random.Random(seed), datetime(2026, 1, 1)  # noqa: DTZ001  the trace's own time, in no zone
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for _ in range(workload.requests):
            rows.writerow([now.strftime("%Y-%m-%d %H:%M:%S.%f") + "0", *workload.lengths(draw)])
            now += timedelta(seconds=draw.expovariate(workload.rate))
    return path


@pytest.mark.parametrize("name", UNSEEN)
def test_a_hybrid_pack_holds_on_workloads_it_was_not_fitted_to(
    name: str, packs: dict[str, Path], config: Path, tmp_path: Path, gates: Gates
) -> None:
    requests = write_requests(tmp_path / "requests.csv", name, UNSEEN[name])
    means = {}
    for pack, path in packs.items():
        document = replay(path, config, tmp_path, "--requests", str(requests), *ENGINE)
        means[pack] = {metric: document["metrics_ms"][metric]["mean"] for metric in BOUNDS}
    for metric, at_most in BOUNDS.items():
        error = {pack: 100 * (means[pack][metric] / means["truth"][metric] - 1) for pack in packs}
        what = f"{name}: {metric.upper()} mean"
        gates.check(GATE, what, error["hybrid"], at_most=at_most, controls={"LLM-Emu's key": error["key"]})
