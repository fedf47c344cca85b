"""The sections of the benchmark that need vLLM: the engine thread, held steps, the share of leased steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from environments import REPOSITORY, VLLM_VERSIONS, vllm_environment
from performance import engine_thread, held_step, lease_share
from performance.measure import NotMeasured

VERSION = VLLM_VERSIONS[-1]


def measure_engine_thread() -> dict[str, Any]:
    """What a step costs the engine thread in our code."""
    return {"vllm": VERSION, "rows": engine_thread.measure(VERSION, REPOSITORY, 1000)}


def measure_held_step(folder: Path, *, seconds: float, rounds: int) -> dict[str, Any]:
    """How well one engine holds a step at each concurrency, and two beside each other at 8 requests each."""
    found: dict[str, Any] = {"vllm": VERSION}
    for name, engines, concurrencies in (("one_engine", 1, held_step.CONCURRENCIES), ("two_engines", 2, (8,))):
        (folder / name).mkdir()
        all_rounds = concurrencies * rounds
        found[name] = held_step.measure(
            vllm_environment(VERSION), folder / name, "hybrid", all_rounds, seconds, engines
        )
    return found


def measure_lease_share(folder: Path, *, seconds: int) -> dict[str, Any]:
    """Which share of the steps of Azure's traces needs no message."""
    data = Path(os.environ.get("STEP_ORACLE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (data / "workloads").is_dir():
        raise NotMeasured(f"no traces in {data}; set STEP_ORACLE_DATA")
    return {"vllm": VERSION, "rows": list(lease_share.measure(data, folder, VERSION, seconds))}
