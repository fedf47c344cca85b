"""The picture of a run holds what was measured."""

from __future__ import annotations

from pathlib import Path

from performance.figures import draw

MACHINE = {"machine": {"cpu": "a CPU", "cores": 2, "load_average_before": 0.5}, "quick": True}


def test_a_section_without_a_panel_makes_no_picture(tmp_path: Path) -> None:
    draw({**MACHINE, "readiness": {}}, tmp_path / "figures.png")
    assert not list(tmp_path.iterdir())


def test_a_section_with_a_panel_makes_one(tmp_path: Path) -> None:
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    draw({**MACHINE, "growth": {"us_per_message": {"1 engine": spread}}}, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").stat().st_size > 1000
