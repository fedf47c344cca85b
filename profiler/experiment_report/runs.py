"""One engine's requests as its client saw them: the file of `vllm bench serve --save-result --save-detailed`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cluster:
    """Requests that are resampled together: of an engine, or of a stretch of its run.

    Latencies are milliseconds, one entry per request that succeeded (TPOT: that has more than one token). `seconds` is
    the time of one engine they stand for, so that tokens over seconds is the rate of an engine.
    """

    ttft: Floats
    tpot: Floats
    e2e: Floats
    tokens: int
    seconds: float


@dataclass(frozen=True)
class EngineRun:
    """All requests of one engine in the order they were sent; NaN in TPOT where there is one token."""

    engine_id: str
    begin_seconds: Floats
    ttft: Floats
    tpot: Floats
    e2e: Floats
    tokens: NDArray[np.int64]
    seconds: float
    failed: int

    def whole(self) -> Cluster:
        """The run as one cluster."""
        return self._cluster(slice(None), self.seconds)

    def blocks(self, count: int) -> list[Cluster]:
        """The run as stretches of equally many consecutive requests; each stands for the time until the next begins."""
        edges = np.linspace(0, len(self.ttft), min(count, len(self.ttft)) + 1).astype(int)
        begins = [0.0, *(float(self.begin_seconds[edge]) for edge in edges[1:-1]), self.seconds]
        return [
            self._cluster(slice(int(first), int(last)), max(0.0, end - begin))
            for first, last, begin, end in zip(edges[:-1], edges[1:], begins[:-1], begins[1:], strict=True)
        ]

    def _cluster(self, part: slice, seconds: float) -> Cluster:
        tpot = self.tpot[part]
        return Cluster(self.ttft[part], tpot[np.isfinite(tpot)], self.e2e[part], int(self.tokens[part].sum()), seconds)


def read_run(engine_id: str, path: Path) -> EngineRun:
    """Read a result file; InvalidArgument where it is none or has no details. TPOT is that of vLLM."""
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", field="results") from None
    try:
        return run_of(engine_id, document)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{path} is no result with the details of its requests ({error}); let the client write it with `vllm bench "
            "serve --save-result --save-detailed`",
            field="results",
        ) from None


def run_of(engine_id: str, document: Mapping[str, Any]) -> EngineRun:
    """What such a document says; KeyError, TypeError or ValueError where it is none."""
    ttft = np.asarray(document["ttfts"], dtype=np.float64) * 1e3
    tokens = np.asarray(document["output_lens"], dtype=np.int64)
    if "latencies" in document:
        e2e = np.asarray(document["latencies"], dtype=np.float64) * 1e3
    else:
        e2e = ttft + 1e3 * np.array([sum(gaps) for gaps in document["itls"]], dtype=np.float64)
    seconds = float(document["duration"])
    count = len(ttft)
    # Files of older releases do not say when a request was sent; they keep the order.
    starts = document.get("start_times") or np.arange(count) * (seconds / max(1, count))
    begins = np.asarray(starts, dtype=np.float64)
    if not count == len(tokens) == len(e2e) == len(begins):
        raise ValueError(f"{count} ttfts, {len(tokens)} output_lens, {len(e2e)} latencies, {len(begins)} start_times")
    if not seconds > 0:
        raise ValueError(f"its duration is {seconds}")
    # A request that failed has no first token and no output.
    done = (ttft > 0) & (tokens > 0)
    if not done.any():
        raise ValueError("it has no request that succeeded")
    order = np.flatnonzero(done)[np.argsort(begins[done], kind="stable")]
    several = tokens[order] > 1
    tpot = np.full(len(order), np.nan)
    tpot[several] = (e2e - ttft)[order][several] / (tokens[order][several] - 1)
    begins = begins[order] - begins[order][0]
    return EngineRun(
        engine_id, begins, ttft[order], tpot, e2e[order], tokens[order], seconds, int(count - np.count_nonzero(done))
    )
