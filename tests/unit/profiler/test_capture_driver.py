"""A plan driven over an engine that writes a capture's files: where it goes, what it skips, when it ends."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import captures
from driven_engine import DrivenEngine
from oracle_server.errors import InvalidArgument
from profiler.capture import driver
from profiler.capture.driver import PlanDriver, PlanOptions
from profiler.capture.plan import EngineLimits, visits
from profiler.capture.steps import PLAN_FILE, idle_ns, read_capture

LIMITS = EngineLimits(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=512, kv_tokens=4096)


def new_run(folder: Path, number: int = 1) -> Path:
    """Files with nothing but their headers."""
    return captures.write_run(folder, [], number=number)


def drive(run: Path, engine: DrivenEngine, *, minutes: float = 10.0, limits: EngineLimits = LIMITS) -> None:
    asyncio.run(PlanDriver(engine, run, limits, PlanOptions(minutes, 1.0), engine.rest).drive())


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / PLAN_FILE).read_text().splitlines()]


def visited(run: Path) -> Counter[str]:
    return Counter(event["visit"] for event in events(run) if event["event"] == "visit begins")


def test_every_region_of_the_plan_is_reached_and_measured(tmp_path: Path) -> None:
    """Regions with tokens computed before the chunk and beside longer contexts too: the engine schedules as vLLM."""
    run = new_run(tmp_path)
    drive(run, DrivenEngine(run, LIMITS))
    end = events(run)[-1]

    assert end["event"] == "plan ends"
    assert end["regions"] == len(visits(LIMITS))
    assert end["measured"] == end["tight"] == end["regions"]
    assert any(visit.before for visit in visits(LIMITS))
    assert any(step.warm_up for step in read_capture(tmp_path)[0].steps)


def test_an_interrupted_plan_goes_on_where_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine fails in the middle; the same command starts another run of the capture."""
    first = new_run(tmp_path)
    dying = DrivenEngine(first, LIMITS)
    half = len(visits(LIMITS)) // 2

    def dies(prompt: int, output: int) -> bool:
        if sum(visited(first).values()) == half:
            raise InvalidArgument("the engine does not answer any more")
        return False

    dying._refuses = dies
    with pytest.raises(InvalidArgument, match="any more"):
        drive(first, dying)
    known = {event["visit"] for event in events(first) if event["event"] == "visit ends" and event["tight"]}
    second = new_run(tmp_path, 2)
    drive(second, DrivenEngine(second, LIMITS))

    assert len(known) >= half // 2
    assert not known & set(visited(second))
    assert events(second)[0]["known"] >= len(known)
    assert events(second)[-1]["tight"] == len(visits(LIMITS))
    assert f"{events(second)[0]['known']} known from earlier runs" in capsys.readouterr().out
    told = [event["regions_measured"] for event in events(second) if event["event"] == "visit ends"]
    assert [events(second)[0]["measured"], *told, events(second)[-1]["measured"]] == sorted(
        [events(second)[0]["measured"], *told, events(second)[-1]["measured"]]
    )
    assert events(second)[0]["measured"] >= len(known)
    assert [run.name for run in read_capture(tmp_path)] == ["run-001", "run-002"]


def test_a_further_part_of_a_plan_visits_what_the_part_before_visited_and_warms_nothing_up(tmp_path: Path) -> None:
    """On the engine that was driven before, in the same run of the capture."""
    run = new_run(tmp_path)
    engine = DrivenEngine(run, LIMITS)
    first = asyncio.run(PlanDriver(engine, run, LIMITS, PlanOptions(10.0, 1.0), engine.rest).drive())
    before, asked = len(read_capture(tmp_path)[0].steps), visited(run)
    further = PlanOptions(10.0, 1.0, is_further_part=True)
    second = asyncio.run(PlanDriver(engine, run, LIMITS, further, engine.rest).drive())
    begins = [event for event in events(run) if event["event"] == "plan begins"]

    assert first == second
    assert second.tight == second.measured == second.regions == len(visits(LIMITS))
    assert [event["known"] for event in begins] == [0, 0]
    assert visited(run) == asked + asked
    assert not any(step.warm_up for step in read_capture(tmp_path)[0].steps[before:])


def test_a_part_goes_on_where_the_part_before_it_ended(tmp_path: Path) -> None:
    """Each visit takes a minute of ten."""
    run = new_run(tmp_path)

    class Minutes(PlanDriver):
        def _spent(self) -> float:
            return 60.0 * sum(visited(run).values())

    engine = DrivenEngine(run, LIMITS)
    first = asyncio.run(Minutes(engine, run, LIMITS, PlanOptions(10.0, 1.0), engine.rest).drive())
    asked, plan = list(visited(run)), [visit.label for visit in visits(LIMITS)]
    further = PlanOptions(10.0, 1.0, is_further_part=True, first_visit=first.next_visit)
    second = asyncio.run(PlanDriver(engine, run, LIMITS, further, engine.rest).drive())
    then = [event["visit"] for event in events(run) if event["event"] == "visit begins"][len(asked) :]

    # Some regions need no visit of their own.
    assert 10 <= first.next_visit < len(plan) / 2
    assert set(asked) <= set(plan[: first.next_visit])
    assert then[0] == plan[first.next_visit]
    assert plan[0] in then
    # It went round.
    assert second.next_visit == first.next_visit


def test_a_run_that_cannot_be_read_does_not_keep_a_plan_from_going_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = new_run(tmp_path)
    (broken / "engine.capture").write_bytes(b"")
    run = new_run(tmp_path, 2)
    drive(run, DrivenEngine(run, LIMITS))

    assert events(run)[-1]["event"] == "plan ends"
    assert "run-001 is not taken into account" in capsys.readouterr().out


def test_a_visit_the_engine_refuses_is_left_out_told_and_not_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path)
    engine = DrivenEngine(run, LIMITS, refuses=lambda prompt, output: prompt > 300)
    drive(run, engine)
    refused = [event["visit"] for event in events(run) if "refused" in event.get("reason", "")]

    assert refused
    assert {count for visit, count in visited(run).items() if visit in refused} == {1}
    # Steps of other visits may lie in the region of one that is refused.
    assert events(run)[-1]["tight"] >= len(visits(LIMITS)) - len(refused)
    assert "left out, the engine refuses it" in capsys.readouterr().out


def test_an_engine_that_refuses_the_warm_up_is_told(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(InvalidArgument, match="refuses the plan's warm-up: 256"):
        drive(run, DrivenEngine(run, LIMITS, refuses=lambda prompt, output: True))


def test_an_engine_whose_steps_reach_no_file_ends_the_plan_after_its_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_FIRST_STEPS_SECONDS", 0.0)
    run = new_run(tmp_path)
    engine = DrivenEngine(run, LIMITS)
    engine.writes = False

    with pytest.raises(InvalidArgument, match="no step reached a rank's file"):
        drive(run, engine)
    assert not visited(run)


def test_a_plan_without_the_steps_a_pack_needs_ends_at_twice_its_time(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    drive(run, DrivenEngine(run, LIMITS), minutes=1e-9)

    assert sum(visited(run).values()) == 0
    assert events(run)[-1]["event"] == "plan ends"


def test_a_region_that_is_not_reached_is_visited_twice_at_most(tmp_path: Path) -> None:
    """An engine that never has more than four requests in a step, whatever it is sent."""
    run = new_run(tmp_path)
    engine = DrivenEngine(run, LIMITS)
    serve = engine._serve

    def four(prompts: int, prompt_tokens: int, output_tokens: int) -> None:
        for begin in range(0, prompts, 4):
            serve(min(4, prompts - begin), prompt_tokens, output_tokens)

    engine._serve = four  # type: ignore[method-assign]
    drive(run, engine)
    counts = visited(run)

    assert {counts[visit.label] for visit in visits(LIMITS) if visit.requests == 8 and not visit.chunk} == {2}


def test_prompts_that_share_a_step_are_one_request(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    engine = DrivenEngine(run, LIMITS)
    drive(run, engine)

    assert {prompts for prompts, _, output in engine.asked if output == 1} >= {1, 2, 4}
    assert max(prompts for prompts, *_ in engine.asked) == 8


def test_of_several_data_parallel_ranks_each_gets_the_requests_of_a_visit(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run / "engine-dp1.json").write_text((run / "engine.json").read_text())
    engine = DrivenEngine(run, LIMITS)
    drive(run, engine)

    assert all(prompts % 2 == 0 for prompts, *_ in engine.asked)
    assert max(prompts for prompts, *_ in engine.asked) == 16


def test_a_worker_that_counts_otherwise_is_followed_too(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    drive(run, DrivenEngine(run, LIMITS, worker_offset=3))

    assert events(run)[-1]["tight"] == len(visits(LIMITS))


def test_a_plan_rests_for_a_share_of_its_time_and_the_capture_has_the_steps_after(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    drive(run, DrivenEngine(run, LIMITS), minutes=0.5)
    (captured,) = read_capture(tmp_path)
    pauses = [pause / 1e9 for pause in idle_ns(captured.steps) if pause]

    assert [round(pause, 1) for pause in pauses] == [0.1, 0.4, 1.6, 0.1, 0.4, 0.1, 0.1]
    assert [event["seconds"] for event in events(run) if event["event"] == "pauses end"] == [2.8]


def test_a_dear_region_is_left_out_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(tmp_path)
    engine = DrivenEngine(run, LIMITS)
    plan = PlanDriver(engine, run, LIMITS, PlanOptions(10.0, 1.0), engine.rest)
    # A second for each token, those of the prompts after pauses included.
    plan._coverage.prefill_tokens, plan._coverage.prefill_seconds = 1, 1000.0
    asyncio.run(plan.drive())

    assert "left out, too dear for the time left" in capsys.readouterr().out


def test_a_later_pass_asks_for_other_lengths_than_the_one_before(tmp_path: Path) -> None:
    """An engine that never writes the region's steps is visited again."""
    run = new_run(tmp_path)
    engine = DrivenEngine(run, LIMITS)
    visit = next(visit for visit in visits(LIMITS) if visit.chunk >= 64 and visit.chunk + visit.requests < 128)
    driven = PlanDriver(engine, run, LIMITS, PlanOptions(10.0, 1.0), engine.rest)
    asyncio.run(driven._mixed(visit))
    first = len(engine.asked)
    asyncio.run(driven._mixed(visit))
    lengths = [
        [tokens for _, tokens, output in asked if output == 1] for asked in (engine.asked[:first], engine.asked[first:])
    ]

    assert lengths[0] != lengths[1]
    assert len(set(lengths[0] + lengths[1])) > len(set(lengths[0]))
