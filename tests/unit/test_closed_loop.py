"""What the closed loop makes of its runs: errors, noise, bounds, LLM-Emu's columns."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import captures
from deploy.closed_loop import closed_loop, cores
from deploy.closed_loop.comparison import (
    METRICS,
    Comparison,
    as_json,
    compare,
    print_comparisons,
    verdict,
    write_deltas,
)
from deploy.closed_loop.explain import (
    Explanation,
    captured_periods,
    explain,
    mean_of,
    print_explanations,
    traced_periods,
)
from deploy.closed_loop.machine import device_machine, model_of
from deploy.closed_loop.options import read_minutes, read_options
from deploy.closed_loop.plans import (
    FIRST_SHARE,
    PlanPack,
    mean_and_largest_error,
    print_errors_by_plan,
    slice_of,
    speeds_of,
)
from deploy.closed_loop.steady import overruns, steady_variables
from deploy.closed_loop.steady_device.law import requests_of, step_ms
from deploy.closed_loop.stolen import Undisturbed, stolen_seconds
from deploy.closed_loop.workloads import QUICK_WORKLOADS, WORKLOADS, BenchClient, Workload, seconds_of
from deploy.demo.progress import DemoFailed
from environments import VllmEnvironment
from model_dir import write_model_dir
from profiler.capture.steps import Overhead, read_capture
from step_oracle.v1.step_pb2 import StepRequest, StepShape
from step_oracle.v1.trace_pb2 import TraceStep


def result(**changes: float) -> dict[str, Any]:
    return {**{key: 100.0 for _, key, _ in METRICS}, "completed": 40, **changes}


POISSON = Workload("Poisson 20 %", share=0.2, capacity=10.0)


def test_the_error_is_that_of_means_and_the_noise_that_of_the_farthest_real_run() -> None:
    real = [result(mean_ttft_ms=90.0), result(mean_ttft_ms=100.0), result(mean_ttft_ms=110.0)]
    emulated = [result(mean_ttft_ms=101.0), result(mean_ttft_ms=105.0)]
    figure = compare(POISSON, real, emulated, 3.0).figure("mean_ttft_ms")

    assert figure.error_percent == pytest.approx(3.0)
    assert figure.noise_percent == pytest.approx(10.0)
    assert figure.is_within


def test_every_mean_has_a_bound_and_one_beyond_it_is_named_with_the_noise() -> None:
    real = [result(mean_tpot_ms=100.0), result(mean_tpot_ms=102.0)]
    comparison = compare(POISSON, real, [result(mean_tpot_ms=105.0)], 3.0)

    assert [figure.metric for figure in comparison.figures if figure.bound_percent] == [
        *("TTFT mean", "TPOT mean", "ITL mean", "E2E mean", "output tokens/s")
    ]
    assert verdict([comparison], " of all") == [
        "1 of 5 means are beyond their bound of all:",
        "  Poisson 20 %: TPOT mean +4.0 % (bound 2.5 %, real runs ±1.0 %)",
    ]
    assert verdict([compare(POISSON, real, real, 3.0)]) == ["0 of 5 means are beyond their bound"]


def test_an_error_that_the_runs_own_differences_explain_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    def runs(*tpots: float) -> list[dict[str, Any]]:
        return [result(mean_tpot_ms=tpot) for tpot in tpots]

    # A machine that slows down by a quarter slows both.
    steady = compare(POISSON, runs(100.0, 112.5, 125.0), runs(105.0, 117.5, 132.0), 3.0)
    shaky = compare(POISSON, runs(90.0, 100.0, 111.5), runs(101.0, 105.5, 110.0), 3.0)
    assert steady.figure("mean_tpot_ms").interval_percent == pytest.approx((3.6, 6.5), abs=0.1)
    assert [each.figure("mean_tpot_ms").is_decided for each in (steady, shaky)] == [True, False]

    told = verdict([steady, shaky])
    assert told[0] == (
        "2 of 10 means are beyond their bound, 1 of them undecided: these runs differ by more among themselves:"
    )
    assert [line.endswith("; undecided") for line in told[1:]] == [False, True]
    print_comparisons([steady, shaky])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("TPOT mean"))
    assert ("+5.0 *" in row, "+5.0 ?" in row) == (True, True)


def test_the_table_has_mean_p50_p90_and_p99_of_four_times_and_the_throughput(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_comparisons([compare(workload, [result()], [result(p99_itl_ms=150.0)], 3.0) for workload in WORKLOADS])
    told = capsys.readouterr().out

    for label in ("TTFT", "TPOT", "ITL", "E2E"):
        for statistic in ("mean", "P50", "P90", "P99"):
            assert f"{label} {statistic}" in told
    assert told.count("+50.0") == len(WORKLOADS)
    assert all(workload.name in told for workload in WORKLOADS)


def test_errors_are_written_in_llm_emus_columns(tmp_path: Path) -> None:
    emulated = result(mean_ttft_ms=104.0, mean_tpot_ms=99.0, output_throughput=101.0)
    loop = Workload("closed loop 8", users=8)
    compared = [compare(workload, [result()], [emulated], 3.0) for workload in (POISSON, loop)]
    write_deltas(tmp_path / "d.csv", compared)
    with (tmp_path / "d.csv").open() as file:
        rows = list(csv.reader(file))

    assert rows[0] == [
        *(
            "rate",
            "ttft_mean_pct",
            "tpot_mean_pct",
            "itl_mean_pct",
            "e2e_mean_pct",
            "tps_pct",
            "workload",
            "plan_minutes",
        )
    ]
    assert rows[1] == ["2", "4.00", "-1.00", "0.00", "0.00", "1.00", "Poisson 20 %", "3"]
    assert rows[2][0] == "inf"


def test_errors_by_length_of_plan_are_told_in_size_and_in_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    def comparisons(minutes: float, *tpots: float) -> list[Comparison]:
        return [
            compare(workload, [result(), result(mean_tpot_ms=100.0)], [result(mean_tpot_ms=tpot)], minutes)
            for workload, tpot in zip(QUICK_WORKLOADS, tpots, strict=True)
        ]

    short, longer = comparisons(1.0, 94.0, 102.0), comparisons(3.0, 101.0, 101.0)
    packs = [PlanPack(minutes, Path("p"), (1.0,), 90.0, 500, 4, 20, 41, 77, "") for minutes in (1.0, 3.0)]
    print_errors_by_plan(packs, [*short, *longer])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]

    assert mean_and_largest_error(short, "tpot") == pytest.approx((4.0, -6.0))
    assert next(row for row in rows if row[:1] == ["1"])[:8] == [
        *("1", "500", "20/77", "41/77", "0.00", "+0.00", "4.00", "-6.00")
    ]
    assert next(row for row in rows if row[:1] == ["3"])[6:8] == ["1.00", "+1.00"]


def test_a_part_of_a_run_has_its_own_steps_and_overhead_and_says_where_they_are(tmp_path: Path) -> None:
    """The run as it was read after each of two parts; the first begins with a warm-up, and costs less of a step."""
    made = captures.steps(100)
    (whole,) = read_capture(captures.write_run(tmp_path, made))
    warm = [step._replace(warm_up=True) for step in made[:10]]
    first = replace(whole, steps=(*warm, *made[10:40]), overhead=Overhead(100.0, 10.0, 20.0, 2000.0))
    whole = replace(whole, steps=(*first.steps, *made[40:]), overhead=Overhead(220.0, 10.0, 20.0, 5000.0))
    parts = [slice_of(first, None), slice_of(whole, first)]

    assert [(part.begin, part.end) for part in parts] == [(0, 30), (30, 90)]
    assert parts[0].run.overhead == first.overhead
    assert list(parts[1].run.steps) == made[40:]
    # 100 steps of 220 us are 40 of 100 and 60 of 300.
    assert astuple(parts[1].run.overhead) == pytest.approx((300.0, 10.0, 20.0, 7000.0))


def test_a_part_without_a_step_is_no_division_by_zero(tmp_path: Path) -> None:
    (whole,) = read_capture(captures.write_run(tmp_path, captures.steps(20)))

    part = slice_of(whole, whole)

    assert (part.begin, part.end, part.run.steps) == (20, 20, ())


def test_a_run_has_the_speed_of_the_two_parts_beside_it() -> None:
    # The pack is 10 % too short for all of them, which is no speed; the first is of no run.
    ratios = [1.1 * np.array(part) for part in ([1.0] * 9, [1.2, 1.2, 1.2], [1.0, 1.0, 1.0], [0.8, 0.8, 0.8, 0.8])]

    # Equally many steps of 1.2 and 1.0; more of 0.8 than of 1.0.
    assert speeds_of(ratios, 2) == pytest.approx((1.1, 0.8))


def test_a_stall_beside_a_run_is_no_speed() -> None:
    ratios = [np.ones(9), np.array([1.0, 1.0, 20.0]), np.array([1.0, 1.0])]

    assert speeds_of(ratios, 1) == (1.0,)


def test_every_other_part_begins_the_plan_anew_and_the_others_go_on_from_repeat_to_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    shares: list[float] = []

    class Planner:
        def next_part(self, minutes: float, share: float, last: str | None) -> str:
            shares.append(share)
            done.append(f"{len(done)} after {last}")
            return str(len(done) - 1)

    loop: Any = object.__new__(closed_loop._Loop)
    loop.options, loop.workloads, loop.planner = SimpleNamespace(minutes=(3.0,), repeats=2), WORKLOADS, Planner()
    loop.parts, loop.farthest = {3.0: ["first"]}, {3.0: "first"}
    monkeypatch.setattr(loop, "_real_run", lambda workload, repeat: done.append(f"run {repeat}"))
    for repeat in range(2):
        loop._real_runs(repeat)

    assert done == [
        *("0 after None", "run 0", "2 after first", "run 0", "4 after 0", "run 0", "6 after 2", "run 0", "8 after 4"),
        *("9 after None", "run 1", "11 after 6", "run 1", "13 after 9", "run 1", "15 after 11", "run 1", "17 after 13"),
    ]
    assert loop.parts == {3.0: ["first", "0", "2", "4", "6", "8", "9", "11", "13", "15", "17"]}
    assert FIRST_SHARE + sum(shares) == pytest.approx(1.0)


def client_of(tmp_path: Path, vllm: str) -> BenchClient:
    """On a vLLM whose command line does this."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(
        f"import json, os, sys\nprint('hello')\ndef main():\n{textwrap.indent(vllm, '    ')}"
    )
    model = write_model_dir(tmp_path / "model", "qwen3-tiny")
    return BenchClient(VllmEnvironment(Path(sys.executable), "0"), tmp_path / "site", model, tmp_path / "client.log")


def test_runs_of_the_benchmark_are_children_of_one_process(tmp_path: Path) -> None:
    """What vLLM prints is no answer, and what one run changes the next does not see."""
    says = (
        "if '--help' in sys.argv: raise SystemExit(0)\n"
        "print(sys.argv[1:3], os.getppid(), len(os.environ.get('SEEN', '')))\n"
        "os.environ['SEEN'] = 'yes'\n"
        "folder = sys.argv[sys.argv.index('--result-dir') + 1]\n"
        "count = int(sys.argv[sys.argv.index('--num-prompts') + 1])\n"
        "json.dump({'completed': count, 'request_throughput': 2.5}, open(folder + '/result.json', 'w'))\n"
    )
    with client_of(tmp_path, says) as client:
        assert client.capacity("http://x", users=4, folder=tmp_path / "a", seed=1) == 2.5
        assert client.run(POISSON, "http://x", folder=tmp_path / "b", seconds=10.0, seed=1)["completed"] == 20
    said = [(tmp_path / name / "client.log").read_text() for name in ("a", "b")]

    assert said[0] == said[1]
    assert said[0].startswith("['bench', 'serve']")
    assert said[0].endswith(" 0\n")


@pytest.mark.parametrize(
    ("vllm", "told"),
    [
        ("raise SystemExit('no such model')", "vllm bench serve ended with 1"),
        ("raise ValueError('that went wrong')", "that went wrong"),
        ("os._exit(7)", "vllm bench serve ended with 7"),
        ("os.kill(os.getpid(), 9)", "vllm bench serve ended with -9"),
        ("os.kill(os.getppid(), 9)", "the process that runs vllm bench serve ended with -9"),
    ],
)
def test_a_run_that_fails_is_told_in_its_own_words_and_ends_nothing_else(tmp_path: Path, vllm: str, told: str) -> None:
    with client_of(tmp_path, f"if '--help' not in sys.argv: {vllm}\n") as client:
        for folder in ("a", "b"):
            with pytest.raises(DemoFailed, match=told):
                client.run(POISSON, "http://x", folder=tmp_path / folder, seconds=1.0, seed=1)


def test_a_vllm_without_a_command_line_is_told_of_at_once(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match=r"ended with 1:\n(.|\n)*no such thing"):
        client_of(tmp_path, "raise ImportError('no such thing')\n")


@pytest.mark.parametrize(("text", "minutes"), [("3", (3.0,)), ("4,0.5,4,1", (0.5, 1.0, 4.0))])
def test_lengths_of_plans_are_read_shortest_first(text: str, minutes: tuple[float, ...]) -> None:
    assert read_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "1,-2", "inf", "nan", "one", "1,,2"])
def test_what_is_no_list_of_minutes_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 1,2,4"):
        read_minutes(text)


def test_every_run_is_in_the_json() -> None:
    document = json.loads(json.dumps(as_json([compare(POISSON, [result()] * 3, [result()] * 2, 3.0)])))

    assert len(document[0]["figures"]) == 17
    assert {len(figure["real"]) for figure in document[0]["figures"]} == {3}
    assert {len(figure["emulated"]) for figure in document[0]["figures"]} == {2}


def test_two_rates_a_bursty_one_and_a_closed_loop_are_run() -> None:
    assert [workload.on(8.0).flags() for workload in WORKLOADS] == [
        ("--request-rate", "2", "--burstiness", "1"),
        ("--request-rate", "4", "--burstiness", "1"),
        ("--request-rate", "3.2", "--burstiness", "0.25"),
        ("--request-rate", "inf", "--max-concurrency", "8"),
    ]
    assert set(QUICK_WORKLOADS) < set(WORKLOADS)
    assert all(workload.on(8.0).requests(0.1) >= 4 for workload in WORKLOADS)
    assert [workload.on(8.0).requests(10.0) for workload in WORKLOADS] == [20, 40, 32, 80]


def test_all_but_what_is_bound_to_it_leave_the_models_core() -> None:
    """A process with a child: one thread of the child is bound to the core, as vLLM binds its worker."""
    child = (
        "import os, sys, threading; ready = threading.Barrier(2)\n"
        f"def bound(): os.sched_setaffinity(0, {{{cores.MODEL_CORE}}}); ready.wait(); threading.Event().wait()\n"
        "thread = threading.Thread(target=bound, daemon=True); thread.start(); ready.wait()\n"
        "print(os.getpid(), thread.native_id, flush=True); sys.stdin.read()\n"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid, thread = map(int, process.stdout.readline().split())
        cores.leave_core_to_the_model(process.pid)
        affinities = [os.sched_getaffinity(each) for each in (process.pid, pid, thread)]
        process.communicate("", timeout=60)

    assert affinities == [cores.OTHERS, cores.OTHERS, {cores.MODEL_CORE}]


def test_what_is_started_beside_the_model_keeps_off_its_core_and_this_process_gets_it_back() -> None:
    with cores.on_other_cores():
        assert os.sched_getaffinity(0) == cores.OTHERS
    assert os.sched_getaffinity(0) == cores.ALL


def test_a_steady_device_is_as_fast_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = []
    for arguments in ([], ["--steady"], ["--steady", "8"], ["--steady", "--explain"]):
        monkeypatch.setattr(sys, "argv", ["closed_loop", *arguments])
        steady.append(read_options().steady)

    assert steady == [0.0, 24.0, 8.0, 24.0]
    assert steady_variables(8.0) == {"STEADY_DEVICE_WEIGHTS_MS": "8"}


@pytest.mark.parametrize(
    ("stolen", "kept", "repeated", "disturbed"),
    [((0.0, 0.01), 1, 0, 0), ((0.0, 3.0, 3.0, 3.01), 2, 1, 0), ((0, 3, 3, 6, 6, 9), 3, 2, 1)],
)
def test_a_run_whose_cores_others_had_is_made_again(
    monkeypatch: pytest.MonkeyPatch, stolen: tuple[float, ...], kept: int, repeated: int, disturbed: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    said: list[str] = []
    readings, times = iter(stolen), iter(range(0, 100, 10))
    runs = Undisturbed(said.append, lambda: next(readings), lambda: float(next(times)))
    assert runs.run("bursty", lambda number: number) == kept
    assert (runs.runs, runs.repeated, runs.disturbed, len(said)) == (1, repeated, disturbed, repeated + disturbed)
    assert runs.told().startswith(f"{repeated} runs beside the 1 that count were made again")
    assert ("in each of 3 tries" in runs.told()) is bool(disturbed)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("cpu  1 2 3 4 5 6 7 250 0 0\ncpu0 1 2 3\n", 2.5), ("cpu  1 2 3 4\n", 0.0), ("", 0.0), (None, 0.0)],
)
def test_what_was_stolen_is_read_where_the_kernel_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, seconds: float
) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert stolen_seconds(tmp_path / "stat") == seconds


def test_a_lighter_load_runs_longer() -> None:
    seconds = seconds_of(WORKLOADS, 12.0)

    assert sum(seconds) == pytest.approx(4 * 12.0)
    # 25, 50 and 40 percent, and one that is full: a quarter of the load, twice the time.
    assert seconds[0] == pytest.approx(2 * seconds[3])
    assert seconds[0] > seconds[2] > seconds[1] > seconds[3]


def test_the_steady_device_takes_weights_or_computing_and_then_its_requests() -> None:
    # 24 of the weights; 8 + 512 x 0.11 of computing; a quarter per request; contexts; attention of prompts alone.
    assert step_ms([(1, 100)]) == pytest.approx(24 + 0.25 + 0.15)
    assert step_ms([(1, 100), (1, 300)]) == pytest.approx(24 + 0.5 + 0.6)
    assert step_ms([(512, 512)]) == pytest.approx(8 + 56.32 + 0.25 + 0.768 + 512 * 512 * 0.00004)
    # A device that is three times as fast.
    assert step_ms([(1, 100)], 8.0) == pytest.approx(8 + 0.25 / 3 + 0.05)


def test_the_steady_device_sees_what_the_scheduler_scheduled() -> None:
    """A new request in its first chunk, one further on, one that decodes."""
    output = SimpleNamespace(
        num_scheduled_tokens={"new": 64, "chunk": 32, "old": 1},
        scheduled_new_reqs=[SimpleNamespace(req_id="new", num_computed_tokens=16)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=["old", "chunk"], num_computed_tokens=[40, 128]),
    )
    assert requests_of(output) == [(64, 80), (32, 160), (1, 41)]


def test_what_the_steady_device_says_last_counts(tmp_path: Path) -> None:
    log = tmp_path / "real.log"
    log.write_text("x\n")
    assert overruns(log) == "it did not say how many steps took longer than they should"
    log.write_text("INFO steady device: 1 of 9 steps took longer\nINFO steady device: 2 of 90 steps took longer\n")
    assert overruns(log) == "2 of 90 steps took longer"


def venv_that_says(folder: Path, said: str, status: int) -> Path:
    """A virtual environment whose Python says this, whatever it is asked."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{said}'\necho '{said}' >&2\nexit {status}\n")
    python.chmod(0o755)
    return folder


def test_the_engines_of_a_vllm_with_a_device_are_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "FLASH_ATTN")
    machine = device_machine(venv_that_says(tmp_path, "0.25.1", 0), ["--tensor-parallel-size", "2"])

    assert machine.vllm.version == "0.25.1"
    assert machine.serve[-2:] == ("--tensor-parallel-size", "2")
    # The real engine has the device alone.
    assert "--gpu-memory-utilization" not in machine.serve
    assert machine.emulated_serve == ()
    assert machine.real_variables["VLLM_ATTENTION_BACKEND"] == "FLASH_ATTN"
    with machine.beside_the_model():
        assert os.sched_getaffinity(0) == cores.ALL


def test_an_environment_without_vllm_is_refused_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match="No such file"):
        device_machine(tmp_path / "nowhere", ())
    with pytest.raises(DemoFailed, match="no vLLM that can be imported: No module named vllm"):
        device_machine(venv_that_says(tmp_path, "No module named vllm", 1), ())


def test_a_model_is_a_folder_or_a_published_configuration(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")

    assert model_of(tmp_path / "model", str(own)) == own
    assert (model_of(tmp_path / "model", "qwen3-8b") / "config.json").exists()
    with pytest.raises(DemoFailed, match="neither a folder with a config"):
        model_of(tmp_path / "model", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "qwen3-8b"], "go with --vllm"),
        (["--serve", "--tensor-parallel-size 2"], "go with --vllm"),
        (["--vllm", "venv", "--steady"], "does not go with --vllm"),
        (["--steady", "0"], "'0' is no number of milliseconds above 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["closed_loop", *arguments])
    with pytest.raises(SystemExit) as caught:
        closed_loop.main()

    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_an_error_is_explained_by_pack_host_and_batches() -> None:
    """Every step 2 ms with 0.5 ms between, 2 requests; the pack says 10 % less, the emulated one waits 0.1 ms longer
    and has 4 requests in steps of 3 ms."""
    first, period = captures.steps(1)[0], 2_500_000
    steps = [
        first._replace(
            chunk_tokens=(),
            num_decode_requests=2,
            dispatch_ns=number * period + 300_000,
            device_start_ns=number * period + 500_000,
            device_end_ns=(number + 1) * period,
            # 0.2 ms from the last result, and 0.1 ms of the capture's own, which no other engine has.
            result_ns=(number + 1) * period,
            host_ns=200_000,
        )
        for number in range(20)
    ]
    real, counted = captured_periods(steps)
    traced = [
        TraceStep(
            request=StepRequest(shape=StepShape(num_decode_requests=4)),
            device_start_ns=number * 3_500_000,
            device_finish_ns=number * 3_500_000 + 3_000_000,
        )
        for number in range(10)
    ]
    found = explain(real, np.full(20, 1_800_000.0)[counted], traced_periods(traced))

    # The first step has nothing before it.
    assert counted.sum() == 19
    assert astuple(found) == pytest.approx((2.4, 3.5, 2.0, 4.0, -100 / 12, 100 / 24, 50.0, 1100 / 24))
    assert mean_of([found, replace(found, real_ms=2.6)]) == replace(found, real_ms=2.5)


def test_a_token_of_a_large_batch_counts_as_much_as_one_of_a_small_batch() -> None:
    steps = [
        TraceStep(
            request=StepRequest(shape=StepShape(num_decode_requests=requests)),
            device_start_ns=start * 1_000_000,
            device_finish_ns=end * 1_000_000,
        )
        for requests, start, end in ((1, 0, 1), (0, 2, 9), (3, 10, 12), (1, 12, 18))
    ]
    periods = traced_periods(steps)

    # The prompt's step has no token that somebody waited for; what is before a step is of its own tokens.
    assert periods.decode_requests.tolist() == [3, 1]
    assert periods.per_token_ns(periods.latency_ns) == pytest.approx(3e6)
    assert periods.per_token_ns(periods.between_ns) == pytest.approx(0.75e6)


def test_explanations_are_a_row_per_workload(capsys: pytest.CaptureFixture[str]) -> None:
    one = Explanation(20.0, 19.0, 2.0, 1.9, -3.0, -1.0, -1.0, -5.0)
    print_explanations([("bursty 40 %", [one, replace(one, pack_percent=-5.0)])])
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(" bursty"))

    assert row[3:] == ["20.00", "19.00", "-5.0", "-4.0", "-1.0", "-1.0", "2.00", "1.90", "-3.0", "-5.0"]
