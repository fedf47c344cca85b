"""A snapshot answers as a pure function."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from builders import decode_query
from oracle_server.errors import AcceptanceUnknown, BadStep, NoRuleMatches, StaleGeneration, SupportRefused
from oracle_server.pack import HostTime, Latency, WakePoint
from oracle_server.sampling import draws
from oracle_server.sampling.answer import Answer
from oracle_server.sampling.shape import StepQuery
from oracle_server.state.binding import Binding, LengthClass, LengthTable, Overlay, Rule
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.overlays import scaled
from oracle_server.state.snapshot import (
    LENGTH_HINT,
    LENGTH_IGNORE_EOS,
    LENGTH_NONE,
    LENGTH_TABLE,
    EnginePlan,
    LoadedPack,
    NewRequest,
    Snapshot,
)

ENGINE = EngineIdentity("tenants/default/experiments/e", "server-1/dp0", {}, "m", 1)
QUERY = decode_query(4, 400)


class Fixed:
    """An oracle of one latency that records what it was asked."""

    kind = "fixed"
    residual_pool: tuple[float, ...] = ()
    prep_ns = 101
    copy_ns = 7

    def __init__(self, latency_ns: int = 1000, support: int = 1) -> None:
        self.latency_ns = latency_ns
        self.support = support
        self.asked: list[tuple[StepQuery, int, int, float]] = []

    def answer(self, query: StepQuery, key: int, step_index: int, factor: float = 1.0) -> Answer:
        self.asked.append((query, key, step_index, factor))
        return Answer(max(1, math.floor(self.latency_ns * factor + 0.5)), self.support, 0.5, 2)

    def decode_record(self, *arguments: object, **options: object) -> None:
        return None

    def warm(self) -> None:
        pass


def snapshot(oracle: Fixed | None = None, **binding: Any) -> Snapshot:
    latency = Latency(
        wake=(WakePoint(idle_ns=100, extra_ns=40), WakePoint(idle_ns=300, extra_ns=60)),
        host=HostTime(step_ns=1_000, request_ns=20),
    )
    manifest = cast(Any, SimpleNamespace(coverage={"max_tokens": 99}, latency=latency))
    packs = {digest: LoadedPack(digest, manifest, oracle or Fixed()) for digest in ("a", "b")}
    return Snapshot("tenants/default/experiments/e", 3, Binding(**{"default_pack_digest": "a", **binding}), packs)


def test_the_overlays_of_a_step_act_together() -> None:
    overlays = (
        Overlay(3.0),
        Overlay(2.0, begin_step_index=10, end_step_index=20),
        Overlay(stall_every_steps=1, stall_ns=700, error_every_steps=1, begin_device_time_ns=5000),
        Overlay(7.0, labels={"x": "y"}),
    )
    plan = snapshot(time_scale=0.5, overlays=overlays).plan(ENGINE)
    found = {
        (step, time_ns): (answer.latency_ns, answer.stall_ns, answer.is_error)
        for step, time_ns in ((9, 0), (10, 0), (19, 4999), (20, 5000), (10, 5000))
        for answer in (plan.answer(step, QUERY, (), (), time_ns),)
    }
    assert found == {
        (9, 0): (1500, 0, False),
        (10, 0): (3000, 0, False),
        (19, 4999): (3000, 0, False),
        (20, 5000): (1850, 350, True),
        (10, 5000): (3350, 350, True),
    }


def test_a_step_after_a_pause_is_prepared_for_longer() -> None:
    for time_scale, expected in ((1.0, [0, 20, 50, 60, 60]), (0.5, [0, 10, 25, 30, 30])):
        plan = snapshot(time_scale=time_scale).plan(ENGINE)
        answers = [plan.answer(3, QUERY, (), (), 0, idle_ns) for idle_ns in (0, 50, 200, 300, 10**9)]

        assert [answer.prep_ns - plan.prep_ns for answer in answers] == expected
        assert len({answer._replace(prep_ns=0) for answer in answers}) == 1


def test_the_host_takes_as_long_as_the_pack_says_for_so_many_requests() -> None:
    chunks = QUERY._replace(chunk_tokens=(5, 6), chunk_context=(0, 0), num_decode_requests=7)
    for time_scale, per_step, per_request in ((1.0, 1_000, 20), (0.5, 500, 10), (1e-9, 1, 0)):
        plan = snapshot(time_scale=time_scale).plan(ENGINE)

        assert plan.answer(3, chunks, (), ()).host_ns == plan.host_ns(9) == per_step + 9 * per_request
    nameless = snapshot()
    manifest = cast(Any, SimpleNamespace(coverage={}, latency=Latency()))
    plan = EnginePlan(nameless, LoadedPack("c", manifest, Fixed()), ENGINE)
    assert plan.answer(3, chunks, (), ()).host_ns == plan.host_ns(9) == 0


def test_only_engines_that_a_varying_overlay_touches_go_without_leases() -> None:
    touched, other = Overlay(stall_every_steps=9, stall_ns=1, engine_ids=("server-1",)), Overlay(2.0)
    assert snapshot(overlays=(other,)).plan(ENGINE).leasable
    assert not snapshot(overlays=(other, touched)).plan(ENGINE).leasable
    assert snapshot(overlays=(other, touched)).plan(replace(ENGINE, engine_id="server-2/dp0")).leasable
    assert not snapshot(overlays=(Overlay(2.0, end_step_index=1),)).plan(ENGINE).leasable
    assert not snapshot(shadow_pack_digest="b").plan(ENGINE).leasable


def test_a_shadow_pack_has_no_say_in_an_answer() -> None:
    plain, shadowed = snapshot().plan(ENGINE), snapshot(shadow_pack_digest="b", support_policy="refuse")
    assert shadowed.plan(ENGINE).answer(3, QUERY, (), ()) == plain.answer(3, QUERY, (), ())
    plan = shadowed.shadow_plan(ENGINE)
    assert plan is not None
    assert plan.pack_digest == "b"
    assert plan.latency(3, QUERY, 0) == (1000, 1)
    assert snapshot().shadow_plan(ENGINE) is None


def test_a_latency_beyond_the_range_is_refused_and_names_the_overlays() -> None:
    long = Fixed(latency_ns=(1 << 62) - 5)
    with pytest.raises(BadStep, match="overlays of generation 3"):
        snapshot(long, overlays=(Overlay(stall_every_steps=1, stall_ns=1000),)).plan(ENGINE).answer(0, QUERY, (), ())


def test_a_step_is_drawn_with_the_key_of_its_engine() -> None:
    oracle = Fixed()
    snapshot(oracle, seed=42).plan(ENGINE).answer(9, QUERY, (), ())
    assert oracle.asked == [(QUERY, draws.engine_key(42, "server-1/dp0"), 9, 1.0)]


def test_time_scale_multiplies_all_times_and_a_slow_down_the_latency_only() -> None:
    plan = snapshot(time_scale=0.5, overlays=(Overlay(3.0), Overlay(9.0, labels={"x": "y"}))).plan(ENGINE)
    answer = plan.answer(0, QUERY, (), ())
    assert (answer.latency_ns, answer.prep_ns, answer.copy_ns) == (1500, 51, 4)


@pytest.mark.parametrize(("value", "scale", "result"), [(101, 0.5, 51), (3, 0.1, 0), (5, 1.0, 5), (10, 2.5, 25)])
def test_a_factor_rounds_half_up(value: int, scale: float, result: int) -> None:
    assert scaled(value, scale) == result


def test_drafts_follow_the_naive_rule() -> None:
    """Every draft token of the message has its own draw, whether or not the tokens before it were accepted."""
    plan = snapshot(seed=5, draft_acceptance_rate=0.6).plan(ENGINE)
    key = draws.engine_key(5, ENGINE.engine_id)
    query = decode_query(5, 500, tokens=19)
    lengths = set()
    for step_index in range(200):
        drafts = (3, 1, 4, 4, 2)
        expected, ordinal = [], 0
        for count in drafts:
            hits = [draws.unit(draws.draw(key, step_index, 3, ordinal + i)) < 0.6 for i in range(count)]
            expected.append(hits.index(False) if False in hits else count)
            ordinal += count
        answer = plan.answer(step_index, query, drafts, ())
        assert list(answer.accepted_draft_tokens) == expected
        assert answer.generated_tokens == 5 + sum(expected)
        lengths |= set(expected)
    assert lengths == {0, 1, 2, 3, 4}


def test_drafts_without_a_rate_are_refused() -> None:
    with pytest.raises(AcceptanceUnknown, match="draft_acceptance_rate"):
        snapshot().plan(ENGINE).answer(0, QUERY, (1,), ())


def test_a_target_is_the_first_of_ignore_eos_hint_table_none() -> None:
    table = LengthTable((LengthClass("", (0,), (50.0, 50.0), 2), LengthClass("chat", (0,), (70.0, 70.0), 2)))
    requests = (
        NewRequest("a", 5, True, 9, ""),
        NewRequest("b", 5, False, 9, ""),
        NewRequest("c", 5, False, 0, ""),
        NewRequest("d", 5, False, 0, "chat"),
    )
    targets = snapshot(length_table=table).plan(ENGINE).answer(0, QUERY, (), requests).targets
    assert targets == ((0, LENGTH_IGNORE_EOS), (9, LENGTH_HINT), (50, LENGTH_TABLE), (70, LENGTH_TABLE))
    assert snapshot().plan(ENGINE).answer(0, QUERY, (), requests[2:3]).targets == ((0, LENGTH_NONE),)


def test_a_length_follows_the_request_whatever_step_and_engine() -> None:
    table = LengthTable((LengthClass("", (0,), (1.0, 1000.0), 2),))
    held = snapshot(seed=8, length_table=table)
    other = EngineIdentity(ENGINE.experiment, "server-2", {}, "m", 1)
    requests = tuple(NewRequest(f"r{i}", 5, False, 0, "") for i in range(20))
    first = held.plan(ENGINE).answer(0, QUERY, (), requests).targets
    assert held.plan(other).answer(77, QUERY, (), tuple(reversed(requests))).targets == tuple(reversed(first))
    assert len(set(first)) > 10


def test_refuse_names_the_shape_and_the_coverage() -> None:
    plan = snapshot(Fixed(support=3), support_policy="refuse").plan(ENGINE)
    with pytest.raises(SupportRefused, match=r"400 decode context tokens.*max_tokens 99"):
        plan.answer(0, QUERY, (), ())
    assert snapshot(Fixed(support=3)).plan(ENGINE).answer(0, QUERY, (), ()).support == 3


def test_a_plan_is_of_the_pack_its_rule_names() -> None:
    held = snapshot(rules=(Rule("b", model="m"),), default_pack_digest="")
    assert held.pack_for(ENGINE).digest == "b"
    with pytest.raises(NoRuleMatches):
        held.plan(EngineIdentity(ENGINE.experiment, "x", {}, "other", 1))


def test_an_older_snapshot_is_stale() -> None:
    snapshot().check_generation(3)
    with pytest.raises(StaleGeneration):
        snapshot().check_generation(4)
