"""Overlays on a real engine: it slows down and stalls while it serves, and an injected error ends it by name."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from fleet import STEP_NS, StartEngine, complete, replies, step_oracle, upload
from oracle_process import OracleProcess

pytestmark = [pytest.mark.vllm, pytest.mark.one_vllm]

STALL_NS = 20_000_000


def test_an_engine_slows_down_stalls_and_ends_by_an_injected_error(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    target = ("--target", oracle.target)
    digest = upload(oracle, tmp_path / "pack", STEP_NS)
    step_oracle("experiment", "create", "default", "--pack", digest, *target)
    (tmp_path / "traces").mkdir()
    engine = start_engine(oracle.target, STEP_ORACLE_TRACE=f"{tmp_path}/traces/", STEP_ORACLE_ENGINE_ID="victim")
    tokens = 40
    overlays = [
        (),
        ("--slow-down", "2"),
        ("--clear", "--stall-every", "4", "--stall-ms", "20"),
        # Growth by 1 in each 0.1 s of device time.
        ("--clear", "--degrade-per-hour", "1000"),
    ]
    for words in overlays:
        if words:
            step_oracle("experiment", "overlay", "default", *words, *target)
        assert complete(engine, max_tokens=tokens).usage.completion_tokens == tokens

    generations = (1, 2, 3, 4)
    steps = {g: [s for s in replies(tmp_path / "traces") if s.reply.generation == g] for g in generations}
    latencies = {g: [s.reply.latency_ns[0] for s in steps[g]] for g in generations}
    # The first message after an activation may cross it on the wire.
    assert all(tokens - 1 <= len(found) <= tokens + 1 for found in latencies.values()), latencies
    assert (set(latencies[1]), set(latencies[2])) == ({STEP_NS}, {2 * STEP_NS})
    assert set(latencies[3]) == {STEP_NS, STEP_NS + STALL_NS}
    grown = [1 + 1000 * s.request.device_time_ns / 3.6e12 for s in steps[4]]
    assert latencies[4] == [int(STEP_NS * factor + 0.5) for factor in grown]
    assert grown[-1] > grown[0] > 1
    # A constant factor goes into leases; stalls and growth are decided step by step.
    assert [any(s.leased for s in steps[g]) for g in generations] == [True, True, False, False]

    step_oracle("experiment", "overlay", "default", "--clear", "--error-every", "1", *target)
    with pytest.raises(openai.APIError):
        complete(engine, max_tokens=tokens)
    assert engine.wait(timeout_seconds=60) != 0
    last = engine.log_text().strip().splitlines()[-1]
    assert "injected error" in last
    assert "of engine victim" in last
    assert "generation 5" in last
    failed = [s for s in replies(tmp_path / "traces") if s.reply.injected_error]
    assert len(failed) == 1
    assert f"step {failed[0].reply.step_index} of" in last
    traces = [str(path) for path in (tmp_path / "traces").glob("*.trace")]
    assert " 0 different, 0 skipped" in step_oracle("recompute", *traces, "--state-dir", str(oracle.state_dir))
