"""The last table of the benchmark says of every promise whether it holds, and never of one that was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from performance import cpu_per_step
from performance.bench import SECTIONS
from performance.promises import HELD, MISSED, NOT_MEASURED, promises


def verdicts(section: str, figures: dict[str, Any]) -> list[str]:
    """Of the promises of one section."""
    rows = promises({section: figures})
    return [row["verdict"] for row in rows if row["command"].endswith(f'--only {section}"')]


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 1, "high": median + 1}


def cpu(leased: float, unleased: float, ratio: float) -> dict[str, Any]:
    costs = {cpu_per_step.LEASES: spread(leased), cpu_per_step.STREAMS: spread(unleased)}
    costs |= {cpu_per_step.PACED_LEASES: spread(2 * leased), cpu_per_step.PACED: spread(2 * unleased)}
    return {"batch": {"us_per_step": costs, "straightforward_over": {cpu_per_step.LEASES: spread(ratio)}}}


def paced(engines: int, **other: Any) -> dict[str, Any]:
    row = {"engines": engines, "core": 0.5, "p99_ms": 2.0, "p99_ms_of_runs": [2.0], "p50_ms": 0.1, "broken": False}
    return row | other


def held(concurrency: int, period_ms: float, late_us: float, bare_us: float) -> dict[str, Any]:
    return {
        "concurrency": concurrency,
        "step_period_p50_ms": period_ms,
        "lateness_p50_us": late_us,
        "bare_sleep_lateness_p50_us": bare_us,
    }


def test_every_promise_is_of_a_section_and_none_holds_unmeasured() -> None:
    rows = promises({})
    assert {row["verdict"] for row in rows} == {NOT_MEASURED}
    assert {row["command"] for row in rows} <= {f'make bench ARGS="--only {name}"' for name in SECTIONS}


def test_what_cannot_be_measured_here_says_why() -> None:
    (row,) = (row for row in promises({"lease_share": {"not_measured": "no traces"}}) if row["figure"])
    assert (row["figure"], row["verdict"]) == ("no traces", NOT_MEASURED)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (cpu(9.0, 70.0, 50.0), [HELD, HELD, HELD]),
        (cpu(9.1, 70.1, 49.9), [MISSED, MISSED, MISSED]),
    ],
)
def test_costs_are_held_against_their_bounds(figures: dict[str, Any], expected: list[str]) -> None:
    assert verdicts("cpu_per_step", figures) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (paced(1500), HELD),
        (paced(1500, core=0.71), MISSED),
        (paced(1500, p99_ms=5.1), MISSED),
        (paced(1500, broken=True), MISSED),
        (paced(1000, broken=True), MISSED),
    ],
)
def test_engines_of_one_core_need_core_and_answer_time(row: dict[str, Any], expected: str) -> None:
    broken = paced(6000, broken=True)
    figures = {"without_leases": [paced(100), broken], "with_leases": [row, broken]}
    assert verdicts("paced_engines", figures) == [HELD, expected, HELD]


def test_a_table_that_does_not_break_says_so() -> None:
    figures = {"without_leases": [paced(100)], "with_leases": [paced(1500)]}
    assert verdicts("paced_engines", figures)[2] == MISSED


def test_a_held_step_is_held_against_the_bare_sleep_beside_it() -> None:
    fine = [held(1, 10.0, 2, 50), held(32, 10.02, 60, 50), held(128, 10.029, 400, 50)]
    two = [held(8, 10.0, 2, 50), held(8, 10.01, 2, 50)]
    assert verdicts("held_step", {"one_engine": fine, "two_engines": two}) == [HELD, HELD, HELD]
    late = [held(32, 10.031, 81, 50)]
    slow = [held(8, 9.9, 2, 50)]
    assert verdicts("held_step", {"one_engine": late, "two_engines": slow}) == [MISSED, MISSED, MISSED]


def test_the_worst_workload_and_the_longest_batch_count() -> None:
    shares = [{"workload": "a", "steps": 200, "leasable": 100, "leased": 99}]
    assert verdicts("lease_share", {"rows": shares}) == [HELD]
    shares.append({"workload": "b", "steps": 200, "leasable": 100, "leased": 96})
    assert verdicts("lease_share", {"rows": shares}) == [MISSED]
    rows = [
        {"requests": n, "leases": leases, "p50": p50}
        for n, leases, p50 in ((1, "on", 9.0), (128, "on", 10.5), (1, "off", 90.0), (128, "off", 110.0))
    ]
    assert verdicts("engine_thread", {"rows": rows}) == [MISSED, HELD]


@pytest.mark.parametrize(("ratio", "pairs", "expected"), [(1.5, 10, HELD), (1.51, 10, MISSED), (1.0, 3, MISSED)])
def test_a_hot_swap_needs_ten_pairs(ratio: float, pairs: int, expected: str) -> None:
    figures = {"ratio": ratio, "ratio_interval": [0.9, 1.6], "pairs": pairs}
    assert verdicts("hot_swap", figures) == [expected]
