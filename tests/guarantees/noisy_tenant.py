"""A tenant far over its step quota hardly moves another, and sees nothing of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guarantees.contract_tests import row_of_tests
from guarantees.row import Guarantee, Row, judged
from oracle_calls import TIMEOUT
from performance.load.client import LoadRun
from performance.load.stalls import MachineStalls
from performance.measure import LOAD_CORE, SERVER_CORE, ratio_of_medians
from performance.packs import build_leasable_pack
from performance.servers import PERIOD_NS, Ours, play
from step_oracle.v1 import experiment_pb2, tenant_pb2

TIMES_QUOTA = 20
# So many engines on a core that does their steps in this share of its time, fewer of both kinds on a slower one: a core
# that two tenants fill has nothing left to keep them apart with.
QUIET_ENGINES, NOISY_ENGINES = 20, 40
CORE_SHARE = 0.3
RATIO_BOUND = 1.2
_CALIBRATION_SECONDS = 3.0
_LEAD_SECONDS = 0.5
_PER_SECOND = 10**9 // PERIOD_NS


@dataclass(frozen=True)
class Sizes:
    pairs: int
    seconds: float


LONG = Sizes(pairs=40, seconds=2)
QUICK = Sizes(pairs=2, seconds=2)


def run(folder: Path, sizes: Sizes) -> list[Row]:
    matrix = row_of_tests(
        "no call with one tenant's token reads or lists anything of another",
        "every method with every credential, two tenants of the same names",
        "0 let through",
        "test_authorization.py",
    )
    return [_measured(folder, sizes), matrix]


def _measured(folder: Path, sizes: Sizes) -> Row:
    """Interleaved runs with and without the noisy tenant; the quiet one's answer times from due to answered.

    Stalls of the machine are as long as what is measured: what they met is left out, in both kinds of run alike.
    """
    build_leasable_pack(folder / "pack")
    steps = int(sizes.seconds * _PER_SECOND)
    runs: dict[bool, list[LoadRun]] = {False: [], True: []}
    marked: list[int] = []
    with (
        MachineStalls((SERVER_CORE, LOAD_CORE)) as stalls,
        Ours(folder / "ours") as ours,
        ThreadPoolExecutor(2) as pool,
    ):
        scale = min(1.0, CORE_SHARE / _share_of_all(ours, folder / "pack"))
        quiet_engines, noisy_engines = (max(1, round(most * scale)) for most in (QUIET_ENGINES, NOISY_ENGINES))
        noisy_steps = noisy_engines * _PER_SECOND
        names = []
        for tenant, quota in (("quiet", 0), ("noisy", noisy_steps // TIMES_QUOTA)):
            create = tenant_pb2.CreateTenantRequest(
                tenant_id=tenant, quota=tenant_pb2.TenantQuota(max_steps_per_second=quota)
            )
            ours.calls.tenants.CreateTenant(create, timeout=TIMEOUT)
            digest = ours.calls.upload(folder / "pack", tenant)
            names.append(str(ours.calls.create(digest, tenant=tenant).name))
        quiet = ours.script(quiet_engines, steps, experiments=names[:1])
        noisy = ours.script(noisy_engines, steps + int(2 * _LEAD_SECONDS * _PER_SECOND), experiments=names[1:])
        for pair in range(sizes.pairs):
            # Whatever drifts during the run meets both kinds alike.
            for is_noisy in (True, False) if pair % 2 else (False, True):
                beside = pool.submit(play, noisy, ours.target, ours.pids) if is_noisy else None
                looking = pool.submit(_marked, ours, names[1], sizes.seconds) if is_noisy else None
                time.sleep(_LEAD_SECONDS if is_noisy else 0)
                found = play(quiet, ours.target, ours.pids)
                _check(found)
                if beside is not None and looking is not None:
                    _check(beside.result())
                    marked.append(looking.result())
                runs[is_noisy].append(found)
    alone, beside_it = (_p99_ms(runs[kind], stalls) for kind in (False, True))
    ratio, low, high = ratio_of_medians(beside_it, alone)
    all_alone, all_beside = (_p99_ms(runs[kind], None) for kind in (False, True))
    core_alone, core_beside = (np.median([run.server_core for run in runs[kind]]) for kind in (False, True))
    return judged(
        f"a tenant at {TIMES_QUOTA} times its step quota moves another's p99 by less than 20 %",
        f"{sizes.pairs} interleaved pairs of {sizes.seconds:g} s; {quiet_engines} quiet engines, beside them "
        f"{noisy_engines} with {noisy_steps:,} steps/s of {noisy_steps // TIMES_QUOTA} allowed, "
        f"all answered (policy mark), at least {min(marked)} marked; the server at {core_beside:.2f} of its core, "
        f"{core_alone:.2f} without",
        f"{ratio:.2f} (95 % interval {low:.2f} to {high:.2f}); p99 {np.median(beside_it):.2f} ms beside it, "
        f"{np.median(alone):.2f} ms alone; {_left_out(runs, stalls)}: "
        f"{np.median(all_beside):.2f} and {np.median(all_alone):.2f} ms with all",
        f"< {RATIO_BOUND:g}",
        holds=ratio < RATIO_BOUND and min(marked) == noisy_engines,
    )


def _p99_ms(runs: Sequence[LoadRun], stalls: MachineStalls | None) -> list[float]:
    """Of each run; without what stalls of the machine met."""
    kept = [run.latency_ns if stalls is None else run.latency_ns[~stalls.met(run)] for run in runs]
    return [float(np.percentile(latencies, 99)) / 1e6 for latencies in kept]


def _left_out(runs: Mapping[bool, Sequence[LoadRun]], stalls: MachineStalls) -> str:
    if not stalls.is_watching:
        return "stalls of the machine are in it (no real-time priority to see them with)"
    beside, alone = (np.mean(np.concatenate([stalls.met(run) for run in runs[kind]])) for kind in (True, False))
    return f"without the {beside:.1%} and {alone:.1%} of steps that a stall of the machine met"


def _share_of_all(ours: Ours, pack: Path) -> float:
    """Share of its core that the server needs for as many engines as there may be of both kinds."""
    ours.calls.create(ours.calls.upload(pack))
    script = ours.script(QUIET_ENGINES + NOISY_ENGINES, int(_CALIBRATION_SECONDS * _PER_SECOND))
    return play(script, ours.target, ours.pids).server_core


def _check(run: LoadRun) -> None:
    assert run.kept_up, f"{run.end}: {run.headroom()}"


def _marked(ours: Ours, experiment: str, after_seconds: float) -> int:
    """Engines of the noisy tenant that are told to be over the quota, while they take steps."""
    time.sleep(after_seconds)
    request = experiment_pb2.ListEnginesRequest(parent=experiment)
    engines = ours.calls.experiments.ListEngines(request, timeout=TIMEOUT).engines
    return sum(engine.degraded for engine in engines)


GUARANTEE = Guarantee(run, LONG, QUICK)
