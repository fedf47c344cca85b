"""A server under load and changes for a while: its memory and its file handles stay what they are after the warm-up."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guarantees.hot_swaps import binding_of, build_packs
from guarantees.row import Guarantee, Row, judged
from guarantees.shim_engines import ShimEngine, ShimFleet
from oracle_calls import Calls
from oracle_process import OracleProcess
from performance.measure import resident_bytes

SLOPE_BOUND = 2 << 20
_STUDENT_97_5 = 2.0


@dataclass(frozen=True)
class Sizes:
    warm_up_seconds: float
    seconds: float
    engines: int
    # Between two activations, and between two engines that come and go.
    every_seconds: float
    # Of the medians that the slope is fitted to.
    block_seconds: float
    # A run of seconds is all warm-up: it has this bound on what comes in all, none on the slope.
    growth_bytes: int = 0


# What a process takes once (pages that SQLite keeps, pools of grpc and the allocator) is there after 200,000 steps.
LONG = Sizes(warm_up_seconds=600, seconds=1200, engines=20, every_seconds=5, block_seconds=30)
QUICK = Sizes(warm_up_seconds=3, seconds=8, engines=10, every_seconds=0.5, block_seconds=1, growth_bytes=20 << 20)


def run(folder: Path, sizes: Sizes) -> list[Row]:
    traces, packs = folder / "traces", build_packs(folder)
    traces.mkdir()
    times, resident = [], []
    handles: list[int] = []
    arrays: list[int] = []
    with OracleProcess(folder / "state") as server, Calls(server.target) as calls:
        digests = [calls.upload(pack) for pack in packs]
        calls.create(digests[0], **binding_of(1))

        def engine(number: int) -> ShimEngine:
            name = f"vllm-{number}"
            return ShimEngine(server.target, name, traces, seed=number, period_seconds=0.05, leases=number % 2 == 0)

        stop = threading.Event()

        def change() -> None:
            number = 1
            while not stop.wait(sizes.every_seconds):
                number += 1
                calls.activate(digests[number % 3], **binding_of(number))
                with Calls(server.target) as own:
                    own.join(f"comes-and-goes-{number % 3}").close()

        changes = threading.Thread(target=change)
        with ShimFleet(sizes.engines, engine) as fleet:
            changes.start()
            time.sleep(sizes.warm_up_seconds)
            begin, before = time.monotonic(), fleet.steps
            while (now := time.monotonic() - begin) < sizes.seconds:
                times.append(now)
                resident.append(resident_bytes(server.pid))
                for found, own in zip((handles, arrays), handles_of(server.pid), strict=True):
                    found.append(own)
                time.sleep(sizes.block_seconds / 10)
            stop.set()
            changes.join()
            steps = fleet.steps - before
    slope, low, high = slope_per_hour(np.array(times), np.array(resident, dtype=np.float64), sizes.block_seconds)
    quarter = len(handles) // 4
    first, last = (int(np.median(part)) for part in (handles[:quarter], handles[-quarter:]))
    most = max(arrays[:quarter]), max(arrays[-quarter:])
    done = (
        f"{sizes.seconds / 60:.3g} minutes after {sizes.warm_up_seconds / 60:.2g} of warm-up: {sizes.engines} shim "
        f"clients, {steps:,} steps, an activation and an engine that comes and goes every {sizes.every_seconds:g} s"
    )
    grown = resident[-1] - resident[0]
    holds = grown < sizes.growth_bytes if sizes.growth_bytes else low <= 0 or high < SLOPE_BOUND
    bound = f"< {sizes.growth_bytes >> 20} MiB in all" if sizes.growth_bytes else "interval holds 0, or below 2 MiB/h"
    return [
        judged(
            "soak: resident memory does not grow",
            done,
            f"{slope / 2**20:+.2f} MiB/h (95 % interval {low / 2**20:+.2f} to {high / 2**20:+.2f}), "
            f"{grown / 2**20:+.1f} MiB in all, {resident[-1] / 2**20:.0f} MiB; {len(fleet.failures)} failed engines",
            bound,
            holds=holds and not fleet.failures,
        ),
        judged(
            "soak: file handles stay",
            done,
            f"{first} in the first quarter, {last} in the last (medians); beside them at most {most[0]} and {most[1]} "
            "arrays of the packs that are mapped at a time",
            "equal",
            holds=first == last and most[0] == most[1],
        ),
    ]


def handles_of(pid: int) -> tuple[int, int]:
    """(All but those of mapped packs, those: one per array, so their number is that of the packs in use)."""
    handles, arrays = 0, 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it is closed by now
            is_array = entry.readlink().suffix == ".npy"
            handles, arrays = handles + (not is_array), arrays + is_array
    return handles, arrays


def slope_per_hour(
    times: NDArray[np.float64], values: NDArray[np.float64], block_seconds: float
) -> tuple[float, float, float]:
    """Least squares through the medians of blocks, and its 95 % interval.

    Blocks, because samples next to each other are not independent. The residuals' correlation from block to block (an
    AR(1) process) widens the interval by sqrt((1 + r) / (1 - r)).
    """
    blocks = (times // block_seconds).astype(int)
    at = np.array([times[blocks == block].mean() for block in np.unique(blocks)])
    median = np.array([np.median(values[blocks == block]) for block in np.unique(blocks)])
    centred = at - at.mean()
    slope = float(centred @ median / (centred @ centred))
    residual = median - median.mean() - slope * centred
    spread = float(np.sqrt(residual @ residual / (len(at) - 2) / (centred @ centred)))
    power = float(residual @ residual)
    correlation = min(0.95, max(0.0, float(residual[1:] @ residual[:-1]) / power)) if power else 0.0
    half = _STUDENT_97_5 * spread * float(np.sqrt((1 + correlation) / (1 - correlation)))
    return 3600 * slope, 3600 * (slope - half), 3600 * (slope + half)


GUARANTEE = Guarantee(run, LONG, QUICK)
