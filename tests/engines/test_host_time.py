"""What the real engine's host takes between two steps is in the pack; what the emulated one's takes does not show."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from builders import build_composed_pack
from fleet import StartEngine, complete, kv_cache, replies, step_oracle
from oracle_calls import Calls
from oracle_process import OracleProcess
from vllm_shim.timeline import SHORTEST_IDLE_NS

pytestmark = pytest.mark.vllm

NUM_REQUESTS = 4
PREP_NS, COPY_NS = 150_000, 90_000
# Longer than this engine's own.
HOST_NS, HOST_NS_PER_REQUEST = 9_000_000, 20_000


@pytest.mark.parametrize("scheduling", ["--async-scheduling", "--no-async-scheduling"])
def test_steps_follow_the_deadline_before_them_by_the_host_s_time_of_the_pack(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path, scheduling: str
) -> None:
    with Calls(oracle.target) as calls:
        host = (HOST_NS, HOST_NS_PER_REQUEST)
        build_composed_pack(
            tmp_path / "pack", prep_ns=PREP_NS, copy_ns=COPY_NS, host=host, kv_cache=kv_cache(2_000), ratios=[1.0]
        )
        calls.create(calls.upload(tmp_path / "pack"))
        (tmp_path / "traces").mkdir()
        engine = start_engine(oracle.target, scheduling, STEP_ORACLE_TRACE=f"{tmp_path}/traces/")
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            prompts = [list(range(300, 340 + i)) for i in range(NUM_REQUESTS)]
            done = [pool.submit(complete, engine, prompt, max_tokens=60) for prompt in prompts]
            assert [future.result().usage.completion_tokens for future in done] == [60] * NUM_REQUESTS

    steps = replies(tmp_path / "traces")
    assert any(step.leased for step in steps)
    assert not all(step.leased for step in steps)
    followed, deadlines = 0, {0}
    for before, step in pairwise(steps):
        shape, reply = step.request.shape, step.reply
        deadlines.add(before.deadline_ns)
        assert reply.host_ns == HOST_NS + HOST_NS_PER_REQUEST * (shape.num_decode_requests + len(shape.prefill_chunks))
        assert step.after_ns in deadlines
        ready_ns = step.after_ns + reply.host_ns if step.after_ns else step.dispatch_ns
        assert step.device_start_ns == max(ready_ns + PREP_NS, before.device_finish_ns)
        assert step.dispatch_ns - step.after_ns < SHORTEST_IDLE_NS or not step.after_ns
        followed += step.after_ns > 0 and step.device_start_ns > before.device_finish_ns
    # Without asynchronous scheduling each step of requests under way; with it those that the device waits for.
    assert followed > (len(steps) / 2 if scheduling == "--no-async-scheduling" else 0), (followed, len(steps))
    traces = [str(path) for path in (tmp_path / "traces").glob("*.trace")]
    assert " 0 different, 0 skipped" in step_oracle("recompute", *traces, "--state-dir", str(oracle.state_dir))
