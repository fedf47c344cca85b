"""Server CPU per step of every stack, one message in flight on each of 64 connections, in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from performance.load.sequences import mixed_share
from performance.measure import Spread, interleaved, ratios
from performance.packs import build_large_sampled_pack, build_leasable_pack
from performance.servers import (
    SEQUENCES,
    Ours,
    other_server,
    play,
    raw_script,
    steps_of,
    stream_script,
    unary_script,
)

ENGINES = 64
STRAIGHTFORWARD = "straightforward: sync unary, dict and sorted()"
STOCK_UNARY = "our kernel behind stock unary calls"
STREAMS_SAMPLED = "our streams, no leases, sampled pack"
STREAMS = "our streams, no leases, composed pack"
LEASES = "our streams, leases, composed pack"
BATCH = "… no leases, server under chrt --batch 0"
BATCH_LEASES = "… leases, server under chrt --batch 0"
CONSTANT = "grpc.aio stream, constant answer"
RAW_SOCKET = "bare socket on uvloop, constant answer"


def measure(folder: Path, *, rounds: int, quick: bool) -> dict[str, Any]:
    """Median and range of us per step, and the ratios of the rounds."""
    steps = 100 if quick else 300
    leased_steps = 10 * steps
    with ExitStack() as stack:
        build_large_sampled_pack(folder / "sampled")
        build_leasable_pack(folder / "composed")
        sampled = stack.enter_context(Ours(folder / "ours-sampled"))
        sampled.calls.create(sampled.calls.upload(folder / "sampled"))
        composed = stack.enter_context(Ours(folder / "ours-composed"))
        composed.calls.create(composed.calls.upload(folder / "composed"))
        batch = stack.enter_context(Ours(folder / "ours-batch", batch=True))
        batch.calls.create(batch.calls.upload(folder / "composed"))
        targets = {name: f"unix:{folder}/{name}" for name in ("straightforward", "constant", "raw")}
        pids = {
            "straightforward": stack.enter_context(
                other_server("straightforward.py", str(folder / "sampled"), target=targets["straightforward"])
            ),
            "constant": stack.enter_context(other_server("floors.py", "stream", target=targets["constant"])),
            "raw": stack.enter_context(other_server("floors.py", "raw", target=targets["raw"])),
        }

        def cost(script: Any, target: str, pid: tuple[int, ...], all_steps: int) -> Callable[[], float]:
            def run() -> float:
                return play(script, target, pid, closed=True).server_cpu_ns / all_steps / 1e3

            return run

        def other(name: str, script: Any, count: int) -> Callable[[], float]:
            return cost(script, targets[name], (pids[name],), ENGINES * count)

        def streams(ours: Ours, count: int, *, leases: bool) -> Callable[[], float]:
            return cost(ours.script(ENGINES, count, leases=leases), ours.target, ours.pids, ENGINES * count)

        few = 50 if quick else 100
        measures = {
            STRAIGHTFORWARD: other("straightforward", unary_script(ENGINES, few), few),
            STOCK_UNARY: cost(unary_script(ENGINES, steps // 2), sampled.target, sampled.pids, ENGINES * (steps // 2)),
            STREAMS_SAMPLED: streams(sampled, steps, leases=False),
            STREAMS: streams(composed, steps, leases=False),
            LEASES: streams(composed, leased_steps, leases=True),
            BATCH: streams(batch, steps, leases=False),
            BATCH_LEASES: streams(batch, leased_steps, leases=True),
            CONSTANT: other("constant", stream_script(ENGINES, steps), steps),
            RAW_SOCKET: other("raw", raw_script(ENGINES, 5 * steps), 5 * steps),
        }
        found = interleaved(rounds, measures)
        leasable, of_all = composed.lease_share(leased_steps)
    mixed = [mixed_share(list(steps_of(n, leased_steps))) for n in range(SEQUENCES)]
    return {
        "engines": ENGINES,
        "mixed_share": sum(mixed) / len(mixed),
        "leased_share_of_leasable": leasable,
        "leased_share_of_all": of_all,
        "us_per_step": {name: Spread.of(values) for name, values in found.items()},
        "straightforward_over": {
            name: ratios(found[STRAIGHTFORWARD], values) for name, values in found.items() if name != STRAIGHTFORWARD
        },
        "over_raw_socket": {name: ratios(values, found[RAW_SOCKET]) for name, values in found.items()},
    }
