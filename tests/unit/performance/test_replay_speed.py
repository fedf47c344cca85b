"""When `make bench-replay` fails: figures of made-up rows, by wall time and by CPU time."""

from __future__ import annotations

from typing import Any

import pytest

from performance.replay_speed import missed


def row(**changes: Any) -> dict[str, Any]:
    """Two processes of a run, twice as fast as promised and 1.9 times one."""
    figures = {"times_real_time": 100.0, "times_real_time_by_cpu": 110.0, "least": 50.0, "identical": True}
    scaling = {"scaling": 1.9, "scaling_by_cpu": 1.95} | changes.pop("scaling", {})
    return {"gpu": "RTX 4090", **figures, "at_once": {"2": scaling}, **changes}


@pytest.mark.parametrize("by_cpu", [False, True])
def test_promises_that_are_kept_miss_nothing(by_cpu: bool) -> None:
    assert missed([row(), row(times_real_time=50.0, scaling={"scaling": 1.6})], by_cpu=by_cpu, cores=2) == []


@pytest.mark.parametrize(
    ("changes", "by_cpu", "sentence"),
    [
        (
            {"times_real_time": 49.9},
            False,
            "RTX 4090: 49.9 times real time by wall time, at least 50 promised with --compile",
        ),
        (
            {"times_real_time_by_cpu": 49.9},
            True,
            "RTX 4090: 49.9 times real time by CPU time, at least 50 promised with --compile",
        ),
        (
            {"times_real_time": float("nan")},
            False,
            "RTX 4090: nan times real time by wall time, at least 50 promised with --compile",
        ),
        (
            {"scaling": {"scaling": 1.59}},
            False,
            "RTX 4090: 2 processes are 1.59 times one by wall time, at least 1.6 promised",
        ),
        (
            {"scaling": {"scaling_by_cpu": 1.2}},
            True,
            "RTX 4090: 2 processes are 1.20 times one by CPU time, at least 1.6 promised",
        ),
        ({"identical": False}, False, "RTX 4090: processes wrote different bytes"),
    ],
)
def test_a_missed_promise_is_named(changes: dict[str, Any], by_cpu: bool, sentence: str) -> None:
    assert missed([row(), row(**changes)], by_cpu=by_cpu, cores=2) == [sentence]
    # What is not judged misses nothing.
    other_clock = [] if "identical" not in changes else [sentence]
    assert missed([row(**changes)], by_cpu=not by_cpu, cores=2) == other_clock


def test_more_processes_than_cores_promise_nothing() -> None:
    assert missed([row(scaling={"scaling": 1.0})], by_cpu=False, cores=1) == []
