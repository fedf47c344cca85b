"""Each row of a closed loop beside what its pack states, and rows that a correction was fitted on in no average."""

from __future__ import annotations

import json
from dataclasses import replace

from profiler.silicon_points import SiliconPoint, SiliconRows
from profiler.silicon_replays import Prediction
from profiler.silicon_report import document, prediction_line, summary_lines
from profiler.uncertainty import Uncertainty

POINT = SiliconPoint("row-1", "a.csv", "Qwen/Qwen3-32B", "h100_sxm", "0.12.0", "", 4, 1024, 8192, 8, 100.0, 10.0, False)
STATED = Uncertainty(0.0, 15.0, "one run")


def predicted(tpot_ms: float, point: SiliconPoint = POINT, uncertainty: Uncertainty | None = STATED) -> Prediction:
    return Prediction(point, tpot_ms, 90.0, 0, 0.0, uncertainty)


def test_a_row_says_whether_the_truth_is_where_its_pack_states_it() -> None:
    """9 ms for 10: the truth is 11.1 % above the answer; 10.5 ms: it is below."""
    assert "(-10.0 %; truth +11.1 % from the answer, stated +0 to +15 %: inside)" in prediction_line(predicted(9.0))
    assert "(+5.0 %; truth -4.8 % from the answer, stated +0 to +15 %: OUTSIDE)" in prediction_line(predicted(10.5))
    assert "nothing stated" in prediction_line(predicted(9.0, uncertainty=None))


def test_a_group_counts_its_rows_inside() -> None:
    lines = list(summary_lines([predicted(9.0), predicted(9.5), predicted(10.5), predicted(9.0, uncertainty=None)]))
    assert [line for line in lines if line.endswith("| 2 of 4 |")] == lines[2:4]


def test_rows_that_a_correction_was_fitted_on_are_in_no_group() -> None:
    """1,024 in and out, 8, 32 and 128 users, of Qwen3-32B in its own dtype."""
    fitted = replace(POINT, output_tokens=1024)
    others = [replace(fitted, concurrency=16), replace(fitted, weight_format="fp8"), POINT]
    assert [point.is_fitted for point in (fitted, *others)] == [True, False, False, False]

    lines = list(summary_lines([predicted(20.0, fitted), predicted(9.0)]))

    assert lines[2] == "| Qwen3-32B bf16 h100_sxm | 1 | 10.0 % | -10.0 % | -10.0 % | -10.0 % | -10.0 % | 1 of 1 |"
    assert lines[-1] == "in no group: 1 rows that a correction of the packs was fitted on"
    assert prediction_line(predicted(20.0, fitted)).endswith("; a correction was fitted on it")


def test_the_file_has_every_row_with_its_statement() -> None:
    rows = SiliconRows((POINT,), (), {})
    (row,) = json.loads(document(rows, [predicted(9.0)]))["rows"]
    assert (row["id"], row["is_inside"], row["is_fitted"]) == ("row-1", True, False)
    assert row["uncertainty"] == {"low_percent": 0.0, "high_percent": 15.0, "basis": "one run"}
