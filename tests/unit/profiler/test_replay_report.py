"""What a replay prints: how much of it is known, and how."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from profiler.replay.metrics import METRICS, error_percent, known, latencies, per_request_mape, summary
from profiler.replay.real_run import RealRun
from profiler.replay.replay import Replay, Speed
from profiler.replay.report import ProgressBar, print_replay

MS = 1_000_000
ENGINE = {
    "num_kv_blocks": 100,
    "block_size": 16,
    "kv_blocks_basis": "assumed",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "max_model_len": 1024,
    "async_scheduling": True,
    "prefix_caching": True,
}


def run_of(output_tokens: list[int], file: str = "a.jsonl", rejected: tuple[str, ...] = ()) -> dict[str, Any]:
    """A run whose requests arrive at 0, have their first token at 10 ms and another one every 10 ms."""
    count = len(output_tokens)
    found = latencies([0] * count, [10 * MS] * count, [10 * n * MS for n in output_tokens], output_tokens)
    return {
        "requests_file": file,
        "seed": 0,
        "rejected_requests": list(rejected),
        "metrics_ms": {name: summary(getattr(found, name)) for name in METRICS},
        "metrics_requests": {name: len(known(getattr(found, name))) for name in METRICS},
        "error_percent": error_percent(found, found),
        "per_request_mape": per_request_mape(found, found),
        "virtual_seconds": 1.0,
        "output_tokens_per_second": 1.0,
        "steps": 10,
        "dummy_steps": 0,
        "output_tokens": sum(output_tokens),
        "prefix_hit_tokens": 0,
        "preemptions": 0,
        "extrapolated": {"steps_percent": 0.0, "device_time_percent": 0.0},
        "requests": [{}] * count,
    }


def printed(*runs: dict[str, Any], real: RealRun | None = None) -> list[str]:
    unmeasured = None if real is None else real.unmeasured
    document: dict[str, Any] = {
        "vllm_version": "0.33.0",
        "engine": ENGINE,
        "warnings": [],
        "unmeasured_requests": unmeasured,
    }
    replay = Replay({**document, "runs": list(runs)}, 1.0, speeds=[Speed(1.0, 1.0, 1.0, 10)] * len(runs), real=real)
    text = io.StringIO()
    print_replay(Console(file=text, width=170), replay)
    return text.getvalue().splitlines()


def test_the_first_line_says_how_the_kv_blocks_are_known() -> None:
    assert printed(run_of([4]))[0].startswith("vLLM 0.33.0, 100 KV blocks of 16 (assumed), max_num_seqs 8,")


def test_a_tpot_of_some_requests_says_of_how_many_and_one_of_none_has_no_figure() -> None:
    (some,) = [line for line in printed(run_of([4, 1])) if "TPOT" in line]
    (none,) = [line for line in printed(run_of([1, 1])) if "TPOT" in line]
    (every,) = [line for line in printed(run_of([4, 2])) if "TPOT" in line]

    assert "TPOT (1 of 2 requests)" in some
    assert "10.00" in some
    assert "TPOT (0 of 2 requests)" in none
    assert none.count("none") == 4
    assert "requests" not in every


def test_beside_a_measured_run_a_figure_nobody_has_is_none_and_what_it_lacks_is_noted() -> None:
    measured = latencies([0, 0], [10 * MS] * 2, [10 * MS] * 2, [1, 1])
    real = RealRun((), measured, {}, "0.19.0", "a GPU", 100, unmeasured=3)

    lines = printed(run_of([1, 1]), real=real)

    (tpot,) = [line for line in lines if "TPOT" in line]
    assert tpot.count("none") == 13
    assert "note: the measured run lacks 3 requests of --requests: left out here too" in lines


def test_runs_of_several_files_are_told_apart() -> None:
    lines = printed(run_of([4]), run_of([4], "b.jsonl", rejected=("bench-3",)))

    assert [line.strip() for line in lines if "Run " in line] == ["Run 0, seed 0, a.jsonl", "Run 1, seed 0, b.jsonl"]
    assert "warning: run 1: 1 requests are longer than max_model_len 1024: left out" in lines


def test_the_progress_bar_of_a_terminal_says_what_is_going_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    events: list[dict[str, Any]] = [
        {"event": "started", "requests": 5},
        {"event": "progress", "run": 0, "ended": 2, "requests": 5, "virtual_seconds": 3.0},
    ]

    with ProgressBar(1):
        pass
    begun = capsys.readouterr().err
    said = []
    for count in range(1, len(events) + 1):
        with ProgressBar(1) as bar:
            for event in events[:count]:
                bar(event)
        said.append(capsys.readouterr().err)

    assert "starting vLLM" in begun
    for text, (what, counted) in zip(
        said, [("replaying", "0/5 requests"), ("run 1 of 1", "2/5 requests  3.0 s virtual")], strict=True
    ):
        assert what in text
        assert counted in text
