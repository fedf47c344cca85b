"""Overlays are pure functions of step index and device time, and touch whom they name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import naive
from oracle_server.errors import InvalidArgument
from oracle_server.sampling import draws
from oracle_server.state.binding import Binding, Overlay, check, decode, encode
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.overlays import Effect, Schedule, effects_of, touches

ENGINE = EngineIdentity("tenants/default/experiments/e", "server-1/dp3", {"gpu": "l40s"}, "m", 1)
KEY = draws.engine_key(7, ENGINE.engine_id)
DIGEST = "sha256:" + "0" * 64
HOUR_NS = 3_600_000_000_000
STEPS = st.integers(0, 2**63 - 1)

overlays = st.builds(
    Overlay,
    slow_down_factor=st.floats(0.1, 10),
    stall_every_steps=st.sampled_from((0, 1, 2, 3, 1000)),
    stall_ns=st.integers(1, 10**9),
    error_every_steps=st.sampled_from((0, 2, 5)),
    degradation_per_hour=st.sampled_from((0.0, 0.1, 3.0)),
    begin_step_index=st.integers(0, 50),
    end_step_index=st.sampled_from((0, 60, 100)),
    begin_device_time_ns=st.sampled_from((0, HOUR_NS)),
    end_device_time_ns=st.sampled_from((0, 2 * HOUR_NS)),
    labels=st.sampled_from(({}, {"gpu": "l40s"}, {"gpu": "h100"})),
)


def schedule_of(*given: Overlay, time_scale: float = 1.0) -> Schedule:
    constant, schedule = effects_of(given, ENGINE, KEY, time_scale)
    assert constant == 1.0
    assert schedule is not None
    return schedule


def test_slow_downs_that_touch_an_engine_multiply() -> None:
    given = (Overlay(1.5), Overlay(2.0, labels={"gpu": "l40s"}), Overlay(9.0, labels={"gpu": "h100"}))
    assert effects_of(given, ENGINE, KEY, 1.0) == (3.0, None)


def test_an_overlay_names_engines_servers_labels_and_shares() -> None:
    for ids, expected in (((), True), (("server-1/dp3",), True), (("server-1",), True), (("server-1/dp2",), False)):
        assert touches(Overlay(2.0, engine_ids=ids), ENGINE) is expected
    assert touches(Overlay(2.0, engine_ids=("server-1",), labels={"gpu": "h100"}), ENGINE) is False
    stands_at = draws.fraction_draw("s", "server-1")
    assert touches(Overlay(2.0, fraction=math.nextafter(stands_at, 1), fraction_salt="s"), ENGINE)
    assert not touches(Overlay(2.0, fraction=stands_at, fraction_salt="s"), ENGINE)


@given(st.lists(overlays, max_size=4), st.integers(0, 120), st.integers(0, 3 * HOUR_NS), st.floats(0.1, 3))
def test_effects_equal_the_formulas_of_the_contract(
    given: list[Overlay], step_index: int, device_time_ns: int, time_scale: float
) -> None:
    constant, schedule = effects_of(given, ENGINE, KEY, time_scale)
    effect = Effect(1.0, 0, False) if schedule is None else schedule.at(step_index, device_time_ns)
    expected = naive.overlay_effects(given, ENGINE, KEY, time_scale, step_index, device_time_ns)
    assert (constant, *effect) == expected


@given(st.lists(overlays, max_size=4), st.lists(st.tuples(STEPS, st.integers(0, 2**60)), min_size=1, max_size=20))
def test_an_effect_does_not_depend_on_what_was_asked_before(given: list[Overlay], asked: list[tuple[int, int]]) -> None:
    _, first = effects_of(given, ENGINE, KEY, 1.0)
    _, second = effects_of(decode(encode(Binding(overlays=tuple(given)))).overlays, ENGINE, KEY, 1.0)
    if first is None or second is None:
        assert first is second
        return
    forwards = [first.at(*place) for place in asked]
    assert [second.at(*place) for place in reversed(asked)] == forwards[::-1]


def test_one_step_in_so_many_stalls_and_another_one_in_so_many_fails() -> None:
    """100,000 steps at 1 in 50 and 1 in 200: five standard deviations of the binomial, false alarm below 1e-6."""
    schedule = schedule_of(Overlay(stall_every_steps=50, stall_ns=9, error_every_steps=200))
    effects = [schedule.at(step, 0) for step in range(100_000)]
    stalls = {step for step, effect in enumerate(effects) if effect.stall_ns}
    errors = {step for step, effect in enumerate(effects) if effect.is_error}
    for found, share in ((stalls, 0.02), (errors, 0.005), (stalls & errors, 0.0001)):
        assert abs(len(found) - 1e5 * share) <= 5 * math.sqrt(1e5 * share)
    assert {effect.stall_ns for effect in effects} == {0, 9}


def test_schedules_of_two_engines_and_of_two_places_are_not_the_same() -> None:
    stall = Overlay(stall_every_steps=10, stall_ns=1)
    first, second = (schedule_of(*before, stall) for before in ((), (Overlay(9.0, labels={"no": "one"}),)))
    other = Schedule([(0, stall)], draws.engine_key(7, "server-2"), 1.0)
    found = [{step for step in range(2000) if s.at(step, 0).stall_ns} for s in (first, second, other)]
    assert len(found[0] & found[1]) < 60
    assert len(found[0] & found[2]) < 60


def test_a_stall_is_a_time_so_time_scale_multiplies_it() -> None:
    assert schedule_of(Overlay(stall_every_steps=1, stall_ns=1001), time_scale=0.5).at(3, 0).stall_ns == 501


def test_intervals_are_half_open_and_both_must_hold() -> None:
    schedule = schedule_of(
        Overlay(2.0, begin_step_index=10, end_step_index=20, begin_device_time_ns=100, end_device_time_ns=200)
    )
    factors = {
        place: schedule.at(*place).factor
        for place in ((9, 150), (10, 150), (19, 199), (20, 150), (15, 99), (15, 100), (15, 200))
    }
    assert factors == {
        (9, 150): 1.0,
        (10, 150): 2.0,
        (19, 199): 2.0,
        (20, 150): 1.0,
        (15, 99): 1.0,
        (15, 100): 2.0,
        (15, 200): 1.0,
    }


def test_a_device_degrades_from_the_begin_of_the_interval_on() -> None:
    schedule = schedule_of(Overlay(degradation_per_hour=0.5, begin_device_time_ns=HOUR_NS))
    assert [schedule.at(0, hours * HOUR_NS).factor for hours in (0, 1, 2, 5)] == [1.0, 1.0, 1.5, 3.0]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a stall without a length": ({"stall_every_steps": 5}, "stall_ns"),
    "a length without a stall": ({"slow_down_factor": 2.0, "stall_ns": 5}, "stall_ns"),
    "a stall of two hours": ({"stall_every_steps": 5, "stall_ns": 2 * HOUR_NS}, "stall_ns"),
    "a share no draw can have": ({"error_every_steps": 2**32 + 1}, "error_every_steps"),
    "recovery": ({"degradation_per_hour": -0.1}, "degradation_per_hour"),
    "a degradation that is no number": ({"degradation_per_hour": math.nan}, "degradation_per_hour"),
    "an end before the begin": ({"slow_down_factor": 2.0, "begin_step_index": 5, "end_step_index": 5}, "end_step"),
    "an end in time before the begin": (
        {"slow_down_factor": 2.0, "begin_device_time_ns": 5, "end_device_time_ns": 4},
        "end_device_time_ns",
    ),
    "nothing": ({"labels": {"a": "b"}}, "no effect"),
    "an engine without a name": ({"slow_down_factor": 2.0, "engine_ids": ("",)}, "engine_ids"),
    "a factor of infinity": ({"slow_down_factor": math.inf}, "slow_down_factor"),
}


@pytest.mark.parametrize("fault", BAD)
def test_an_overlay_that_cannot_be_is_refused(fault: str) -> None:
    fields, says = BAD[fault]
    good = Binding(default_pack_digest=DIGEST, overlays=(Overlay(2.0),))
    check(good)
    with pytest.raises(InvalidArgument, match=says) as caught:
        check(Binding(default_pack_digest=DIGEST, overlays=(Overlay(2.0), Overlay(**fields))))
    assert caught.value.field.startswith("binding.overlays[1]")


def test_factors_that_leave_every_range_together_are_refused() -> None:
    check(Binding(default_pack_digest=DIGEST, overlays=(Overlay(1e6),) * 2))
    with pytest.raises(InvalidArgument, match="together"):
        check(Binding(default_pack_digest=DIGEST, overlays=(Overlay(1e6),) * 3))


def test_an_overlay_moves_nobody_else() -> None:
    """A factor on three of ten engines: exactly those."""
    named = Overlay(1.25, engine_ids=("e2", "e5", "e7"))
    factors = [effects_of((named,), replace(ENGINE, engine_id=f"e{i}"), KEY, 1.0)[0] for i in range(10)]
    assert [i for i, factor in enumerate(factors) if factor != 1.0] == [2, 5, 7]
