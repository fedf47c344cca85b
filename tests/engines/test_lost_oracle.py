"""kill -9 of the oracle in the middle of a run: finished within the budget, a loud end past it."""

from __future__ import annotations

import re
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import openai
import pytest

from engine_process import EngineProcess
from fleet import StartEngine, complete, replies, step_oracle, upload
from oracle_process import OracleProcess

pytestmark = pytest.mark.vllm

STEP_NS = 5_000_000
NUM_REQUESTS = 12
NUM_TOKENS = 400


def prepare(oracle: OracleProcess, folder: Path) -> None:
    digest = upload(oracle, folder / "pack", STEP_NS)
    step_oracle("experiment", "create", "default", "--pack", digest, "--target", oracle.target)
    (folder / "traces").mkdir()


def one(engine: EngineProcess, i: int) -> int:
    answer = complete(engine, list(range(300, 310 + i)), max_tokens=NUM_TOKENS)
    return int(answer.usage.completion_tokens)


def steps_in(folder: Path) -> int:
    return len(replies(folder / "traces"))


def wait_for_steps(folder: Path, more: int, timeout_seconds: float = 30) -> None:
    start, end = steps_in(folder), time.monotonic() + timeout_seconds
    while steps_in(folder) < start + more:
        assert time.monotonic() < end, "the engine makes no steps"
        time.sleep(0.05)


def test_engines_that_reconnect_within_the_budget_finish_everything(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    prepare(oracle, tmp_path)
    engine = start_engine(oracle.target, STEP_ORACLE_TRACE=f"{tmp_path}/traces/", STEP_ORACLE_BUDGET_SECONDS="30")
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        running = [pool.submit(one, engine, i) for i in range(NUM_REQUESTS)]
        for _ in range(2):
            wait_for_steps(tmp_path, 50)
            oracle.kill()
            time.sleep(0.7)
            oracle.start()
        assert [future.result() for future in running] == [NUM_TOKENS] * NUM_REQUESTS

    steps = replies(tmp_path / "traces")
    indices = [step.request.step_index for step in steps]
    assert indices == sorted(set(indices))
    late = [step for step in steps if step.answer_ns > step.deadline_ns + 300_000_000]
    # Each outage lasts 0.7 s and more: the one or two steps that were pending came late by it, and only those.
    assert 2 <= len(late) <= 4
    traces = [str(path) for path in (tmp_path / "traces").glob("*.trace")]
    assert " 0 different, 0 skipped" in step_oracle("recompute", *traces, "--state-dir", str(oracle.state_dir))


def test_past_the_budget_every_request_ends_and_so_does_the_engine(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    prepare(oracle, tmp_path)
    engine = start_engine(oracle.target, STEP_ORACLE_TRACE=f"{tmp_path}/traces/", STEP_ORACLE_BUDGET_SECONDS="2")
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        running: list[Future[int]] = [pool.submit(one, engine, i) for i in range(NUM_REQUESTS)]
        wait_for_steps(tmp_path, 50)
        oracle.kill()
        killed = time.monotonic()
        done, pending = wait(running, timeout=2 + 5)
        assert not pending, f"{len(pending)} requests hang {time.monotonic() - killed:.1f} s after the oracle's death"
        for future in done:
            with pytest.raises(openai.APIError):
                future.result()
    assert engine.wait(timeout_seconds=30) != 0
    last = engine.log_text().strip().splitlines()[-1]
    assert oracle.target in last
    assert "budget 2 s" in last
    assert re.search(r"at step \d+ of engine ", last)


@pytest.mark.one_vllm
def test_an_oracle_that_is_not_there_ends_the_start_with_one_sentence(start_engine: StartEngine) -> None:
    engine = start_engine("127.0.0.1:9", ready=False, STEP_ORACLE_BUDGET_SECONDS="1")
    assert engine.wait(timeout_seconds=120) != 0
    last = engine.log_text().strip().splitlines()[-1]
    assert "127.0.0.1:9 gave no device" in last
    assert "budget of 1 s" in last


@pytest.mark.one_vllm
def test_an_experiment_that_is_not_there_ends_the_start_with_its_name(
    oracle: OracleProcess, start_engine: StartEngine
) -> None:
    engine = start_engine(oracle.target, ready=False)
    assert engine.wait(timeout_seconds=120) != 0
    assert "tenants/default/experiments/default" in engine.log_text().strip().splitlines()[-1]


@pytest.mark.one_vllm
def test_a_second_live_engine_of_the_same_id_is_refused(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    prepare(oracle, tmp_path)
    first = start_engine(oracle.target, STEP_ORACLE_ENGINE_ID="twin")
    second = start_engine(oracle.target, ready=False, STEP_ORACLE_ENGINE_ID="twin")
    assert second.wait(timeout_seconds=120) != 0
    assert "twin" in second.log_text().strip().splitlines()[-1]
    assert one(first, 0) == NUM_TOKENS


@pytest.mark.one_vllm
def test_a_pack_of_another_model_is_refused_with_the_difference(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    from oracle_server.pack import Model

    digest = upload(oracle, tmp_path / "pack", STEP_NS, model=Model(id="other", shape="LlamaForCausalLM layers=1"))
    step_oracle("experiment", "create", "default", "--pack", digest, "--target", oracle.target)
    engine = start_engine(oracle.target, ready=False)
    assert engine.wait(timeout_seconds=120) != 0
    last = engine.log_text().strip().splitlines()[-1]
    assert "model_shape" in last
    assert "LlamaForCausalLM layers=1" in last


@pytest.mark.one_vllm
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--pipeline-parallel-size", "2"), "pipeline parallelism"),
        (("--runner", "pooling"), "pooling models"),
    ],
)
def test_what_is_not_emulated_is_refused_at_start(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    prepare(oracle, tmp_path)
    engine = start_engine(oracle.target, *arguments, ready=False)
    assert engine.wait(timeout_seconds=120) != 0
    assert f"step-oracle does not emulate {sentence}" in engine.log_text()


@pytest.mark.one_vllm
def test_the_environment_is_dormant_without_a_target(start_engine: StartEngine) -> None:
    """The same environment is a plain vLLM: without a GPU it finds no device, and our code does not show."""
    engine = start_engine(None, ready=False)
    assert engine.wait(timeout_seconds=120) != 0
    assert "StepOracle" not in engine.log_text()
