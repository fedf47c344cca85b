"""What `silicon-points` prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from profiler.silicon_points import SiliconPoint, SiliconRows, summarize
from profiler.silicon_replays import Prediction

_SCHEMA = "step_oracle.silicon_points/1"


def row_lines(rows: SiliconRows, *, with_points: bool) -> Iterator[str]:
    """Rows that are left out, each with its reason, and those to replay where asked for."""
    for point, reason in rows.screened:
        yield f"left out  {point.id}: {reason}"
    for model, count in sorted(rows.mixtures.items()):
        yield f"left out  {count} rows of {model}: no dense model"
    if with_points:
        for point in rows.points:
            yield f"replayed  {point.id}: TPOT {point.tpot_ms:.2f} ms"
    yield f"{len(rows.points)} rows to replay, {len(rows.screened)} dense rows left out"


def prediction_line(prediction: Prediction) -> str:
    point, stated = prediction.point, prediction.uncertainty
    verdict = "nothing stated" if stated is None else stated.verdict(prediction.error_percent)
    return (
        f"{point.id}: TPOT {point.tpot_ms:.2f} -> {prediction.tpot_ms:.2f} ms ({prediction.error_percent:+.1f} %; "
        f"{verdict}), TTFT {point.ttft_ms:.0f} -> {prediction.ttft_ms:.0f} ms"
        + ("; a correction was fitted on it" if point.is_fitted else "")
    )


def group_of(point: SiliconPoint) -> str:
    """Model, system and weight format."""
    return f"{point.model.rsplit('/', 1)[1]} {point.weight_format or 'bf16'} {point.system}"


def summary_lines(predictions: Sequence[Prediction]) -> Iterator[str]:
    """A table in Markdown: errors of TPOT, each model and system whole and by tensor parallelism.

    Rows that a correction of the packs was fitted on are in no group.
    """
    fitted = sum(p.point.is_fitted for p in predictions)
    predictions = [p for p in predictions if not p.point.is_fitted]
    yield "| rows | number | MAPE | mean | median | P10 | P90 | inside the stated uncertainty |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    keys: list[Callable[[SiliconPoint], str]] = [
        group_of,
        lambda point: f"{group_of(point)} TP{point.tensor_parallel}",
    ]
    names = sorted({key(prediction.point) for prediction in predictions for key in keys})
    for name in names:
        chosen = [p for p in predictions if name in [key(p.point) for key in keys]]
        s = summarize([p.error_percent for p in chosen])
        cells = [f"{s.mape:.1f} %", *(f"{value:+.1f} %" for value in (s.mean, s.median, s.p10, s.p90))]
        cells.append(f"{sum(p.is_inside for p in chosen)} of {s.count}")
        yield f"| {name} | {s.count} | {' | '.join(cells)} |"
    if fitted:
        yield f"in no group: {fitted} rows that a correction of the packs was fitted on"


def document(rows: SiliconRows, predictions: Sequence[Prediction]) -> str:
    """JSON: one object per row, the rows left out beside."""
    written = {
        "schema": _SCHEMA,
        "rows": [
            {
                "id": p.point.id,
                "group": group_of(p.point),
                "tensor_parallel": p.point.tensor_parallel,
                "prompt_tokens": p.point.prompt_tokens,
                "output_tokens": p.point.output_tokens,
                "concurrency": p.point.concurrency,
                "measured_ms": {"tpot": p.point.tpot_ms, "ttft": p.point.ttft_ms},
                "replayed_ms": {"tpot": p.tpot_ms, "ttft": p.ttft_ms},
                "tpot_error_percent": p.error_percent,
                "preemptions": p.preemptions,
                "extrapolated_percent": p.extrapolated_percent,
                "uncertainty": None if p.uncertainty is None else asdict(p.uncertainty),
                "is_inside": p.is_inside,
                "is_fitted": p.point.is_fitted,
            }
            for p in predictions
        ],
        "left_out": [{"id": point.id, "reason": reason} for point, reason in rows.screened],
        "left_out_models": dict(rows.mixtures),
    }
    return json.dumps(written, indent=1) + "\n"
