"""What `step-oracle top` makes of two polls."""

from __future__ import annotations

import math

import pytest

from oracle_server.cli.fleet import (
    GONE_SECONDS,
    Counts,
    EnginePoll,
    ExperimentPoll,
    Fleet,
    Poll,
    View,
    quantile,
    sort_lines,
)

NAME = "tenants/default/experiments/default"


def engine(engine_id: str = "e", *, incarnation: int = 1, streaming: bool = True, **counts: object) -> EnginePoll:
    return EnginePoll(NAME, engine_id, incarnation, "h100@4f1c09", 3, streaming, Counts(**counts))  # type: ignore[arg-type]


def poll(at: float, *engines: EnginePoll) -> Poll:
    return Poll(at, "SERVING", (ExperimentPoll(NAME, 3, ("h100@4f1c09",)),), engines)


def views(*polls: Poll) -> list[View]:
    fleet = Fleet()
    return [fleet.advance(each)[0] for each in polls]


def states(view: View) -> dict[str, str]:
    return {line.engine.engine_id: line.state for line in view.engines}


def test_rates_and_shares_are_of_the_interval() -> None:
    buckets = (10, 0, 0)
    first = engine(steps=100, extrapolated_steps=50, leased_steps=20, lateness_buckets=buckets)
    second = engine(steps=300, extrapolated_steps=60, leased_steps=200, lateness_buckets=(10, 200, 0))
    view = views(poll(5.0, first), poll(7.0, second))[-1]
    figures = view.engines[0].figures
    assert view.interval_seconds == 2.0
    assert (figures.steps_per_second, figures.extrapolated_share, figures.lease_share) == (100.0, 0.05, 0.9)
    assert figures.lateness_p50_seconds == pytest.approx(15e-6)
    assert view.total.figures == view.experiments[0].figures == figures


def test_before_there_are_two_polls_shares_are_of_all_steps_and_the_rate_is_unknown() -> None:
    figures = views(poll(0.0, engine(steps=100, extrapolated_steps=25)))[0].engines[0].figures
    assert (figures.steps_per_second, figures.extrapolated_share) == (None, 0.25)
    assert figures.lateness_p50_seconds is None


def test_an_engine_without_a_step_in_the_interval_has_a_rate_of_zero_and_no_share() -> None:
    figures = views(poll(0.0, engine(steps=9)), poll(2.0, engine(steps=9)))[-1].engines[0].figures
    assert (figures.steps_per_second, figures.extrapolated_share, figures.lease_share) == (0.0, None, None)


def test_late_answers_make_an_engine_late_and_then_degraded() -> None:
    seen = views(
        poll(0.0, engine(steps=1)),
        poll(2.0, engine(steps=9, late_answers=2)),
        poll(4.0, engine(steps=20, late_answers=2)),
    )
    assert [states(view)["e"] for view in seen] == ["ok", "late", "degraded"]
    assert [view.total.degraded for view in seen] == [0, 1, 1]
    assert [view.engines[0].figures.new_late_answers for view in seen] == [0, 2, 0]


def test_an_engine_without_a_stream_is_starting_and_one_that_vanishes_stays_in_sight_for_a_while() -> None:
    seen = views(
        poll(0.0, engine("a", steps=1), engine("b", streaming=False)),
        poll(2.0, engine("a", steps=2)),
        poll(2.0 + GONE_SECONDS, engine("a", steps=3)),
    )
    assert [states(view) for view in seen] == [{"a": "ok", "b": "starting"}, {"a": "ok", "b": "gone"}, {"a": "ok"}]
    assert (seen[0].total.engines, seen[0].total.streaming, seen[1].total.engines) == (2, 1, 1)


def test_an_engine_that_comes_back_is_compared_over_the_time_it_was_away() -> None:
    view = views(poll(0.0, engine(steps=100)), poll(2.0), poll(4.0, engine(steps=180)))[-1]
    assert view.engines[0].figures.steps_per_second == 20.0


@pytest.mark.parametrize("after", [{"steps": 5}, {"steps": 100, "lateness_buckets": (3,)}])
def test_counts_that_fall_say_that_the_server_was_restarted(after: dict[str, object]) -> None:
    fleet = Fleet()
    fleet.advance(poll(0.0, engine(steps=100, lateness_buckets=(4,))))
    view, restarted = fleet.advance(poll(2.0, engine(**{"lateness_buckets": (9,), **after})))  # type: ignore[arg-type]
    assert restarted
    assert view.engines[0].figures.steps_per_second is None


def test_a_new_incarnation_counts_anew_without_a_restart_of_the_server() -> None:
    fleet = Fleet()
    fleet.advance(poll(0.0, engine(steps=100)))
    view, restarted = fleet.advance(poll(2.0, engine(steps=5, incarnation=2)))
    assert not restarted
    assert view.engines[0].figures.steps_per_second is None


@pytest.mark.parametrize(
    ("buckets", "q", "seconds"),
    [
        ((4,), 0.5, 5e-6),
        ((0, 100), 0.99, 19.9e-6),
        ((1, 0, 1), 0.5, 10e-6),
        ((1, 0, 1), 0.51, 20.6e-6),
        ((0,) * 11 + (1,), 0.5, math.inf),
    ],
)
def test_a_quantile_is_linear_inside_its_bucket(buckets: tuple[int, ...], q: float, seconds: float) -> None:
    assert quantile(buckets, q) == pytest.approx(seconds)


def test_without_counts_there_is_no_quantile() -> None:
    assert quantile((), 0.5) is quantile((0, 0), 0.5) is None


def test_every_order_has_its_first_line() -> None:
    slow = engine("e10", steps=1000, late_answers=1, lateness_buckets=(0, 0, 9))
    fast = engine("e9", steps=5000, lateness_buckets=(9,))
    idle = engine("a", steps=0)
    zero = engine("e10"), engine("e9"), engine("a")
    view = views(poll(0.0, *zero), poll(1.0, slow, fast, idle))[-1]

    def first(order: str) -> str:
        return sort_lines(view.engines, order)[0].engine.engine_id

    assert [first(order) for order in ("trouble", "steps", "lateness", "engine")] == ["e10", "e9", "e10", "a"]
    assert [line.engine.engine_id for line in sort_lines(view.engines, "engine")] == ["a", "e9", "e10"]


def test_an_engine_of_a_tenant_over_its_rate_is_degraded() -> None:
    fine = EnginePoll(NAME, "fine", 1, "h100@4f1c09", 3, True, Counts(steps=5))
    over = EnginePoll(NAME, "over", 1, "h100@4f1c09", 3, True, Counts(steps=5), over_rate=True)
    assert states(views(poll(0.0, fine, over))[0]) == {"fine": "ok", "over": "degraded"}
