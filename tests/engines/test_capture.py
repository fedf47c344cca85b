"""A real engine that runs a real model, captured: what its clients received is what the capture says, dead or alive."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from engine_process import EngineProcess, engine_variables, free_port
from environments import VllmEnvironment, cpu_vllm_environment
from fleet import StartEngine, replies, step_oracle, upload
from model_dir import write_model_dir
from oracle_process import OracleProcess
from profiler.capture import capture_command
from profiler.capture.steps import CapturedRun, CapturedStep, read_capture
from profiler.capture.trace_file import read_capture_file

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LIMITS = (
    *("--enforce-eager", "--max-model-len", "2048", "--max-num-batched-tokens", "256", "--max-num-seqs", "16"),
    *("--no-enable-prefix-caching", "--served-model-name", "m"),
)
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}
# A capture may lose this much of its end, whatever ends the engine.
WRITTEN_SECONDS = 1.0


@pytest.fixture(scope="module")
def cpu_vllm() -> VllmEnvironment:
    return cpu_vllm_environment()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model") / "tiny", "qwen3-tiny", num_hidden_layers=2)


@dataclass(frozen=True)
class Killed:
    """A capture whose engine was killed in the middle of requests, after others had been answered."""

    run: CapturedRun
    # Prompt and output tokens of each answered request, as the server counts them.
    usage: list[tuple[int, int]]
    log: str

    @property
    def answered(self) -> list[CapturedStep]:
        """Steps before the first of a request that was killed: its is the first new one after the answered."""
        new = list(itertools.accumulate(step.num_new_requests for step in self.run.steps))
        return [step for step, count in zip(self.run.steps, new, strict=True) if count <= len(self.usage)]


@pytest.fixture(scope="module")
def killed(cpu_vllm: VllmEnvironment, tiny: Path, site: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    command = capture_command(["vllm"], folder / "capture", {})
    engine = EngineProcess(
        cpu_vllm,
        tiny,
        target=None,
        site=site,
        log_path=folder / "engine.log",
        extra_args=(*LIMITS, *command.arguments[1:]),
        extra_env={**CPU, **command.environment},
    )
    with engine, ThreadPoolExecutor(1) as pool:
        engine.wait_ready()
        usage = complete(engine, [(40, 12), (300, 8), (7, 20), (120, 5)])
        time.sleep(WRITTEN_SECONDS)
        dying = pool.submit(complete, engine, [(100, 1500)] * 4)
        time.sleep(random.Random(11).uniform(1.0, 3.0))
        os.killpg(engine.pid, signal.SIGKILL)
        assert dying.exception() is not None
    (run,) = read_capture(folder / "capture")
    return Killed(run, usage, engine.log_text())


def complete(engine: EngineProcess, lengths: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Requests of (prompt, output) tokens at once; what the server says it read and wrote for each."""
    client = OpenAI(base_url=f"{engine.base_url}/v1", api_key="none", max_retries=0, timeout=120)
    source = random.Random(5)
    prompts = [[source.randint(300, 1400) for _ in range(prompt)] for prompt, _ in lengths]

    def one(number: int) -> tuple[int, int]:
        answer = client.completions.create(
            model="m", prompt=prompts[number], max_tokens=lengths[number][1], extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens, answer.usage.completion_tokens

    with ThreadPoolExecutor(len(lengths)) as pool:
        return list(pool.map(one, range(len(lengths))))


def test_a_killed_engine_leaves_every_token_it_had_sent(killed: Killed) -> None:
    steps = killed.run.steps

    assert sum(sum(step.chunk_tokens) for step in killed.answered) == sum(prompt for prompt, _ in killed.usage)
    assert sum(step.generated_tokens for step in killed.answered) == sum(output for _, output in killed.usage)
    assert len(steps) > len(killed.answered), "nothing of the requests that were running"
    assert all("steps are not in every rank's file" in note or "last record" in note for note in killed.run.notes)
    for step in steps:
        assert step.dispatch_ns <= step.device_start_ns < step.device_end_ns <= step.result_ns
        assert step.num_decode_requests + len(step.chunk_tokens) <= 16
    assert killed.run.overhead.step_us > 0


def test_the_facts_are_the_engine_s(killed: Killed) -> None:
    facts, rank = killed.run.engine["engine"], killed.run.ranks[0]

    assert killed.run.timing == "host"
    assert (facts["max_num_seqs"], facts["max_num_batched_tokens"], facts["block_size"]) == (16, 256, 128)
    # The CPU platform turns asynchronous scheduling off, whatever is asked for.
    assert facts["async_scheduling"] is False
    assert facts["num_kv_blocks"] * facts["block_size"] * facts["kv_bytes_per_token"] <= 1 << 30
    assert f"KV cache size: {facts['num_kv_blocks'] * facts['block_size']:,} tokens" in killed.log
    assert rank["attention_backends"] == ["CPU_ATTN"]
    assert rank["libraries"]["torch"].startswith("2.")
    assert killed.run.engine["vllm_config"]["scheduler_config"]["max_num_seqs"] == 16


def test_the_scheduler_s_half_sees_the_shapes_the_shim_sees(
    start_engine: StartEngine, oracle: OracleProcess, tmp_path: Path
) -> None:
    """Under asynchronous scheduling, on every supported vLLM: an emulated engine has no worker, but its scheduler."""
    run, traces = tmp_path / "run-001", tmp_path / "traces"
    run.mkdir()
    traces.mkdir()
    upload(oracle, tmp_path / "pack", 3_000_000)
    step_oracle("experiment", "create", "default", "--pack", str(tmp_path / "pack"), "--target", oracle.target)
    engine = start_engine(
        oracle.target,
        *("--max-num-batched-tokens", "256", "--scheduler-cls", "profiler.capture.scheduler.capture_scheduler"),
        STEP_ORACLE_CAPTURE=str(run),
        STEP_ORACLE_TRACE=f"{traces}/",
    )
    complete(engine, [(40, 12), (700, 8), (7, 20)])
    time.sleep(WRITTEN_SECONDS)
    engine.stop()
    emulated = {step.request.step_index: step for step in replies(traces)}
    captured = {
        step.step_index: (record.scheduled.base_ns, step)
        for record in read_capture_file(run / "engine.capture").records
        for step in record.scheduled.steps
    }
    facts = json.loads((run / "engine.json").read_text())["engine"]

    assert facts["async_scheduling"] is True
    assert len(captured) >= 20
    assert set(captured) == set(emulated)
    overlapping = 0
    for index, (base_ns, step) in captured.items():
        assert step.shape == emulated[index].request.shape
        assert base_ns + step.dispatch_ns <= emulated[index].dispatch_ns
        assert base_ns + step.result_ns >= emulated[index].resolved_ns
        before = captured.get(index - 1)
        overlapping += before is not None and base_ns + step.dispatch_ns < before[0] + before[1].result_ns
    assert overlapping > len(captured) / 2


def test_the_command_drives_the_plan_and_tells_what_it_cost(
    cpu_vllm: VllmEnvironment, tiny: Path, site: Path, tmp_path: Path
) -> None:
    port = str(free_port())
    serve = [str(cpu_vllm.python), "-m", "vllm.entrypoints.cli.main", "serve", str(tiny), "--load-format", "dummy"]
    serve += ["--host", "127.0.0.1", "--port", port, *LIMITS]
    command = [str(cpu_vllm.python), "-m", "profiler.cli", "capture", "-o", str(tmp_path / "capture"), "--plan"]
    done = subprocess.run(
        [*command, "--minutes", "0.2", "--", *serve],
        env=engine_variables(site, None) | CPU,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (run,) = read_capture(tmp_path / "capture")

    assert "regions tight" in done.stdout
    assert "capture took" in done.stdout
    assert any(step.warm_up for step in run.steps)
    assert {bool(step.chunk_tokens) for step in run.steps if not step.warm_up} == {True, False}
    assert run.overhead.step_us > 0
