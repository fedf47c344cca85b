"""Fast-forward replay with real vLLM: exact tokens, the same bytes twice, and the steps of a live engine again."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders import build_composed_pack, build_constant_pack
from environments import REPOSITORY, VllmEnvironment
from fleet import StartEngine, complete, kv_cache, replies, step_oracle
from model_dir import write_model_dir
from oracle_process import OracleProcess
from profiler.replay.compiler import MODULES, compiled_folder
from step_oracle.v1 import step_pb2, trace_pb2

pytestmark = pytest.mark.vllm

STEP_NS = 10_000_000
RATIOS = (0.9, 0.95, 1.0, 1.1)


# The pack's basis, an engine option, what is said of the count.
KV_BLOCKS = (
    ("measured", "", "measured"),
    ("assumed", "", "assumed"),
    ("measured", "--num-gpu-blocks-override 90", "engine option"),
)


class Replayer:
    """Runs the command in one vLLM version and reads what it wrote."""

    def __init__(self, vllm: VllmEnvironment, folder: Path) -> None:
        self._venv = vllm.python.parent.parent
        self._folder = folder
        self._count = 0
        write_model_dir(folder / "qwen3-tiny", "qwen3-tiny")
        self.model = folder / "qwen3-tiny" / "config.json"

    def __call__(self, pack: Path, *arguments: str, model: Path | None = None) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.bytes(pack, *arguments, model=model))
        return document

    def bytes(self, pack: Path, *arguments: str, model: Path | None = None) -> bytes:
        self._count += 1
        out = self._folder / f"out-{self._count}.json"
        done = self.run(pack, *arguments, "--json", str(out), model=model)
        assert done.returncode == 0, done.stderr
        assert "extrapolated:" in done.stdout
        assert "x real time" in done.stdout
        return out.read_bytes()

    @property
    def python(self) -> Path:
        """Of vLLM's environment."""
        return self._venv / "bin" / "python"

    def run(self, pack: Path, *arguments: str, model: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "profiler.cli", "replay", "--pack", str(pack), "--vllm", str(self._venv)]
        command += ["--model-config", str(model or self.model), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def replay(vllm: VllmEnvironment, tmp_path_factory: pytest.TempPathFactory) -> Replayer:
    return Replayer(vllm, tmp_path_factory.mktemp("replay"))


def write_requests(path: Path, requests: Sequence[tuple[int, list[int], int]]) -> str:
    """(arrival ns, prompt, output tokens) as ShareGPT-like JSONL."""
    with path.open("w") as file:
        for arrival_ns, prompt, output in requests:
            row = {"input_toks": len(prompt), "output_toks": output, "arrival_time_ns": arrival_ns}
            file.write(json.dumps({**row, "input_tok_ids": prompt}) + "\n")
    return str(path)


def write_trace(path: Path, keys: Sequence[str]) -> Path:
    """A live engine's trace that admitted one request a step."""
    records = [trace_pb2.TraceRecord()]
    records[0].header.engine.engine_id = "live"
    for i, key in enumerate(keys):
        records.append(trace_pb2.TraceRecord())
        step = records[-1].step
        step.request.step_index = i
        step.request.shape.prefill_chunks.add(num_tokens=8)
        step.request.shape.new_requests.add(request_key=key, prompt_tokens=8, max_tokens=5)
        step.reply.target_output_tokens.add()
    data = [record.SerializeToString() for record in records]
    path.write_bytes(b"".join(struct.pack("<I", len(part)) + part for part in data))
    return path


def share_of(steps: Sequence[Any]) -> str:
    """Extrapolated ones, in per cent."""
    beyond = sum(step.reply.support == step_pb2.SUPPORT_EXTRAPOLATED for step in steps)
    return f"{100 * beyond / len(steps):.2f}"


def prompt(number: int, length: int) -> list[int]:
    """Prompts of different numbers share no block."""
    return [(number * 131 + i * 7) % 8000 + 3 for i in range(length)]


def crowd(count: int) -> list[tuple[int, list[int], int]]:
    return [(i * 20_000_000, prompt(i, 60 + 37 * i), 5 + 3 * i) for i in range(count)]


@pytest.mark.parametrize("scheduling", ["--async-scheduling", "--no-async-scheduling"])
def test_every_request_gets_its_tokens_though_kv_blocks_run_out(
    replay: Replayer, tmp_path: Path, scheduling: str
) -> None:
    build_composed_pack(tmp_path / "pack", kv_cache=kv_cache(100), ratios=RATIOS)
    requests = crowd(24)
    path = write_requests(tmp_path / "requests.jsonl", requests)

    document = replay(
        tmp_path / "pack", "--requests", path, "--engine-args", f"{scheduling} --max-model-len 1500 --max-num-seqs 16"
    )

    run = document["runs"][0]
    assert document["engine"]["num_kv_blocks"] == 100
    assert document["engine"]["async_scheduling"] is (scheduling == "--async-scheduling")
    assert [entry["output_tokens"] for entry in run["requests"]] == [output for _, _, output in requests]
    assert run["preemptions"] > 0
    for entry in run["requests"]:
        stamps = ("arrival_ns", "queued_ns", "scheduled_ns", "first_token_ns", "last_token_ns")
        assert sorted(entry[stamp] for stamp in stamps) == [entry[stamp] for stamp in stamps]


def test_the_same_inputs_give_the_same_bytes_and_a_second_run_in_a_process_is_a_fresh_one(
    replay: Replayer, tmp_path: Path
) -> None:
    build_composed_pack(tmp_path / "pack", kv_cache=kv_cache(100), ratios=RATIOS)
    path = write_requests(tmp_path / "requests.jsonl", [*crowd(12), (999_000_000, prompt(3, 171), 4)])
    arguments = ("--requests", path, "--engine-args", "--max-model-len 1500", "--seed", "5", "--null-oracle")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run0-replay.trace").write_bytes(b"of an earlier replay")

    first = replay.bytes(tmp_path / "pack", *arguments, "--runs", "2", "--trace", f"{tmp_path}/a/")
    second = replay.bytes(tmp_path / "pack", *arguments, "--runs", "2", "--trace", f"{tmp_path}/b/")
    alone = replay(tmp_path / "pack", "--requests", path, "--engine-args", "--max-model-len 1500", "--seed", "6")

    assert first == second
    for run in ("run0", "run1"):
        assert (tmp_path / f"a/{run}-replay.trace").read_bytes() == (tmp_path / f"b/{run}-replay.trace").read_bytes()
    both = json.loads(first)["runs"]
    assert both[0]["metrics_ms"] != both[1]["metrics_ms"]
    assert both[1] == alone["runs"][0]


def test_compiled_modules_of_vllm_write_the_same_bytes(replay: Replayer, tmp_path: Path) -> None:
    """Preempted requests, blocks found in the prefix cache and a second run included; the first call compiles."""
    build_composed_pack(tmp_path / "pack", kv_cache=kv_cache(100), ratios=RATIOS)
    again = [(900_000_000 + i, prompt(3, 171), 4) for i in range(3)]
    path = write_requests(tmp_path / "requests.jsonl", [*crowd(24), *again])
    engine = ("--engine-args", "--max-model-len 1500 --max-num-seqs 16")
    arguments = ("--requests", path, *engine, "--runs", "2", "--trace", f"{tmp_path}/steps-")
    traces = [tmp_path / f"steps-run{i}-replay.trace" for i in range(2)]

    plain = replay.bytes(tmp_path / "pack", *arguments)
    plain_steps = [trace.read_bytes() for trace in traces]
    done = replay.run(tmp_path / "pack", *arguments, "--json", f"{tmp_path}/compiled.json", "--compile")

    assert f"{len(MODULES)} modules of vLLM ran compiled" in done.stdout, done.stderr
    assert (tmp_path / "compiled.json").read_bytes() == plain
    assert [trace.read_bytes() for trace in traces] == plain_steps
    run, _ = json.loads(plain)["runs"]
    assert run["preemptions"] > 0
    assert run["prefix_hit_tokens"] > 0


# Not one of these is in what a replay writes: vLLM keeps them to itself.
COMPILED_STAMPS = """
import sys
from pathlib import Path
from profiler.replay import clock, compiled
compiled.install(Path(sys.argv[1]))
own = clock.VirtualClock()
clock.install(clock.VirtualTime(own))
own.wait_until(5_000_000_000)
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
def stamp():
    return Request("a", [1], SamplingParams(max_tokens=1), None).arrival_time
first = stamp()
own.wait_until(7_000_000_000)
print([name for name in compiled.imported() if name == "vllm.v1.request"], first, stamp())
"""


def test_compiled_modules_of_vllm_stamp_requests_in_virtual_time(replay: Replayer) -> None:
    folder = compiled_folder(replay.python, lambda event: None)

    done = subprocess.run(
        [str(replay.python), "-c", COMPILED_STAMPS, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "proto")])},
    )

    assert done.stdout.splitlines()[-1:] == ["['vllm.v1.request'] 5.0 7.0"], done.stderr


def test_times_are_those_of_the_device_and_a_known_prompt_is_found_in_the_cache(
    replay: Replayer, tmp_path: Path
) -> None:
    """Alone in an engine a request of n tokens takes n steps; 165 known tokens are 10 full blocks of 16."""
    build_constant_pack(tmp_path / "pack", latency_ns=STEP_NS)
    same = prompt(1, 165)
    path = write_requests(tmp_path / "requests.jsonl", [(0, same, 8), (1_000_000_000, same, 8)])

    run = replay(tmp_path / "pack", "--requests", path, "--engine-args", "--max-model-len 1024")["runs"][0]

    for entry, arrival_ns in zip(run["requests"], (0, 1_000_000_000), strict=True):
        assert entry["queued_ns"] == entry["scheduled_ns"] == entry["arrival_ns"] == arrival_ns
        assert entry["first_token_ns"] == arrival_ns + STEP_NS
        assert entry["last_token_ns"] == arrival_ns + 8 * STEP_NS
    assert [entry["prefix_hit_tokens"] for entry in run["requests"]] == [0, 160]
    assert run["extrapolated"] == {"steps_percent": 0.0, "device_time_percent": 0.0}


def test_a_closed_loop_keeps_its_users_busy_behind_a_router(replay: Replayer, tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack", latency_ns=STEP_NS)
    loop = ("--users", "4", "--loop-requests", "12", "--prompt-tokens", "100", "--output-tokens", "10")

    document = replay(
        tmp_path / "pack", *loop, "--engines", "2", "--router", "least_requests", "--engine-args", "--max-model-len 512"
    )

    requests = document["runs"][0]["requests"]
    assert sorted(entry["engine"] for entry in requests) == [0] * 6 + [1] * 6
    for entry in requests:
        overlapping = [
            other for other in requests if other["arrival_ns"] <= entry["arrival_ns"] < other["last_token_ns"]
        ]
        assert len(overlapping) <= 4
    ends = sorted(entry["last_token_ns"] for entry in requests)
    assert sorted(entry["arrival_ns"] for entry in requests)[4:] == ends[:8]


def test_several_files_are_runs_of_one_process_each_as_if_alone(replay: Replayer, tmp_path: Path) -> None:
    build_composed_pack(tmp_path / "pack", kv_cache=kv_cache(100), ratios=RATIOS)
    few = write_requests(tmp_path / "few.jsonl", crowd(3))
    many = write_requests(tmp_path / "many.jsonl", [*crowd(6), (0, prompt(9, 1490), 20)])
    arguments = ("--engine-args", "--max-model-len 1500", "--null-oracle")

    document = replay(tmp_path / "pack", "--requests", few, "--requests", many, *arguments, "--runs", "2")
    alone = replay(tmp_path / "pack", "--requests", many, *arguments, "--runs", "2")

    assert [(run["requests_file"], run["seed"]) for run in document["runs"]] == [
        *(("few.jsonl", 0), ("few.jsonl", 1)),
        *(("many.jsonl", 0), ("many.jsonl", 1)),
    ]
    assert document["runs"][2:] == alone["runs"]
    assert [len(run["requests"]) for run in document["runs"]] == [3, 3, 6, 6]
    assert [run["rejected_requests"] for run in document["runs"]] == [[], [], ["bench-6"], ["bench-6"]]


@pytest.mark.parametrize(("basis", "option", "said"), KV_BLOCKS)
def test_the_first_line_says_how_the_kv_blocks_are_known(
    replay: Replayer, tmp_path: Path, basis: Any, option: str, said: str
) -> None:
    build_composed_pack(tmp_path / "pack", kv_cache=msgspec.structs.replace(kv_cache(100), basis=basis))
    path = write_requests(tmp_path / "requests.jsonl", crowd(2))
    out = tmp_path / "out.json"

    done = replay.run(
        *(tmp_path / "pack", "--requests", path, "--json", str(out)),
        *("--engine-args", f"--max-model-len 1024 {option}"),
    )

    assert f"KV blocks of 16 ({said})" in done.stdout.splitlines()[0], done.stderr
    assert json.loads(out.read_text())["engine"]["kv_blocks_basis"] == said


def test_a_replayed_trace_keeps_keys_that_look_as_if_vllm_had_added_to_them(replay: Replayer, tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack", latency_ns=STEP_NS)
    keys = ["chatcmpl-trace-deadbeef", "chatcmpl-trace-0badcafe", "cmpl-mine-0/1"]
    trace = write_trace(tmp_path / "live.trace", keys)

    replay(
        *(tmp_path / "pack", "--requests", str(trace), "--trace", f"{tmp_path}/again/"),
        *("--engine-args", "--max-model-len 1024"),
    )

    found = [new.request_key for step in replies(tmp_path / "again") for new in step.request.shape.new_requests]
    assert found == keys


@pytest.mark.parametrize("engines", ["1", "2"])
def test_ranks_of_a_dense_model_are_asked_for_as_engines(replay: Replayer, tmp_path: Path, engines: str) -> None:
    build_constant_pack(tmp_path / "pack", latency_ns=STEP_NS)
    path = write_requests(tmp_path / "requests.jsonl", crowd(2))

    done = replay.run(
        *(tmp_path / "pack", "--requests", path, "--engines", engines),
        *("--engine-args", "--max-model-len 1024 --data-parallel-size 2"),
    )

    assert done.returncode == 1
    assert (
        '--data-parallel-size 2 of a dense model: its ranks are engines of their own; add --engine-args "'
        '--data-parallel-size 1" and give --engines 2 --router least_requests'
    ) in " ".join(done.stderr.split())


def test_a_refusal_names_what_to_change(replay: Replayer, tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack", latency_ns=STEP_NS)
    path = write_requests(tmp_path / "requests.jsonl", [(0, prompt(0, 50), 4)])

    done = replay.run(tmp_path / "pack", "--requests", path, "--engine-args", "--max-model-len 1024 --no-such-thing")

    assert done.returncode == 1
    assert "vLLM does not take these --engine-args: --max-model-len 1024 --no-such-thing" in done.stderr


def test_a_live_engine_s_recorded_admissions_give_its_steps_again(
    replay: Replayer, oracle: OracleProcess, start_engine: StartEngine, model: Path, tmp_path: Path
) -> None:
    """Compared: the shape of every step (chunks, contexts, requests by key, decode sums) and its latency.

    The live engine is in wall time, so its requests arrive when they arrive; the trace holds the step that first had
    each of them, and the replay admits it right before that step. Nothing else is taken from the trace.
    """
    build_composed_pack(tmp_path / "pack", kv_cache=kv_cache(520), ratios=RATIOS)
    step_oracle("pack", "upload", str(tmp_path / "pack"), "--target", oracle.target)
    listed = json.loads(step_oracle("pack", "list", "--json", "--target", oracle.target))
    digest = (listed["packs"] if isinstance(listed, dict) else listed)[0]["digest"]
    step_oracle("experiment", "create", "default", "--pack", digest, "--target", oracle.target)
    (tmp_path / "live").mkdir()
    # All 20 run at once and outgrow the KV blocks, in whatever order their threads arrive.
    limits = ("--max-num-seqs", "20", "--max-num-batched-tokens", "256")
    engine = start_engine(oracle.target, *limits, STEP_ORACLE_TRACE=f"{tmp_path}/live/")
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda i: complete(engine, prompt(i, 40 + 40 * i), max_tokens=20 + 20 * i), range(20)))
    engine.stop()
    live = replies(tmp_path / "live")
    assert f"ends after {len(live)} steps; extrapolated: {share_of(live)} % of the steps" in engine.log_text()
    (trace,) = (tmp_path / "live").glob("*.trace")

    arguments = " ".join(("--max-model-len", "8192", *limits))
    document = replay(
        tmp_path / "pack",
        *("--requests", str(trace), "--engine-args", arguments, "--trace", f"{tmp_path}/replayed/"),
        model=model,
    )

    replayed = replies(tmp_path / "replayed")
    assert len(live) > 150
    assert document["runs"][0]["preemptions"] > 0
    assert [(step.request.step_index, step.request.shape) for step in replayed] == [
        (step.request.step_index, step.request.shape) for step in live
    ]
    assert [step.reply.latency_ns for step in replayed] == [step.reply.latency_ns for step in live]
