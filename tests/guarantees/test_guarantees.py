"""The guarantees in short form, and that each checker sees what it is there to see."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from guarantees import hot_swaps, show, soak
from guarantees.fleet_processes import FleetProcesses
from guarantees.kill_nine import Acknowledged
from guarantees.message_mutations import damaged_bytes, mutate
from guarantees.row import HELD, MISSED, Guarantee, Row, judged
from guarantees.shim_engines import ShimEngine
from oracle_calls import mixed_steps
from oracle_server.rpc.recompute import read_trace, recompute_from
from step_oracle.v1 import oracle_service_pb2
from vllm_shim.trace import TraceWriter


def all_held(rows: list[Row]) -> bool:
    for row in rows:
        print(row)
    return bool(rows) and all(row.verdict == HELD for row in rows)


def test_swaps_under_load_are_checked_answer_by_answer(tmp_path: Path) -> None:
    """And a single answer that is changed afterwards is found."""
    sizes = hot_swaps.Sizes(activations=4, engines=3, period_seconds=0.02, every_seconds=0.03, processes=2)
    found = hot_swaps.swap(tmp_path, sizes)
    assert found.failures == []
    assert (found.report.equal, found.report.different, found.report.skipped) == (found.steps, 0, 0)
    assert (found.went_back, found.never_seen, len(found.seen_ms)) == (0, 0, 4)
    records = list(read_trace(next((tmp_path / "traces").iterdir())))
    records[len(records) // 2].step.reply.latency_ns[0] += 1
    (tmp_path / "changed").mkdir()
    writer = TraceWriter(f"{tmp_path}/changed/", records[0].header)
    for record in records[1:]:
        writer.write(record.step)
    writer.close()
    report = recompute_from(tmp_path / "state", list((tmp_path / "changed").iterdir()))
    assert (report.equal, report.different) == (len(records) - 2, 1)


class MadeUpEngine:
    """One that has done all it does when it is made; the engine of number 2 has failed."""

    # There is no time to wait for one.
    period_seconds = -1000.0

    def __init__(self, number: int) -> None:
        self.engine_id, self.leased, self.went_back = f"e{number}", number, number % 2
        self.steps, self.failure = 10 * number, ValueError("made up") if number == 2 else None
        self.stream, self._seen = self, 100.0 + number

    def saw(self, generation: int) -> float | None:
        return self._seen if generation < 5 else None

    def start(self) -> None:
        """Runs already."""

    def stop(self) -> None:
        self.steps += 1


def test_a_fleet_of_processes_tells_what_all_its_engines_do() -> None:
    make: Callable[..., ShimEngine] = MadeUpEngine  # type: ignore[assignment]
    with FleetProcesses(4, 2, make) as fleet:
        assert fleet.saw(4, time.monotonic() + 1) == 103.0
        # The processes of one that failed and of one that is late.
        assert fleet.saw(5, time.monotonic()) is None
        # Those of the other process take no steps.
        with pytest.raises(AssertionError, match="do not go on"):
            fleet.go_on(1)
        fleet.stop()
        done = fleet.done
    assert (done.steps, done.leased, done.went_back) == (64, 6, 2)
    assert done.failures == ["e2: ValueError('made up')"]
    assert all(not process.is_alive() for process in fleet._processes)


def test_what_was_acknowledged_or_was_under_way_is_allowed_and_nothing_else() -> None:
    known = Acknowledged(present={"a": 1, "b": 2}, unsure=("b", None))
    assert known.problems("pack", {"a": 1}) == []
    known = Acknowledged(present={"a": 1, "b": 2}, unsure=("b", None))
    assert known.problems("pack", {"a": 1, "b": 2}) == []
    known = Acknowledged(present={"a": 1}, unsure=("b", 3))
    assert len(known.problems("pack", {"b": 4})) == 2
    assert (known.present, known.unsure) == ({"b": 4}, None)


# Two pairs say nothing about a ratio of 1.2.
@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(set(show.NAMES) - {"noisy_tenant"}))
def test_each_guarantee_holds_in_quick_form(name: str) -> None:
    assert all_held(show.show(name, quick=True))


def test_mutations_reach_every_field_and_keep_what_can_be_sent() -> None:
    draw, seen = random.Random(1), set()
    valid = oracle_service_pb2.SampleStepRequest(steps=mixed_steps(3))
    for _ in range(600):
        changed = oracle_service_pb2.SampleStepRequest()
        changed.CopyFrom(valid)
        mutate(changed, draw)
        assert oracle_service_pb2.SampleStepRequest.FromString(changed.SerializeToString()) is not None
        for step in changed.steps:
            seen |= {field.name for field, _ in step.ListFields()} | {
                field.name for field, _ in step.shape.ListFields()
            }
    assert {"num_draft_tokens", "new_requests", "device_time_ns", "num_loras", "prefill_chunks"} <= seen
    data = valid.SerializeToString()
    assert len({damaged_bytes(data, draw) for _ in range(50)} - {data}) > 40


def test_the_slope_of_noise_holds_zero_and_that_of_a_leak_does_not() -> None:
    times = np.arange(0, 1200, 3.0)
    noise = np.random.default_rng(1).normal(0, 1e5, times.size)
    _, low, high = soak.slope_per_hour(times, 2e8 + noise, 30)
    assert low < 0 < high < 10 * soak.SLOPE_BOUND
    slope, low, _ = soak.slope_per_hour(times, 2e8 + noise + times * 1000, 30)
    assert slope == pytest.approx(3.6e6, rel=0.3)
    assert low > 0


def test_a_missed_guarantee_is_exit_status_1_and_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = iter((True, False))
    monkeypatch.setattr(show, "show", lambda name, quick: [judged(name, "", "1", "0", holds=next(verdicts))])
    for status, verdict in ((0, HELD), (1, MISSED)):
        monkeypatch.setattr(sys, "argv", ["show", "--quick", "--only", "soak", "--output", str(tmp_path)])
        assert show.main() == status
        rows = json.loads((tmp_path / "guarantees.json").read_text())["rows"]
        assert [row["verdict"] for row in rows] == [verdict]
        assert verdict in capsys.readouterr().out


def test_a_guarantee_that_cannot_be_shown_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, sizes: object) -> list[Row]:
        raise OSError("no compiler")

    monkeypatch.setattr(soak, "GUARANTEE", Guarantee(fail, None, None))
    monkeypatch.setitem(sys.modules, "guarantees.soak", soak)
    (row,) = show.show("soak", quick=True)
    assert row.verdict == MISSED
    assert "no compiler" in row.figure
