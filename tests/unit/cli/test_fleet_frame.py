"""What a frame of `step-oracle top` looks like at a given width and height."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from oracle_server.cli.fleet import Counts, EnginePoll, ExperimentPoll, Fleet, Poll, View
from oracle_server.cli.fleet_frame import Header, frame

HEADER = Header("127.0.0.1:8470", datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC))
TITLES = "ENGINE STATE STEPS/S EXTRAP LATENESS P50 P99 LATE LEASED RECONN GEN PACK"


def fleet(engines: int, experiments: int = 1) -> View:
    """Engine 2 is late, engine 3 extrapolates, engine 4 is starting."""
    names = [f"tenants/default/experiments/exp-{i}" for i in range(experiments)]

    def poll(at: float, scale: int) -> Poll:
        each = []
        for i in range(engines):
            counts = Counts(
                steps=100 * scale,
                extrapolated_steps=(i == 3) * 10 * scale,
                leased_steps=90 * scale,
                late_answers=(i == 2) * 7 * scale,
                reconnects=i == 1,
                lateness_buckets=(95 * scale, 0, 0, 5 * scale),
            )
            each.append(EnginePoll(names[i % experiments], f"engine-{i}:8000", 1, "h100@4f1c09", 12, i != 4, counts))
        return Poll(at, "SERVING", tuple(ExperimentPoll(name, 12, ("h100@4f1c09",)) for name in names), tuple(each))

    comparing = Fleet()
    comparing.advance(poll(0.0, 1))
    return comparing.advance(poll(2.0, 3))[0]


def render(view: View, width: int, height: int = 40, header: Header = HEADER) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, highlight=False)
    console.print(frame(view, header, width, height))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_frame_says_everything_of_a_fleet() -> None:
    lines = render(fleet(5), 120)
    assert lines[0] == (
        "step-oracle top  127.0.0.1:8470 SERVING  5 engines, 1 starting, 1 degraded  500 steps/s  12:00:00Z"
    )
    assert lines[2].split()[:2] == ["EXPERIMENT", "ENGINES"]
    assert lines[3].split() == "exp-0 5 500 2.0% 5µs 90µs 21 (+14) 90.0% 1 12 h100@4f1c09".split()
    assert lines[5].split() == TITLES.split()
    assert [line.split() for line in lines[6:]] == [
        "engine-2:8000 late 100 0.0% 5µs 90µs 21 (+14) 90.0% 0 12 h100@4f1c09".split(),
        "engine-4:8000 starting 100 0.0% 5µs 90µs 0 90.0% 0 12 h100@4f1c09".split(),
        "engine-0:8000 ok 100 0.0% 5µs 90µs 0 90.0% 0 12 h100@4f1c09".split(),
        "engine-1:8000 ok 100 0.0% 5µs 90µs 0 90.0% 1 12 h100@4f1c09".split(),
        "engine-3:8000 ok 100 10.0% 5µs 90µs 0 90.0% 0 12 h100@4f1c09".split(),
    ]


@pytest.mark.parametrize("height", [5, 8, 12, 24, 50])
@pytest.mark.parametrize("experiments", [1, 2, 30])
def test_a_frame_fits_the_terminal_and_says_what_it_leaves_out(height: int, experiments: int) -> None:
    lines = render(fleet(40, experiments), 100, height, Header(HEADER.target, HEADER.now, "a note"))
    shown = sum(line.startswith("engine-") for line in lines)
    assert len(lines) <= max(height, 7)
    assert lines[1] == "a note"
    if height >= 8 and shown < 40:
        assert lines[-1] == f"… {40 - shown} more of 40 engines"
    assert height < 12 or shown


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (120, TITLES),
        (80, "ENGINE STATE STEPS/S EXTRAP LATENESS P50 P99 LATE LEASED"),
        (66, "ENGINE STATE STEPS/S EXTRAP P99 LATE LEASED"),
        (50, "ENGINE STATE STEPS/S LATE"),
        (20, "ENGINE STATE STEPS/S LATE"),
    ],
)
def test_a_narrow_terminal_loses_the_least_telling_columns_and_wraps_no_line(width: int, titles: str) -> None:
    lines = render(fleet(6), width)
    assert len(lines) == len(render(fleet(6), 200))
    assert all(len(line) <= width for line in lines)
    if width > 20:
        assert lines[5].split() == titles.split()


def test_engines_of_several_experiments_say_whose_they_are() -> None:
    lines = render(fleet(4, 2), 120)
    assert lines[6].split()[:3] == ["ENGINE", "EXPERIMENT", "STATE"]
    assert lines[7].split()[:3] == ["engine-2:8000", "exp-0", "late"]


def test_an_id_from_outside_is_text_and_no_markup() -> None:
    counts = Counts(steps=1)
    engine = EnginePoll("tenants/a/experiments/b", "[red]x[/red]", 1, "p@1", 1, True, counts)
    view = Fleet().advance(Poll(0.0, "SERVING", (ExperimentPoll("tenants/a/experiments/b", 1, ()),), (engine,)))[0]
    text = "\n".join(render(view, 120))
    assert "[red]x[/red]" in text
    assert "a/b" in text


@pytest.mark.parametrize(
    ("view", "sentence"),
    [
        (fleet(0), "no engine is attached"),
        (Fleet().advance(Poll(0.0, "SERVING", (), ()))[0], "no experiment yet"),
    ],
)
def test_an_empty_fleet_says_so(view: View, sentence: str) -> None:
    assert sentence in "\n".join(render(view, 100))


def test_shares_and_times_are_not_rounded_into_what_they_are_not() -> None:
    counts = Counts(steps=100_000, extrapolated_steps=1, leased_steps=99_999, lateness_buckets=(0,) * 11 + (1,))
    engine = EnginePoll("tenants/default/experiments/e", "x", 1, "p", 1, True, counts)
    experiment = ExperimentPoll("tenants/default/experiments/e", 1, ())
    line = render(Fleet().advance(Poll(0.0, "SERVING", (experiment,), (engine,)))[0], 120)[-1]
    assert line.split() == "x ok – <0.1% >50ms >50ms 0 >99.9% 0 1 p".split()
