"""Every supported vLLM serves through the shim: real HTTP, real client, exact output token counts."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

import fleet
from engine_process import EngineProcess
from environments import VllmEnvironment
from fleet import KV_BLOCKS, MODEL, STEP_NS, client, replies, step_oracle, upload
from oracle_process import OracleProcess

pytestmark = pytest.mark.vllm

EOS_ID = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LENGTHS = {"classes": [{"prompt_bin_begin": [0], "quantile_tokens": [11, 11], "quantiles_per_bin": 2}]}


@pytest.fixture(scope="module")
def served(
    vllm: VllmEnvironment, site: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[OracleProcess, EngineProcess, Path]]:
    """One engine for the module: async scheduling, prefix caching and chunked prefill on, small prefill budget."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "lengths.json").write_text(json.dumps(LENGTHS))
    (folder / "traces").mkdir()
    with OracleProcess(folder / "state") as oracle:
        digest = upload(oracle, folder / "pack", STEP_NS)
        target = ("--target", oracle.target)
        step_oracle("experiment", "create", "default", "--pack", digest, *target)
        with EngineProcess(
            vllm,
            model,
            target=oracle.target,
            site=site,
            log_path=folder / "engine.log",
            extra_args=["--served-model-name", MODEL, "--max-model-len", "8192", "--max-num-batched-tokens", "512"],
            extra_env={"STEP_ORACLE_TRACE": f"{folder}/traces/"},
        ) as engine:
            yield oracle, engine.wait_ready(), folder


@pytest.fixture
def openai(served: tuple[OracleProcess, EngineProcess, Path]) -> Iterator[OpenAI]:
    with client(served[1]) as opened:
        yield opened


def complete(openai: OpenAI, prompt: str | list[int] = "one two three", **options: Any) -> Any:
    return openai.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 16, **options})


def ignoring_eos(**extra: Any) -> dict[str, Any]:
    return {"ignore_eos": True, **extra}


def test_the_engine_is_the_pack_s_device(served: tuple[OracleProcess, EngineProcess, Path]) -> None:
    log = served[1].log_text()
    assert f"{KV_BLOCKS} KV blocks (assumed)" in log
    assert f"KV cache size: {KV_BLOCKS * 16:,} tokens" in log


def test_32_requests_streamed_and_not_get_exactly_the_tokens_they_asked_for(openai: OpenAI) -> None:
    def one(i: int) -> tuple[int, int, str]:
        wanted = 5 + 3 * i
        options: dict[str, Any] = {"max_tokens": wanted, "extra_body": ignoring_eos()}
        prompt = list(range(300, 320 + 40 * i))
        if i % 2:
            answer = complete(openai, prompt, **options)
            return wanted, answer.usage.completion_tokens, answer.choices[0].finish_reason
        chunks = list(complete(openai, prompt, stream=True, stream_options={"include_usage": True}, **options))
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        return wanted, chunks[-1].usage.completion_tokens, reasons[0]

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(one, range(32)))
    assert [got for _, got, _ in results] == [wanted for wanted, _, _ in results]
    assert {reason for _, _, reason in results} == {"length"}


def test_steps_run_back_to_back_on_one_device(served: tuple[OracleProcess, EngineProcess, Path]) -> None:
    """Async scheduling keeps its overlap: in a long decode the next step starts when the one before ends."""
    _, engine, folder = served
    fleet.complete(engine, max_tokens=200)
    steps = replies(folder / "traces")[-190:-5]
    gaps = [after.device_start_ns - before.device_finish_ns for before, after in itertools.pairwise(steps)]
    assert min(gaps) >= 0
    assert sum(gap == 0 for gap in gaps) > 0.9 * len(gaps)
    assert {step.device_finish_ns - step.device_start_ns for step in steps} == {STEP_NS}


def test_a_hint_ends_a_request_with_eos(openai: OpenAI) -> None:
    answer = complete(openai, max_tokens=100, extra_body={"vllm_xargs": {"step_oracle_output_tokens": 7}})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (7, "stop")


def test_a_hint_beyond_the_limit_is_cut_by_vllm(openai: OpenAI) -> None:
    answer = complete(openai, max_tokens=9, extra_body={"vllm_xargs": {"step_oracle_output_tokens": 50}})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (9, "length")


def test_min_tokens_hold_eos_back(openai: OpenAI) -> None:
    extra = {"min_tokens": 12, "vllm_xargs": {"step_oracle_output_tokens": 4}}
    answer = complete(openai, max_tokens=40, extra_body=extra)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (12, "stop")


def test_ignore_eos_wins_over_a_hint(openai: OpenAI) -> None:
    extra = ignoring_eos(vllm_xargs={"step_oracle_output_tokens": 4})
    answer = complete(openai, max_tokens=21, extra_body=extra)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (21, "length")


def test_without_a_policy_a_request_runs_to_its_limit(openai: OpenAI) -> None:
    answer = complete(openai, max_tokens=33)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (33, "length")


def test_the_experiment_s_length_table_decides_when_activated(
    served: tuple[OracleProcess, EngineProcess, Path], openai: OpenAI
) -> None:
    oracle, _, folder = served
    target = ("--target", oracle.target)
    step_oracle("experiment", "activate", "default", "--lengths", str(folder / "lengths.json"), *target)
    try:
        answer = complete(openai, max_tokens=100)
    finally:
        step_oracle("experiment", "rollback", "default", *target)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (11, "stop")


def test_n_choices_each_get_their_tokens(openai: OpenAI) -> None:
    answer = complete(openai, n=3, max_tokens=14, extra_body=ignoring_eos())
    assert answer.usage.completion_tokens == 3 * 14
    assert len({choice.text for choice in answer.choices}) == 3


def test_stop_strings_and_repetition_detection_are_not_tripped(
    served: tuple[OracleProcess, EngineProcess, Path], openai: OpenAI
) -> None:
    extra: dict[str, Any] = ignoring_eos()
    newest = re.search(r"\(v0\.3\d", served[1].log_text())
    if newest:
        extra["repetition_detection"] = {"max_pattern_size": 40, "min_count": 2}
    answer = complete(openai, max_tokens=300, stop=["an", "the", "\n", "o"], extra_body=extra)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (300, "length")


def test_logprobs_have_the_requested_width_and_are_probabilities(openai: OpenAI) -> None:
    answer = complete(openai, max_tokens=6, logprobs=3, extra_body=ignoring_eos())
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 6
    for tops in logprobs.top_logprobs:
        assert len(tops) in (3, 4)
        assert sum(map(math.exp, tops.values())) <= 1.0


def test_prompt_logprobs_cover_the_prompt(openai: OpenAI) -> None:
    answer = complete(openai, list(range(300, 900)), max_tokens=2, extra_body=ignoring_eos(prompt_logprobs=1))
    rows = answer.choices[0].prompt_logprobs
    assert len(rows) == 600
    assert rows[0] is None
    assert str(599 + 300) in rows[599]


def test_chat_logprobs_are_served(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=5,
        logprobs=True,
        top_logprobs=2,
        extra_body=ignoring_eos(),
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert [len(token.top_logprobs) for token in content] == [2] * 5


def test_a_json_schema_request_gives_valid_json_of_exact_length(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "a person"}],
        max_tokens=300,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    )
    text = answer.choices[0].message.content or ""
    person = json.loads(text)
    assert sorted(person) == ["age", "name", "tags"]
    assert isinstance(person["age"], int)
    assert answer.choices[0].finish_reason == "stop"
    # One token per character under this tokenizer's single-character tokens, and EOS.
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(text) + 1


def test_prefix_hits_shorten_the_prefill(served: tuple[OracleProcess, EngineProcess, Path]) -> None:
    _, engine, folder = served
    prompt = list(range(400, 720))
    fleet.complete(engine, prompt, max_tokens=1)
    fleet.complete(engine, prompt, max_tokens=1)
    chunks = [step.request.shape.prefill_chunks for step in replies(folder / "traces")]
    last = [chunk for chunks_of_step in chunks for chunk in chunks_of_step][-1]
    assert last.context_tokens >= 304
    assert last.num_tokens + last.context_tokens == 320


def test_long_prompts_are_prefilled_in_chunks(served: tuple[OracleProcess, EngineProcess, Path]) -> None:
    _, engine, folder = served
    prompt = [5 + i % 1000 for i in range(2000)]
    fleet.complete(engine, prompt, max_tokens=1, extra_body=ignoring_eos(cache_salt="alone"))
    found = []
    for step in reversed(replies(folder / "traces")):
        found += [(c.context_tokens, c.num_tokens) for c in step.request.shape.prefill_chunks]
        if len(found) >= 4:
            break
    assert found[:4] == [(1536, 464), (1024, 512), (512, 512), (0, 512)]


def test_vllm_s_own_metrics_count_the_tokens(served: tuple[OracleProcess, EngineProcess, Path], openai: OpenAI) -> None:
    def generated() -> float:
        with urllib.request.urlopen(f"{served[1].base_url}/metrics") as page:  # noqa: S310
            found = re.search(r"^vllm:generation_tokens_total\{.*\} (\S+)$", page.read().decode(), re.MULTILINE)
        assert found
        return float(found[1])

    before = generated()
    complete(openai, max_tokens=25, extra_body=ignoring_eos())
    assert generated() - before == 25


def test_every_recorded_reply_recomputes_offline_and_on_a_second_server(
    served: tuple[OracleProcess, EngineProcess, Path],
) -> None:
    oracle, engine, folder = served
    fleet.complete(engine, max_tokens=50)
    traces = [str(path) for path in (folder / "traces").glob("*.trace")]
    assert len(replies(folder / "traces")) > 500
    offline = json.loads(step_oracle("recompute", *traces, "--state-dir", str(oracle.state_dir), "--json"))
    assert (offline["different"], offline["skipped"]) == (0, 0)
    assert offline["equal"] == len(replies(folder / "traces"))
    # Another process over a copy of the state answers the same bytes; it speaks for the current generation only.
    shutil.copytree(oracle.state_dir, folder / "copy", ignore=shutil.ignore_patterns("lock"))
    with OracleProcess(folder / "copy") as second:
        online = json.loads(step_oracle("recompute", *traces, "--target", second.target, "--json"))
    assert online["different"] == 0
    assert online["equal"] >= 50
    assert online["equal"] + online["skipped"] == offline["equal"]
