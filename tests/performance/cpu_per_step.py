"""Server CPU per step of every stack, in turn: one message in flight on each of 64 connections, and ours paced as well.

Every server is measured under SCHED_BATCH, as ours starts, and under SCHED_OTHER: what is divided is from one policy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from performance.load.script import Script
from performance.load.sequences import mixed_share
from performance.measure import Spread, interleaved, ratios, set_policy
from performance.packs import build_large_sampled_pack, build_leasable_pack
from performance.servers import (
    PERIOD_NS,
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
# So many engines of 50 steps/s keep a core from a quarter to a half busy.
PACED_LEASED, PACED_UNLEASED = 600, 100
STRAIGHTFORWARD = "straightforward: sync unary, dict and sorted()"
STOCK_UNARY = "our kernel behind stock unary calls"
SAMPLE_STEP = "our SampleStep"
STREAMS_SAMPLED = "our streams, no leases, sampled pack"
STREAMS = "our streams, no leases, composed pack"
LEASES = "our streams, leases, composed pack"
PACED = f"our streams, no leases, paced: {PACED_UNLEASED} engines of 50 steps/s"
PACED_LEASES = f"our streams, leases, paced: {PACED_LEASED} engines of 50 steps/s"
CONSTANT = "grpc.aio stream, constant answer"
RAW_SOCKET = "bare socket on uvloop, constant answer"
POLICIES = {"batch": os.SCHED_BATCH, "other": os.SCHED_OTHER}

Measures = dict[str, Callable[[], float]]


def measure(folder: Path, *, rounds: int, quick: bool) -> dict[str, Any]:
    """Median and range of us per step, and the ratios of the rounds, under each policy."""
    with ExitStack() as stack:
        build_large_sampled_pack(folder / "sampled")
        build_leasable_pack(folder / "composed")
        sampled, composed = (stack.enter_context(Ours(folder / f"ours-{name}")) for name in ("sampled", "composed"))
        for ours, name in ((sampled, "sampled"), (composed, "composed")):
            ours.calls.create(ours.calls.upload(folder / name))
        targets = {name: f"unix:{folder}/{name}.sock" for name in ("straightforward", "unary", "stream", "raw")}
        pids = {
            name: stack.enter_context(other_server(*command, target=targets[name]))
            for name, command in (
                ("straightforward", ("straightforward.py", str(folder / "sampled"))),
                ("unary", ("floors.py", "unary", str(folder / "sampled"))),
                ("stream", ("floors.py", "stream")),
                ("raw", ("floors.py", "raw")),
            )
        }

        def cost(script: Script, target: str, pid: int, steps: int, *, paced: bool = False) -> Callable[[str], float]:
            def run(policy: str) -> float:
                set_policy(pid, POLICIES[policy])
                done = play(script, target, (pid,), closed=not paced)
                return done.server_cpu_ns / (len(script.engines) * steps) / 1e3

            return run

        def other(name: str, script: Script, steps: int) -> Callable[[str], float]:
            return cost(script, targets[name], pids[name], steps)

        def streams(
            ours: Ours, engines: int, steps: int, *, leases: bool, paced: bool = False
        ) -> Callable[[str], float]:
            script = ours.script(engines, steps, leases=leases)
            return cost(script, ours.target, ours.process.pid, steps, paced=paced)

        steps, few = (100, 50) if quick else (300, 100)
        leased_steps, paced_steps = 10 * steps, (1 if quick else 3) * 1_000_000_000 // PERIOD_NS
        unary_steps = steps // 2
        stacks = {
            STRAIGHTFORWARD: other("straightforward", unary_script(ENGINES, few), few),
            STOCK_UNARY: other("unary", unary_script(ENGINES, unary_steps), unary_steps),
            SAMPLE_STEP: cost(unary_script(ENGINES, unary_steps), sampled.target, sampled.process.pid, unary_steps),
            STREAMS_SAMPLED: streams(sampled, ENGINES, steps, leases=False),
            STREAMS: streams(composed, ENGINES, steps, leases=False),
            LEASES: streams(composed, ENGINES, leased_steps, leases=True),
            PACED: streams(composed, PACED_UNLEASED, paced_steps, leases=False, paced=True),
            PACED_LEASES: streams(composed, PACED_LEASED, paced_steps, leases=True, paced=True),
            CONSTANT: other("stream", stream_script(ENGINES, steps), steps),
            RAW_SOCKET: other("raw", raw_script(ENGINES, 5 * steps), 5 * steps),
        }
        found = interleaved(rounds, _under_each_policy(stacks))
        leasable, of_all = composed.lease_share(leased_steps)
    mixed = [mixed_share(list(steps_of(n, leased_steps))) for n in range(SEQUENCES)]
    return {
        "engines": ENGINES,
        "mixed_share": sum(mixed) / len(mixed),
        "leased_share_of_leasable": leasable,
        "leased_share_of_all": of_all,
        **{policy: _figures({name: found[_key(name, policy)] for name in stacks}) for policy in POLICIES},
    }


def _under_each_policy(stacks: dict[str, Callable[[str], float]]) -> Measures:
    """A server once under each policy, one right after the other."""

    def bound(run: Callable[[str], float], policy: str) -> Callable[[], float]:
        return lambda: run(policy)

    return {_key(name, policy): bound(run, policy) for name, run in stacks.items() for policy in POLICIES}


def _key(name: str, policy: str) -> str:
    return f"{name}, {policy}"


def _figures(found: dict[str, list[float]]) -> dict[str, Any]:
    """What was found under one policy, and its ratios."""
    return {
        "us_per_step": {name: Spread.of(values) for name, values in found.items()},
        "straightforward_over": {
            name: ratios(found[STRAIGHTFORWARD], values) for name, values in found.items() if name != STRAIGHTFORWARD
        },
        "over_raw_socket": {name: ratios(values, found[RAW_SOCKET]) for name, values in found.items()},
    }
