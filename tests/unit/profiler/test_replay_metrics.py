"""Latencies from stamps, errors of statistics, and the alignment of a measured run's clocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracle_server.errors import InvalidArgument
from profiler.replay.job import Request
from profiler.replay.metrics import error_percent, known, latencies, per_request_mape, summary
from profiler.replay.real_run import read_real_run

MS = 1_000_000


def test_latencies_count_from_the_arrival_and_tpot_leaves_the_first_token_out() -> None:
    got = latencies([0, 5 * MS], [10 * MS, 25 * MS], [40 * MS, 25 * MS], [4, 1])

    assert got.ttft.tolist() == [10.0, 20.0]
    assert known(got.tpot).tolist() == [10.0]
    assert got.e2e.tolist() == [40.0, 20.0]


def test_a_request_of_one_token_is_in_no_statistic_of_tpot() -> None:
    """As in vLLM's own benchmark, whose rule stands here in plain Python (calculate_metrics, 0.33.0)."""
    first, last, tokens = [10, 25, 30], [40, 25, 130], [4, 1, 11]
    bench = [(b - a) / (n - 1) for a, b, n in zip(first, last, tokens, strict=True) if n > 1]

    got = latencies([0] * 3, [time * MS for time in first], [time * MS for time in last], tokens)

    assert known(got.tpot).tolist() == bench == [10.0, 10.0]
    assert summary(got.tpot) == {"mean": 10.0, "p50": 10.0, "p90": 10.0, "p99": 10.0}
    assert per_request_mape(got, got)["tpot"] == 0.0


def test_where_no_request_has_two_tokens_there_is_no_tpot_and_no_error_of_it() -> None:
    real, ours = (latencies([0, 0], [time, time], [time, time], [1, 1]) for time in (10 * MS, 11 * MS))

    assert summary(ours.tpot) == error_percent(ours, real)["tpot"] == dict.fromkeys(("mean", "p50", "p90", "p99"))
    assert per_request_mape(ours, real)["tpot"] is None
    assert error_percent(ours, real)["ttft"]["mean"] == pytest.approx(10.0)


def test_errors_are_signed_and_compare_statistics_while_mape_compares_requests() -> None:
    real = latencies([0, 0], [100 * MS, 200 * MS], [300 * MS, 400 * MS], [2, 2])
    ours = latencies([0, 0], [200 * MS, 100 * MS], [300 * MS, 360 * MS], [2, 2])

    error = error_percent(ours, real)
    assert error["ttft"]["mean"] == pytest.approx(0.0)
    assert error["e2e"]["mean"] == pytest.approx(100 * (660 / 700 - 1))
    assert error["e2e"]["p99"] == pytest.approx(100 * (359.4 / 399.0 - 1))
    assert per_request_mape(ours, real)["ttft"] == pytest.approx(75.0)


def test_percentiles_are_linear_between_ranks() -> None:
    assert summary(np.arange(101.0)) == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert summary(np.array([0.0, 1.0]))["p90"] == pytest.approx(0.9)


def write_run(folder: Path, **changes: Any) -> Path:
    """Two requests; wall time is 1000 s, the monotonic clock at 50 s, and request 1 is looked at 0.2 s late."""
    rows = [
        {"request_id": "bench-0", "input_toks": 3, "output_toks": 5, "arrival_time": 1000.0, "queued_ts": 50.01},
        {"request_id": "bench-1", "input_toks": 1, "output_toks": 2, "arrival_time": 1001.0, "queued_ts": 51.21},
    ]
    for row, first in zip(rows, (50.5, 52.0), strict=True):
        row |= {"scheduled_ts": first - 0.1, "first_token_ts": first, "last_token_ts": first + 1}
    rows[1] |= changes
    meta = {"engine_kwargs": {"model": "x", "max_num_seqs": 8, "max_model_len": None}, "vllm_version": "0.19.0"}
    folder.mkdir()
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


WORKLOAD = [Request("bench-0", 3, 9, 0, (1, 2, 3)), Request("bench-1", 1, 9, 5, (4,))]


def test_a_measured_run_brings_arrivals_outputs_and_engine_arguments_and_ttft_counts_from_the_arrival(
    tmp_path: Path,
) -> None:
    run = read_real_run(write_run(tmp_path / "run"), WORKLOAD)

    assert [(r.request_id, r.arrival_ns, r.output_tokens, r.prompt_token_ids) for r in run.requests] == [
        ("bench-0", 0, 5, (1, 2, 3)),
        ("bench-1", 1_000_000_000, 2, (4,)),
    ]
    # Offset 50.01 - 1000: request 1 arrived at 51.01, 0.2 s before the engine looked.
    assert run.latencies.ttft == pytest.approx([490.0, 990.0], abs=1e-3)
    assert run.engine_defaults == {"max_num_seqs": 8}
    assert (run.vllm_version, run.kv_blocks, run.unmeasured) == ("0.19.0", None, 0)


def test_requests_the_measured_run_lacks_are_counted(tmp_path: Path) -> None:
    run = read_real_run(write_run(tmp_path / "run"), [*WORKLOAD, Request("bench-2", 1, 9, 6, (5,))])

    assert ([request.request_id for request in run.requests], run.unmeasured) == (["bench-0", "bench-1"], 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_toks": 2}, "it is another workload"),
        ({"request_id": "bench-9"}, "it is another workload"),
        ({"request_id": "bench"}, "does not end in a number"),
        ({"request_id": "bench-0"}, "request 0 stands there twice"),
        ({"queued_ts": "late"}, "line 2"),
    ],
)
def test_a_measured_run_of_other_requests_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        read_real_run(write_run(tmp_path / "run", **changes), WORKLOAD)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"meta\.json: No such file"):
        read_real_run(tmp_path, WORKLOAD)
