"""The table, the files and the pictures of the accuracy gates, from a handful of made-up figures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from accuracy.files import write
from accuracy.pictures import draw
from accuracy.table import print_table
from gates import Figure, Gates, Record


def a_session() -> Record:
    """Two gates: one figure held, one missed, one without a bound; curves of one, points of the other."""
    gates = Gates()
    gates.source("replay of X", "somebody's run")
    gates.check("replay of X", "TTFT mean", 1.5, at_most=2.0, controls={"LLM-Emu auto": -150.0})
    gates.check("replay of X", "TPOT mean", -2.5, at_most=2.0)
    gates.check("replay of X", "times real time", 50.0, unit="x")
    for number, series in enumerate(("measured", "replayed", "LLM-Emu auto")):
        for metric in ("TTFT", "TPOT"):
            gates.curve("replay of X", metric, [10.0 + number, 1.0, 5.0], series=series)
    gates.check("other", "MAPE", 3.0, controls={"boosted trees": 4.0})
    gates.points("other", "TPOT", {"id 7": 10.0, "id 8": 200.0}, series="measured")
    gates.points("other", "TPOT", {"id 7": 10.5, "id 8": 190.0}, series="answered")
    gates.listing("other", ["id 7: inside", "id 8: OUTSIDE"])
    return gates.record


def printed(record: Record) -> str:
    console = Console(width=150, file=io.StringIO())
    print_table(record.figures, console)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def test_the_table_marks_what_is_missed_and_shows_controls_beside() -> None:
    lines = printed(a_session()).splitlines()

    (held,) = [line for line in lines if "TTFT mean" in line]
    (missed,) = [line for line in lines if "TPOT mean" in line]
    (reported,) = [line for line in lines if "times real time" in line]
    assert "+1.50 %" in held
    assert "± 2 %" in held
    assert "held" in held
    assert "LLM-Emu auto -150.00" in held
    assert "MISSED" in missed
    assert "held" not in reported
    assert "MISSED" not in reported
    assert lines[-1].startswith("1 of 2 bounds held, 1 MISSED; 2 figures have no bound")


def test_a_figure_beyond_its_bound_fails_after_all_were_recorded() -> None:
    gates = Gates()
    gates.check("g", "first", -2.01, at_most=2.0)
    gates.check("g", "second", 2.0, at_most=2.0)

    with pytest.raises(AssertionError, match=r"^g: first is -2\.01 %, at most 2 % is promised$"):
        gates.assert_held()

    assert [figure.held for figure in gates.record.figures] == [False, True]


def test_not_a_number_holds_no_bound() -> None:
    assert Figure("g", "mean of nothing", float("nan"), "%", 2.0).held is False


def test_pictures_are_drawn_again_from_the_files_alone(tmp_path: Path) -> None:
    record = a_session()

    written = write(record, tmp_path / "first")
    again = Record.of(json.loads((tmp_path / "first" / "figures.json").read_text()))
    (tmp_path / "second").mkdir()
    drawn = draw(again, tmp_path / "second")

    assert again == record
    names = ["cdf_replay_of_x.png", "errors_other.png", "errors_whole_runs.png", "points_other.png"]
    assert [path.name for path in drawn] == names
    assert [path.name for path in written] == ["figures.json", "table.txt", "other_rows.txt", *names]
    assert (tmp_path / "first" / "table.txt").read_text() == printed(record)
    assert (tmp_path / "first" / "other_rows.txt").read_text() == "id 7: inside\nid 8: OUTSIDE\n"
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.read_bytes() == (tmp_path / "first" / path.name).read_bytes()


def test_pictures_and_cases_of_figures_that_are_gone_do_not_stay(tmp_path: Path) -> None:
    write(a_session(), tmp_path)
    gates = Gates()
    gates.check("another", "MAPE", 1.0, at_most=2.0)
    gates.check("nothing beside it", "MAPE", 1.0)

    write(gates.record, tmp_path)

    assert [path.name for path in tmp_path.glob("*.png")] == ["errors_another.png"]
    assert not list(tmp_path.glob("*_rows.txt"))


def test_a_long_sample_keeps_its_ends_and_its_middle() -> None:
    gates = Gates()

    gates.curve("g", "TTFT", range(10_001), series="measured")

    (curve,) = gates.record.curves
    assert len(curve.values) == 500
    assert (curve.values[0], curve.values[-1]) == (0, 10_000)
    assert curve.values[250] == pytest.approx(5_000, rel=0.01)


def test_files_of_another_schema_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the schema is 'x'; step_oracle\.accuracy/1 is needed: run `make accuracy`"):
        Record.of({"schema": "x"})
