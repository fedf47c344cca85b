"""The registry of the packs hangs, then is gone: engines are answered, uploads refused, and all comes back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from builders import build_composed_pack, build_constant_pack
from guarantees.row import Guarantee, Row, judged
from guarantees.shim_engines import ShimEngine, ShimFleet
from oracle_calls import Calls
from oracle_process import OracleProcess
from oracle_server.rpc.client import Refused
from oracle_server.rpc.recompute import recompute_from
from registry_server import RegistryProcess

REASON = ("UNAVAILABLE", "PACK_REGISTRY_UNAVAILABLE")


@dataclass(frozen=True)
class Sizes:
    """Seconds that the registry is stopped by SIGSTOP, then killed; each is at least one refusal long."""

    hangs: float
    gone: float
    engines: int


LONG = Sizes(hangs=30, gone=30, engines=20)
QUICK = Sizes(hangs=0, gone=3, engines=8)


def run(folder: Path, sizes: Sizes) -> list[Row]:
    traces = folder / "traces"
    traces.mkdir()
    build_composed_pack(folder / "first", ratios=[0.9, 1.0, 1.1])
    build_composed_pack(folder / "second", ratios=[0.8, 1.0, 1.3])
    with RegistryProcess(folder / "registry") as registry:
        arguments = ("--pack-registry", f"{registry.authority}/packs")
        with OracleProcess(folder / "state", arguments=arguments) as server, Calls(server.target) as calls:
            packs = [calls.upload(folder / name) for name in ("first", "second")]
            calls.create(packs[0], seed=7)

            def engine(number: int) -> ShimEngine:
                return ShimEngine(
                    server.target, f"vllm-{number}", traces, seed=number, period_seconds=0.02, leases=number % 2 == 0
                )

            with ShimFleet(sizes.engines, engine) as fleet:
                fleet.go_on(5)
                before, began = fleet.steps, time.monotonic()
                refused: list[tuple[str, str]] = []
                activations = 0
                for stop, seconds in ((registry.pause, sizes.hangs), (registry.stop, sizes.gone)):
                    end = time.monotonic() + seconds
                    if seconds:
                        stop()
                    while time.monotonic() < end:
                        build_constant_pack(folder / f"new-{len(refused)}", latency_ns=len(refused) + 1)
                        refused.append(_reason(calls, folder / f"new-{len(refused)}"))
                        # Packs that are here are activated all the same.
                        calls.activate(packs[activations % 2], seed=7)
                        activations += 1
                        fleet.go_on(5)
                stopped = time.monotonic() - began
                during = fleet.steps - before
                registry.start()
                stored = [calls.upload(folder / f"new-{number}") for number in range(len(refused))]
                calls.activate(stored[-1], seed=7)
                fleet.go_on(5)
        kept = len(registry.tags("packs"))
        report = recompute_from(server.state_dir, sorted(traces.iterdir()))
    wrong = [reason for reason in refused if reason != REASON]
    failures = fleet.failures
    holds = (
        not failures
        and not wrong
        and bool(refused)
        and report.equal == fleet.steps
        and not report.different
        and kept == len(stored) + len(packs)
    )
    return [
        judged(
            "the registry of the packs stopped: engines are answered, uploads refused, all comes back",
            f"{stopped:.0f} s by SIGSTOP and kill; {sizes.engines} shim clients, {activations} activations of packs "
            f"that are here, {len(refused)} uploads, each once more afterwards",
            f"{during:,} steps meanwhile, {len(failures)} engines failed, {report.equal:,} answers equal, "
            f"{report.different} different; {len(refused) - len(wrong)} uploads refused with the reason, "
            f"{len(stored)} stored after" + (f"; {failures[:2]} {wrong[:2]}" if failures or wrong else ""),
            "0 failed; all uploads refused, all stored after",
            holds=holds,
        )
    ]


def _reason(calls: Calls, pack: Path) -> tuple[str, str]:
    try:
        calls.upload(pack)
    except Refused as error:
        return error.code, error.reason
    return ("OK", "")


GUARANTEE = Guarantee(run, LONG, QUICK)
