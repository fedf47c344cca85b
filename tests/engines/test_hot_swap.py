"""The pack changes by RPC while an engine serves: nothing fails, no step mixes two packs, cold fields are refused."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from fleet import KV_BLOCKS, StartEngine, complete, experiment, kv_cache, replies, step_oracle, upload
from oracle_process import OracleProcess

pytestmark = pytest.mark.vllm

FAST_NS, SLOW_NS = 4_000_000, 9_000_000


def test_a_swap_under_load_fails_nothing_and_mixes_nothing(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    target = ("--target", oracle.target)
    fast = upload(oracle, tmp_path / "fast", FAST_NS)
    slow = upload(oracle, tmp_path / "slow", SLOW_NS)
    step_oracle("experiment", "create", "default", "--pack", fast, *target)
    (tmp_path / "traces").mkdir()
    engine = start_engine(oracle.target, STEP_ORACLE_TRACE=f"{tmp_path}/traces/")

    swapped = Event()

    def ask(i: int) -> set[int]:
        """Requests until the swaps are over, however long commands take; how many tokens they got."""
        counts: set[int] = set()
        while not (counts and swapped.is_set()):
            answer = complete(engine, list(range(300, 340 + i)), max_tokens=300)
            counts.add(int(answer.usage.completion_tokens))
        return counts

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, i) for i in range(8)]
        try:
            for _ in range(3):
                step_oracle("experiment", "activate", "default", "--pack", slow, *target)
                step_oracle("experiment", "rollback", "default", *target)
        finally:
            swapped.set()
        assert [future.result() for future in running] == [{300}] * 8

    steps = replies(tmp_path / "traces")
    latency_of = {1 + i: (SLOW_NS if i % 2 else FAST_NS) for i in range(7)}
    generations = [step.reply.generation for step in steps]
    assert generations == sorted(generations)
    assert len(set(generations)) > 1
    assert [list(step.reply.latency_ns) for step in steps] == [[latency_of[g]] for g in generations]
    assert [step.reply.step_index for step in steps] == sorted({step.reply.step_index for step in steps})
    traces = [str(path) for path in (tmp_path / "traces").glob("*.trace")]
    assert " 0 different, 0 skipped" in step_oracle("recompute", *traces, "--state-dir", str(oracle.state_dir))


@pytest.mark.one_vllm
def test_a_pack_with_other_cold_fields_is_refused_with_the_list(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    target = ("--target", oracle.target)
    fast = upload(oracle, tmp_path / "fast", FAST_NS)
    other = upload(oracle, tmp_path / "other", SLOW_NS, kv_cache=kv_cache(KV_BLOCKS + 1))
    step_oracle("experiment", "create", "default", "--pack", fast, *target)
    engine = start_engine(oracle.target)
    command = [sys.executable, "-m", "profiler.cli", "experiment", "activate", "default", "--pack", other, *target]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "kv_blocks" in refused.stderr
    assert str(KV_BLOCKS + 1) in refused.stderr
    assert str(KV_BLOCKS) in refused.stderr
    assert experiment(oracle)["generation"] in (1, "1")
    assert complete(engine, "still here", max_tokens=5).usage.completion_tokens == 5


@pytest.mark.one_vllm
def test_two_engines_of_one_fleet_follow_their_rules(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    target = ("--target", oracle.target)
    fast = upload(oracle, tmp_path / "fast", FAST_NS)
    slow = upload(oracle, tmp_path / "slow", SLOW_NS)
    step_oracle("experiment", "create", "mixed", "--pack", fast, "--rule", f"label.gpu=slow=>{slow}", *target)
    (tmp_path / "traces").mkdir()
    shared = {
        "STEP_ORACLE_EXPERIMENT": "tenants/default/experiments/mixed",
        "STEP_ORACLE_TRACE": f"{tmp_path}/traces/",
    }
    engines = [
        start_engine(
            oracle.target, ready=False, STEP_ORACLE_ENGINE_ID="a", STEP_ORACLE_ENGINE_LABELS="gpu=fast", **shared
        ),
        start_engine(
            oracle.target, ready=False, STEP_ORACLE_ENGINE_ID="b", STEP_ORACLE_ENGINE_LABELS="gpu=slow", **shared
        ),
    ]
    for engine in engines:
        engine.wait_ready()
        complete(engine, max_tokens=20)
    for name, latency in (("a", FAST_NS), ("b", SLOW_NS)):
        (tmp_path / name).mkdir()
        (tmp_path / "traces" / f"{name}.trace").rename(tmp_path / name / "steps.trace")
        assert [tuple(step.reply.latency_ns) for step in replies(tmp_path / name)] == [(latency,)] * 20
