"""What clients saw: latencies of requests from `vllm bench serve --save-detailed`, or from a replay's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument
from profiler.replay.metrics import known, latencies

METRICS: Final = ("ttft", "tpot", "itl", "e2e")
STATISTICS: Final = (("mean", None), ("p50", 50), ("p90", 90), ("p99", 99))


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of each metric, one entry per request (ITL: per gap); metrics the file lacks are left out."""

    name: str
    values: Mapping[str, NDArray[np.float64]]
    output_tokens_per_second: float | None


@dataclass(frozen=True)
class Comparison:
    """One statistic of one metric in two measurements; the error is of the second, in percent of the first."""

    metric: str
    statistic: str
    real: float
    emulated: float

    @property
    def error_percent(self) -> float:
        return 100 * (self.emulated / self.real - 1) if self.real else float("nan")


def read_measurement(path: Path) -> Measurement:
    """Reads either kind of file by its contents; raises InvalidArgument."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", field="measurement") from None
    if isinstance(document, dict) and isinstance(document.get("ttfts"), list):
        return _from_bench(path, document)
    if isinstance(document, dict) and str(document.get("schema", "")).startswith("step_oracle.replay/"):
        return _from_replay(path, document)
    raise InvalidArgument(
        f"{path} is neither a result of `vllm bench serve --save-result --save-detailed` nor of `step-oracle replay "
        "--json`",
        field="measurement",
    )


def compare(real: Measurement, emulated: Measurement) -> list[Comparison]:
    """Every statistic of every metric both files have, and throughput."""
    rows = []
    for metric in METRICS:
        if metric in real.values and metric in emulated.values:
            for name, percentile in STATISTICS:
                pair = [_statistic(each.values[metric], percentile) for each in (real, emulated)]
                rows.append(Comparison(metric, name, *pair))
    if real.output_tokens_per_second and emulated.output_tokens_per_second:
        pair = [real.output_tokens_per_second, emulated.output_tokens_per_second]
        rows.append(Comparison("output tokens/s", "mean", *pair))
    return rows


def _statistic(values: NDArray[np.float64], percentile: int | None) -> float:
    return float(values.mean() if percentile is None else np.percentile(values, percentile))


def _from_bench(path: Path, document: Mapping[str, Any]) -> Measurement:
    """Failed requests have a TTFT of 0 and no gaps; they are no latencies."""
    try:
        first = np.asarray(document["ttfts"], dtype=np.float64) * 1e3
        gaps = [np.asarray(each, dtype=np.float64) * 1e3 for each in document["itls"]]
        tokens = np.asarray(document["output_lens"], dtype=np.int64)
        if not len(first) == len(gaps) == len(tokens):
            raise ValueError(f"{len(first)} ttfts, {len(gaps)} itls and {len(tokens)} output_lens")
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{path} has no details of its requests ({error}); use --save-detailed", field="measurement"
        ) from None
    done = np.array([latency > 0 for latency in first], dtype=bool)
    after = np.array([gap.sum() for gap in gaps], dtype=np.float64)
    several = done & (tokens > 1)
    values = {
        "ttft": first[done],
        "tpot": after[several] / (tokens[several] - 1),
        "itl": np.concatenate([np.zeros(0), *(gap for gap, kept in zip(gaps, done, strict=True) if kept)]),
        "e2e": (first + after)[done],
    }
    throughput = document.get("output_throughput")
    return _checked(path, values, float(throughput) if isinstance(throughput, int | float) else None)


def _from_replay(path: Path, document: Mapping[str, Any]) -> Measurement:
    """All runs of the file together. A replay notes first and last token of a request, so it has no ITL."""
    try:
        entries: Sequence[Mapping[str, Any]] = [entry for run in document["runs"] for entry in run["requests"]]
        names = ("arrival_ns", "first_token_ns", "last_token_ns", "output_tokens")
        found = latencies(*([entry[name] for entry in entries] for name in names))
        throughput = float(np.mean([run["output_tokens_per_second"] for run in document["runs"]]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{path} is no whole replay: {error}", field="measurement") from None
    values = {"ttft": found.ttft, "tpot": known(found.tpot), "e2e": found.e2e}
    return _checked(path, values, throughput)


def _checked(path: Path, values: Mapping[str, NDArray[np.float64]], throughput: float | None) -> Measurement:
    kept = {metric: array for metric, array in values.items() if array.size}
    if not kept:
        raise InvalidArgument(f"{path} holds no request that succeeded", field="measurement")
    return Measurement(path.name, kept, throughput)
