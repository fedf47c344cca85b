"""Leases in a real engine: most steps never leave it, every one is proven, and a swap under load ends them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from builders import build_composed_pack, build_sampled_pack, sample_columns
from fleet import StartEngine, complete, kv_cache, replies, step_oracle
from oracle_calls import Calls
from oracle_process import OracleProcess
from vllm_shim.timeline import SHORTEST_IDLE_NS

pytestmark = pytest.mark.vllm

KV_BLOCKS = 4000
NUM_REQUESTS = 6
PAUSE_SECONDS = 0.2
WAKE_NS = 3_000_000


def wait_for_steps(folder: Path, more: int) -> None:
    wanted, end = len(replies(folder)) + more, time.monotonic() + 30
    while len(replies(folder)) < wanted:
        assert time.monotonic() < end, "the engine makes no steps"
        time.sleep(0.02)


def test_steps_answered_from_leases_are_those_the_oracle_would_have_sent(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    with Calls(oracle.target) as calls:
        options: dict[str, Any] = {"kv_cache": kv_cache(KV_BLOCKS)}
        ratios = [0.9, 0.95, 1.0, 1.1]
        wake = [(SHORTEST_IDLE_NS, WAKE_NS)]
        build_composed_pack(tmp_path / "one", ratios=ratios, composed={"skew_decode": 0.05}, wake=wake, **options)
        # A cell for every number of requests, and one for steps after a prefill.
        cells = [(0, n, n, 9_000_000 + 700_001 * (n + i), 0) for n in range(1, 2 * NUM_REQUESTS) for i in range(9)]
        samples = sample_columns([*cells, (0, 1, 1, 30_000_001, 512), (1, 64, 1, 20_000_001)])
        build_sampled_pack(tmp_path / "other", samples=samples, transition=True, **options)
        digests = [calls.upload(tmp_path / name) for name in ("one", "other")]
        calls.create(digests[0])
        (tmp_path / "traces").mkdir()
        engine = start_engine(oracle.target, STEP_ORACLE_TRACE=f"{tmp_path}/traces/")

        def one(i: int, tokens: int) -> int:
            return int(complete(engine, list(range(300, 340 + i)), max_tokens=tokens).usage.completion_tokens)

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            running = [pool.submit(one, i, 200) for i in range(NUM_REQUESTS)]
            assert [future.result() for future in running] == [200] * NUM_REQUESTS
            time.sleep(PAUSE_SECONDS)
            running = [pool.submit(one, NUM_REQUESTS + i, 600) for i in range(NUM_REQUESTS)]
            for digest in (digests[1], digests[0], digests[1]):
                wait_for_steps(tmp_path / "traces", 40)
                calls.activate(digest)
            assert [future.result() for future in running] == [600] * NUM_REQUESTS

    steps = replies(tmp_path / "traces")
    decoding = [step for step in steps if not step.request.shape.prefill_chunks]
    leased = sum(step.leased for step in steps)
    print(f"{leased} of {len(decoding)} decode-only and of {len(steps)} steps came from leases")
    assert leased > len(decoding) / 2
    assert not any(step.leased for step in steps if step.request.shape.prefill_chunks)
    paused = [step for step in steps if step.request.device_idle_ns]
    assert max(step.request.device_idle_ns for step in paused) >= 1e9 * PAUSE_SECONDS
    assert all(step.request.device_idle_ns >= SHORTEST_IDLE_NS and not step.leased for step in paused)
    # The other pack knows nothing of pauses.
    first = [step for step in steps if step.reply.generation == 1]
    assert [step.reply.prep_ns for step in first] == [WAKE_NS * (step.request.device_idle_ns > 0) for step in first]
    assert all(step.device_start_ns - step.dispatch_ns == WAKE_NS for step in first if step.reply.prep_ns)
    generations = [step.reply.generation for step in steps]
    assert generations == sorted(generations)
    # Each generation leased some.
    assert {step.reply.generation for step in steps if step.leased} == {1, 2, 3, 4}
    traces = [str(path) for path in (tmp_path / "traces").glob("*.trace")]
    assert " 0 different, 0 skipped" in step_oracle("recompute", *traces, "--state-dir", str(oracle.state_dir))
