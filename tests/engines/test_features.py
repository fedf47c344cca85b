"""Preemption, LoRA, tensor and data parallelism and speculation work through the shim."""

from __future__ import annotations

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine_process import EngineProcess
from fleet import StartEngine, client, complete, kv_cache, replies, step_oracle, upload
from oracle_process import OracleProcess
from oracle_server.pack import Parallel

pytestmark = pytest.mark.vllm

STEP_NS = 3_000_000


def metric(engine: EngineProcess, name: str) -> float:
    with urllib.request.urlopen(f"{engine.base_url}/metrics") as page:  # noqa: S310
        values = re.findall(rf"^{name}\{{.*\}} (\S+)$", page.read().decode(), re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))


def test_preemption_lora_and_tensor_parallelism_under_sync_scheduling(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    target = ("--target", oracle.target)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    adapter_config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(adapter_config))
    # 64 blocks of 16 hold 1,024 tokens; twelve requests grow to 220 tokens each.
    pack = upload(oracle, tmp_path / "pack", STEP_NS, parallel=Parallel(tensor=2), kv_cache=kv_cache(64))
    step_oracle("experiment", "create", "default", "--pack", pack, *target)
    (tmp_path / "traces").mkdir()
    engine = start_engine(
        oracle.target,
        *("--no-async-scheduling", "--tensor-parallel-size", "2", "--max-model-len", "512"),
        *("--enable-lora", "--lora-modules", f"adapter={adapter}"),
        STEP_ORACLE_TRACE=f"{tmp_path}/traces/",
    )

    def one(i: int) -> int:
        with client(engine) as opened:
            answer = opened.completions.create(
                model="adapter" if i % 3 == 0 else "m",
                prompt=[300 + (i * 37 + k) % 900 for k in range(40)],
                max_tokens=180,
                extra_body={"ignore_eos": True},
            )
        assert answer.usage is not None
        return int(answer.usage.completion_tokens)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == [180] * 12
    assert metric(engine, "vllm:num_preemptions_total") > 0
    steps = replies(tmp_path / "traces")
    # A preempted request comes back without being new again.
    assert sum(len(step.request.shape.new_requests) for step in steps) == 12
    assert sum(len(step.request.shape.prefill_chunks) for step in steps) > 12
    assert max(step.request.shape.num_loras for step in steps) == 1
    loras = [new.lora for step in steps for new in step.request.shape.new_requests]
    assert sorted(loras) == [""] * 8 + ["adapter"] * 4
    traces = [str(path) for path in (tmp_path / "traces").glob("*.trace")]
    assert " 0 different, 0 skipped" in step_oracle("recompute", *traces, "--state-dir", str(oracle.state_dir))


def test_speculation_over_two_data_parallel_ranks(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    target = ("--target", oracle.target)
    pack = upload(oracle, tmp_path / "pack", STEP_NS)
    step_oracle("experiment", "create", "default", "--pack", pack, "--draft-acceptance-rate", "0.7", *target)
    (tmp_path / "traces").mkdir()
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    engine = start_engine(
        oracle.target,
        *("--data-parallel-size", "2", "--speculative-config", json.dumps(speculation)),
        STEP_ORACLE_ENGINE_ID="server",
        STEP_ORACLE_TRACE=f"{tmp_path}/traces/",
    )
    with ThreadPoolExecutor(8) as pool:
        wanted = [50 + 7 * i for i in range(8)]
        answers = list(pool.map(lambda n: complete(engine, max_tokens=n, logprobs=1), wanted))
        assert [answer.usage.completion_tokens for answer in answers] == wanted
        assert [len(answer.choices[0].logprobs.tokens) for answer in answers] == wanted
        hinted = complete(engine, max_tokens=90, extra_body={"vllm_xargs": {"step_oracle_output_tokens": 31}})
        assert (hinted.usage.completion_tokens, hinted.choices[0].finish_reason) == (31, "stop")
    engines = json.loads(step_oracle("experiment", "engines", "default", *target, "--json"))
    ids = sorted(e["engine_id"] for e in (engines["engines"] if isinstance(engines, dict) else engines))
    assert ids == ["server/dp0", "server/dp1"]
    steps = replies(tmp_path / "traces")
    drafts = sum(sum(step.request.shape.num_draft_tokens) for step in steps)
    accepted = sum(sum(step.reply.accepted_draft_tokens) for step in steps)
    # Given 0.7 for each draft token after the accepted ones before it, (0.7 + 0.49 + 0.343) / 3 = 0.511 are accepted.
    assert drafts > 300
    assert 0.42 < accepted / drafts < 0.60
    traces = [str(path) for path in (tmp_path / "traces").glob("*.trace")]
    assert " 0 different, 0 skipped" in step_oracle("recompute", *traces, "--state-dir", str(oracle.state_dir))


@pytest.mark.one_vllm
def test_speculation_without_an_acceptance_rate_is_refused(
    oracle: OracleProcess, start_engine: StartEngine, tmp_path: Path
) -> None:
    pack = upload(oracle, tmp_path / "pack", STEP_NS)
    step_oracle("experiment", "create", "default", "--pack", pack, "--target", oracle.target)
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    engine = start_engine(oracle.target, "--speculative-config", json.dumps(speculation), ready=False)
    assert engine.wait(timeout_seconds=120) != 0
    assert "draft_acceptance_rate" in engine.log_text().strip().splitlines()[-1]
