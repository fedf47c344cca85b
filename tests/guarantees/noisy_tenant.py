"""A tenant far over its step quota hardly moves another, and sees nothing of it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guarantees.contract_tests import row_of_tests
from guarantees.row import Guarantee, Row, judged
from oracle_calls import TIMEOUT
from performance.load.client import LoadRun
from performance.measure import ratio_of_medians
from performance.packs import build_leasable_pack
from performance.servers import PERIOD_NS, Ours, play
from step_oracle.v1 import experiment_pb2, tenant_pb2

TIMES_QUOTA = 20
QUOTA_STEPS_PER_SECOND = 100
QUIET_ENGINES = 20
RATIO_BOUND = 1.2
_LEAD_SECONDS = 0.5
_PER_SECOND = 10**9 // PERIOD_NS


@dataclass(frozen=True)
class Sizes:
    pairs: int
    seconds: float


LONG = Sizes(pairs=12, seconds=6)
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
    """Interleaved runs with and without the noisy tenant; the quiet one's answer times from due to answered."""
    build_leasable_pack(folder / "pack")
    noisy_engines = TIMES_QUOTA * QUOTA_STEPS_PER_SECOND // _PER_SECOND
    steps = int(sizes.seconds * _PER_SECOND)
    p99: dict[bool, list[float]] = {False: [], True: []}
    marked: list[int] = []
    with Ours(folder / "ours") as ours, ThreadPoolExecutor(2) as pool:
        names = []
        for tenant, quota in (("quiet", 0), ("noisy", QUOTA_STEPS_PER_SECOND)):
            create = tenant_pb2.CreateTenantRequest(
                tenant_id=tenant, quota=tenant_pb2.TenantQuota(max_steps_per_second=quota)
            )
            ours.calls.tenants.CreateTenant(create, timeout=TIMEOUT)
            digest = ours.calls.upload(folder / "pack", tenant)
            names.append(str(ours.calls.create(digest, tenant=tenant).name))
        quiet = ours.script(QUIET_ENGINES, steps, experiments=names[:1])
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
                p99[is_noisy].append(float(np.percentile(found.latency_ns, 99)) / 1e6)
    ratio, low, high = ratio_of_medians(p99[True], p99[False])
    return judged(
        f"a tenant at {TIMES_QUOTA} times its step quota moves another's p99 by less than 20 %",
        f"{sizes.pairs} interleaved pairs of {sizes.seconds:g} s; {QUIET_ENGINES} quiet engines, beside them "
        f"{noisy_engines} with {TIMES_QUOTA * QUOTA_STEPS_PER_SECOND:,} steps/s of {QUOTA_STEPS_PER_SECOND} allowed, "
        f"all answered (policy mark), at least {min(marked)} marked",
        f"{ratio:.2f} (95 % interval {low:.2f} to {high:.2f}); p99 {np.median(p99[True]):.2f} ms beside it, "
        f"{np.median(p99[False]):.2f} ms alone",
        f"< {RATIO_BOUND:g}",
        holds=ratio < RATIO_BOUND and min(marked) == noisy_engines,
    )


def _check(run: LoadRun) -> None:
    assert run.kept_up, f"{run.end}: {run.headroom()}"


def _marked(ours: Ours, experiment: str, after_seconds: float) -> int:
    """Engines of the noisy tenant that are told to be over the quota, while they take steps."""
    time.sleep(after_seconds)
    request = experiment_pb2.ListEnginesRequest(parent=experiment)
    engines = ours.calls.experiments.ListEngines(request, timeout=TIMEOUT).engines
    return sum(engine.degraded for engine in engines)


GUARANTEE = Guarantee(run, LONG, QUICK)
