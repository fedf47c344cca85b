"""Swapping a pack of 276,000 samples under 40 streams of 50 steps/s: what the engines notice."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from performance.measure import LOAD_CORE, Spread, on_core, ratio_of_medians
from performance.packs import build_large_sampled_pack
from performance.servers import PERIOD_NS, Ours, play

ENGINES = 40
SWAP_EVERY_SECONDS = 0.5


def measure(folder: Path, *, pairs: int, seconds: float) -> dict[str, Any]:
    """p99 answer times of interleaved runs with and without swaps, and the ratio of their medians."""
    steps = int(seconds * 1e9 / PERIOD_NS)
    p99: dict[str, list[float]] = {"without": [], "with": []}
    longest: dict[str, list[float]] = {"without": [], "with": []}
    swaps: list[float] = []
    with Ours(folder / "ours") as ours:
        digests = []
        for seed in (1, 2):
            build_large_sampled_pack(folder / f"pack-{seed}", seed=seed)
            digests.append(ours.calls.upload(folder / f"pack-{seed}"))
        ours.calls.create(digests[0])
        script = ours.script(ENGINES, steps)
        for pair in range(pairs):
            # Whatever drifts during the run meets both kinds alike.
            for kind in ("without", "with") if pair % 2 else ("with", "without"):
                with _Swaps(ours, digests if kind == "with" else []) as swapping:
                    run = play(script, ours.target, ours.pids)
                assert run.kept_up, f"{run.end}: {run.headroom()}"
                latency = run.latency_ns / 1e6
                p99[kind].append(float(np.percentile(latency, 99)))
                longest[kind].append(float(latency.max()))
                swaps += swapping.seconds
    ratio, low, high = ratio_of_medians(p99["with"], p99["without"])
    return {
        "engines": ENGINES,
        "pairs": pairs,
        "swaps": len(swaps),
        "swap_ms": Spread.of([1e3 * value for value in swaps]),
        "p99_ms": {kind: Spread.of(values) for kind, values in p99.items()},
        "longest_ms": {kind: Spread.of(values) for kind, values in longest.items()},
        "ratio": ratio,
        "ratio_interval": [low, high],
        "p99_ms_of_pairs": p99,
    }


class _Swaps:
    """Activates the packs in turn on a thread of its own while the block runs."""

    def __init__(self, ours: Ours, digests: list[str]) -> None:
        self._ours, self._digests = ours, digests
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seconds: list[float] = []
        self.error: BaseException | None = None

    def __enter__(self) -> _Swaps:
        with on_core(LOAD_CORE):
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        number = 0
        while self._digests and not self._stop.wait(SWAP_EVERY_SECONDS):
            number += 1
            begin = time.perf_counter()
            try:
                self._ours.calls.activate(self._digests[number % 2])
            except BaseException as error:  # noqa: BLE001 - raised where the block ends
                self.error = error
                return
            self.seconds.append(time.perf_counter() - begin)
