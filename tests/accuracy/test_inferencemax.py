"""Synthesized packs against closed loops that InferenceMAX measured: Llama-3.1-70B FP8 on one to eight H200.

Every row of aiconfigurator-core's `silicon_sample.csv` that stands for them is replayed or named with the reason why
not, in `inferencemax_rows.txt` of a session's files; `step-oracle silicon-points` does the same for all systems and
models (its table: profiler/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from environments import VLLM_VERSIONS, vllm_environment
from gates import Gates
from profiler.silicon_points import read_rows, summarize
from profiler.silicon_replays import Prediction, predict
from profiler.silicon_report import prediction_line, row_lines

pytestmark = [pytest.mark.accuracy, pytest.mark.slow, pytest.mark.nightly]
pytest.importorskip("aiconfigurator_core", reason="the `synthesize` extra is not installed")

GATE = "synthesized packs, InferenceMAX rows"
SOURCE = "InferenceMAX, 29 October 2025, in aiconfigurator-core 0.12.0"
ROWS = "70b_h200_sxm_vllm_fp8"


def test_llama_70b_on_h200(gates: Gates) -> None:
    rows = read_rows().narrowed(ROWS)
    left_out = list(row_lines(rows, with_points=False))
    assert len(rows.points) + len(rows.screened) == 60
    venv = vllm_environment(VLLM_VERSIONS[-1]).python.parent.parent
    predictions = predict(rows.points, venv)
    inside = sum(found.is_inside for found in predictions)
    counted = f"{inside} of {len(predictions)} rows inside the stated uncertainty"
    gates.listing("inferencemax", [*left_out, *map(prediction_line, predictions), counted])
    gates.check(GATE, f"Llama-3.1-70B FP8, H200: {counted}", 100 * inside / len(predictions), unit="% of rows")
    gates.source(GATE, SOURCE)
    _report(gates, "Llama-3.1-70B FP8, H200", predictions, at_most=5.0)
    for tensor_parallel in (1, 2, 4, 8):
        chosen = [found for found in predictions if found.point.tensor_parallel == tensor_parallel]
        chosen.sort(key=lambda found: (found.point.prompt_tokens, found.point.output_tokens, found.point.concurrency))
        name = f"Llama-3.1-70B FP8, H200 TP{tensor_parallel}"
        _report(gates, name, chosen)
        picture = f"InferenceMAX rows, {name}"
        gates.source(picture, SOURCE)
        gates.points(picture, "TPOT", {p.point.label: p.point.tpot_ms for p in chosen}, series="measured")
        gates.points(picture, "TPOT", {p.point.label: p.tpot_ms for p in chosen}, series="synthesized pack")


def _report(gates: Gates, name: str, predictions: Sequence[Prediction], at_most: float | None = None) -> None:
    summary = summarize([found.error_percent for found in predictions])
    gates.check(GATE, f"{name}, {summary.count} rows: TPOT MAPE", summary.mape, at_most=at_most)
    spread = {"P10": summary.p10, "P90": summary.p90}
    gates.check(GATE, f"{name}, {summary.count} rows: TPOT mean error", summary.mean, controls=spread)
