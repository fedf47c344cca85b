"""Replay of data-parallel ranks of a MoE model with real vLLM schedulers: one pass together, dummy batches, waves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from builders import build_composed_pack, build_constant_pack
from bundles import MOE_CONFIG, moe_request, moe_tables
from environments import VllmEnvironment
from fleet import kv_cache, replies
from model_dir import write_model_dir

pytestmark = pytest.mark.vllm

STEP_NS = 10_000_000
ASYNC, SYNC = "--async-scheduling", "--no-async-scheduling"


class Replayer:
    """Runs the command on the tiny MoE model."""

    def __init__(self, vllm: VllmEnvironment, folder: Path) -> None:
        self._venv = vllm.python.parent.parent
        self._folder = folder
        write_model_dir(folder / "moe", "qwen3-moe-tiny")
        write_model_dir(folder / "dense", "qwen3-tiny")

    def __call__(self, pack: Path, requests: str, engine_args: str, *arguments: str) -> dict[str, Any]:
        out = self._folder / "out.json"
        done = self.run(pack, requests, engine_args, *arguments, "--json", str(out))
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(out.read_bytes())
        return document

    def run(
        self, pack: Path, requests: str, engine_args: str, *arguments: str, model: str | Path = "moe"
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "profiler.cli", "replay", "--pack", str(pack), "--vllm", str(self._venv)]
        config = model if isinstance(model, Path) else self._folder / model / "config.json"
        command += ["--model-config", str(config), "--requests", requests]
        command += ["--engine-args", f"--max-model-len 1024 {engine_args}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def replay(vllm: VllmEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Replayer:
    return Replayer(vllm, tmp_path_factory.mktemp("lock-step"))


def write_requests(path: Path, requests: Sequence[tuple[int, int, int]]) -> str:
    """(arrival ns, prompt tokens, output tokens); prompts share nothing."""
    with path.open("w") as file:
        for i, (arrival_ns, length, output) in enumerate(requests):
            ids = [(i * 131 + k * 7) % 8000 + 3 for k in range(length)]
            row = {"input_toks": length, "output_toks": output, "arrival_time_ns": arrival_ns, "input_tok_ids": ids}
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.mark.parametrize("scheduling", [ASYNC, SYNC])
def test_two_ranks_make_every_pass_together(replay: Replayer, tmp_path: Path, scheduling: str) -> None:
    """The work of the ranks differs; when their steps begin and end does not."""
    build_composed_pack(tmp_path / "pack", kv_cache=kv_cache(200), ratios=(0.9, 1.0, 1.1))
    path = write_requests(tmp_path / "requests.jsonl", [(i * 3_000_000, 40 + 61 * i, 5 + 4 * i) for i in range(12)])
    arguments = f"{scheduling} --data-parallel-size 2"

    document = replay(tmp_path / "pack", path, arguments, "--trace", f"{tmp_path}/trace/")

    run = document["runs"][0]
    assert document["engine"]["data_parallel_size"] == 2
    assert [entry["output_tokens"] for entry in run["requests"]] == [5 + 4 * i for i in range(12)]
    assert [entry["engine"] for entry in run["requests"]] == [0, 1] * 6
    passes: dict[int, set[tuple[int, int]]] = {}
    own: dict[int, list[int]] = {}
    for step in replies(tmp_path / "trace"):
        passes.setdefault(step.request.step_index, set()).add((step.device_start_ns, step.device_finish_ns))
        own.setdefault(step.request.step_index, []).append(step.reply.latency_ns[0])
    shared = [index for index, latencies in own.items() if len(latencies) == 2]
    assert len(shared) > 20
    assert all(len(times) == 1 for times in passes.values())
    for index in shared:
        ((start_ns, finish_ns),) = passes[index]
        assert finish_ns - start_ns == max(own[index])
    starts = [next(iter(passes[index])) for index in sorted(passes)]
    assert all(finish <= start for (_, finish), (start, _) in pairwise(starts))


def test_an_idle_rank_runs_dummy_batches_until_the_wave_ends(replay: Replayer, tmp_path: Path) -> None:
    """Ranks agree every 16 (0.33.0) or 32 passes, so ten passes of one request end in a wave of as many on both."""
    build_constant_pack(tmp_path / "pack", latency_ns=STEP_NS)
    path = write_requests(tmp_path / "requests.jsonl", [(0, 50, 10), (5_000_000_000, 50, 10)])

    run = replay(tmp_path / "pack", path, f"{SYNC} --data-parallel-size 2")["runs"][0]

    waves, requests = 2, 20
    passes = run["steps"] // 2
    assert passes in (waves * 16, waves * 32)
    assert run["dummy_steps"] == 2 * passes - requests
    for entry, arrival_ns in zip(run["requests"], (0, 5_000_000_000), strict=True):
        assert entry["scheduled_ns"] == arrival_ns
        assert entry["last_token_ns"] == arrival_ns + 10 * STEP_NS


def test_the_same_inputs_give_the_same_bytes_and_a_second_run_is_a_fresh_one(replay: Replayer, tmp_path: Path) -> None:
    build_composed_pack(tmp_path / "pack", kv_cache=kv_cache(200), ratios=(0.9, 1.0, 1.1))
    path = write_requests(tmp_path / "requests.jsonl", [(i * 2_000_000, 30 + 40 * i, 4 + 3 * i) for i in range(9)])
    arguments = ("--data-parallel-size 3", "--router", "least_requests")

    both = replay(tmp_path / "pack", path, *arguments, "--runs", "2", "--seed", "4", "--null-oracle")
    again = replay(tmp_path / "pack", path, *arguments, "--runs", "2", "--seed", "4", "--null-oracle")
    alone = replay(tmp_path / "pack", path, *arguments, "--seed", "5")

    assert both == again
    assert both["runs"][1] == alone["runs"][0]
    assert both["runs"][0]["metrics_ms"] != alone["runs"][0]["metrics_ms"]


def test_an_imported_moe_pack_is_replayed_by_as_many_ranks_as_it_is_of_and_no_others(
    replay: Replayer, tmp_path: Path, vllm: VllmEnvironment
) -> None:
    from profiler.llmservingsim import read_bundle
    from profiler.llmservingsim_link import RingLink
    from profiler.llmservingsim_pack import write_bundle

    link = RingLink(16e9, 5e-6, "test")
    asked = moe_request(
        tmp_path, moe_tables(1, 2), data_parallel=2, expert_parallel=2, link=link, kv_blocks_assumed=200
    )
    config = MOE_CONFIG | {"model_type": "mixtral", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    (tmp_path / "mixtral.json").write_text(json.dumps(config | {"sliding_window": None, "rope_theta": 1e6}))
    write_bundle(read_bundle(asked), tmp_path / "pack")
    path = write_requests(tmp_path / "requests.jsonl", [(0, 20, 4), (0, 30, 4)])
    model = tmp_path / "mixtral.json"

    pair = replay.run(tmp_path / "pack", path, "--data-parallel-size 2 --enable-expert-parallel", model=model)
    one = replay.run(tmp_path / "pack", path, "", model=model)

    assert pair.returncode == 0, pair.stderr
    assert "steps with a dummy batch" in pair.stdout
    assert one.returncode == 1
    assert "data_parallel_size is 1 here, 2 in the pack" in one.stderr


def test_what_is_no_group_of_ranks_is_refused(replay: Replayer, tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack", latency_ns=STEP_NS)
    path = write_requests(tmp_path / "requests.jsonl", [(0, 50, 4)])

    dense = replay.run(tmp_path / "pack", path, "--data-parallel-size 2", model="dense")
    groups = replay.run(tmp_path / "pack", path, "--data-parallel-size 2", "--engines", "2")

    assert dense.returncode == 1
    assert "its ranks are engines of their own; add --engine-args" in dense.stderr
    assert groups.returncode == 1
    assert "one group of lock-step ranks" in groups.stderr
