"""kill -9 at random moments of uploads, activations, changes of tenants and steps: nothing acknowledged is lost."""

from __future__ import annotations

import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import grpc
import numpy as np

from builders import build_constant_pack
from guarantees.row import Guarantee, Row, judged
from guarantees.shim_engines import ShimEngine, ShimFleet
from oracle_calls import EXPERIMENT, TIMEOUT, Calls
from oracle_process import OracleFailed, OracleProcess
from oracle_server.errors import OracleError
from oracle_server.rpc.recompute import recompute_from
from step_oracle.v1 import experiment_pb2, pack_pb2, tenant_pb2

RECOVERY_BOUND_SECONDS = 1.0
# Of each server; the moment of a kill is drawn between these.
_KILL_AFTER_SECONDS = (0.0, 0.5)
_STORED_PACKS = 12
_TENANTS = 6
_BUDGET_SECONDS = 60.0


@dataclass(frozen=True)
class Sizes:
    kills: int
    # Servers that are killed side by side, each with a folder of its own.
    servers: int
    engines: int
    seed: int = 20


LONG = Sizes(kills=500, servers=2, engines=3)
QUICK = Sizes(kills=6, servers=1, engines=3)


@dataclass
class Acknowledged:
    """What one client was told is done, and what it was not told of yet. Written by that client's thread."""

    # Digest or tenant -> what it is.
    present: dict[str, object] = field(default_factory=dict)
    # The one change whose answer did not come: name, what it is after it (None: gone).
    unsure: tuple[str, object] | None = None

    def acknowledge(self) -> None:
        """The answer has come."""
        assert self.unsure is not None
        name, value = self.unsure
        if value is None:
            del self.present[name]
        else:
            self.present[name] = value
        self.unsure = None

    def problems(self, kind: str, stored: dict[str, object]) -> list[str]:
        """What is stored and ought not to be, or the other way round; then what is stored is what is known."""
        found = []
        for name in sorted(self.present.keys() | stored.keys()):
            allowed = [self.present.get(name)]
            if self.unsure is not None and self.unsure[0] == name:
                allowed.append(self.unsure[1])
            if stored.get(name) not in allowed:
                found.append(f"{kind} {name}: {stored.get(name)} is stored, {allowed} was acknowledged")
        self.present, self.unsure = stored, None
        return found


@dataclass
class Killed:
    """What came of the kills of one server."""

    kills: int = 0
    acknowledged: int = 0
    problems: list[str] = field(default_factory=list)
    ready_seconds: list[float] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)
    # Answers recomputed after the last kill: equal, different, left out; and failed engines.
    equal: int = 0
    different: int = 0
    steps: int = 0
    failures: list[str] = field(default_factory=list)


class Victim:
    """One server, the clients that change what it holds, and the engines that step through all of its deaths."""

    def __init__(self, folder: Path, kills: int, engines: int, seed: int) -> None:
        self._folder, self._kills, self._engines = folder, kills, engines
        # The moments of the kills are the same for a seed, whatever the clients draw on their threads.
        self._moments, self._draw = random.Random(seed), random.Random(seed)
        self._packs, self._tenants = Acknowledged(), Acknowledged()
        self._generation, self._attempted, self._read_up_to = 1, 1, 1
        self._number = 0
        self.found = Killed()

    def run(self) -> Killed:
        traces = self._folder / "traces"
        traces.mkdir(parents=True)
        base_folder = self._folder / "base"
        self._base = build_constant_pack(base_folder, latency_ns=1_000_000)
        with OracleProcess(self._folder / "state") as server:
            self._server = server
            with Calls(server.target) as calls:
                calls.upload(base_folder)
                calls.create(self._base, seed=1)

            def engine(number: int) -> ShimEngine:
                name, target = f"vllm-{number}", server.target
                return ShimEngine(
                    target,
                    name,
                    traces,
                    seed=number,
                    period_seconds=0.02,
                    # The first answers from leases meanwhile.
                    leases=number == 0,
                    budget_seconds=_BUDGET_SECONDS,
                )

            with ShimFleet(self._engines, engine) as fleet:
                for _ in range(self._kills):
                    self._kill_once(fleet)
                fleet.go_on(3)
            report = recompute_from(server.state_dir, sorted(traces.iterdir()))
        found = self.found
        found.equal, found.different = report.equal, report.different + report.skipped
        found.steps, found.failures = fleet.steps, fleet.failures
        return found

    def _kill_once(self, fleet: ShimFleet) -> None:
        """Clients change what they can, the server is killed at a moment that is drawn; what it then has is read."""
        stop = threading.Event()
        clients = [self._change_packs, self._activate, self._change_tenants]
        threads = [threading.Thread(target=self._until_killed, args=(client, stop)) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(self._moments.uniform(*_KILL_AFTER_SECONDS))
        self._server.kill()
        stop.set()
        for thread in threads:
            thread.join()
        self.found.kills += 1
        begin = time.monotonic()
        try:
            self._server.start()
        except OracleFailed as error:
            self.found.problems.append(f"it does not start: {error}"[:600])
            raise
        ready = time.monotonic()
        self.found.ready_seconds.append(ready - begin)
        self.found.problems += self._read_back()
        self.found.recovery_seconds.append(_first_answer(fleet.engines[1:], begin) - ready)

    def _until_killed(self, change: Callable[[Calls], None], stop: threading.Event) -> None:
        with Calls(self._server.target) as calls:
            while not stop.is_set():
                try:
                    change(calls)
                except (grpc.RpcError, OracleError) as error:
                    if not stop.wait(2.0):
                        # Nobody had killed it.
                        self.found.problems.append(f"refused while it ran: {error!r}"[:300])
                    return
                self.found.acknowledged += 1

    def _change_packs(self, calls: Calls) -> None:
        self._number += 1
        packs = self._packs
        if len(packs.present) > _STORED_PACKS:
            digest = self._draw.choice(sorted(packs.present))
            packs.unsure = (digest, None)
            name = f"tenants/default/packs/{digest}"
            calls.packs.DeletePack(pack_pb2.DeletePackRequest(name=name), timeout=TIMEOUT)
        else:
            folder = self._folder / f"pack-{self._number}"
            digest = build_constant_pack(folder, latency_ns=2_000_000 + self._number)
            packs.unsure = (digest, True)
            calls.upload(folder)
            shutil.rmtree(folder)
        packs.acknowledge()

    def _activate(self, calls: Calls) -> None:
        self._attempted = self._generation + 1
        response = calls.activate(self._base, seed=self._attempted)
        self._generation = response.experiment.generation

    def _change_tenants(self, calls: Calls) -> None:
        """One of a few tenants, each known as (engines, issued, revoked), is created, changed or deleted."""
        tenants, services = self._tenants, calls.tenants
        names = sorted(tenants.present)
        if len(names) < _TENANTS:
            name = f"tenants/t{len(names)}-{time.monotonic_ns()}"
            tenants.unsure = (name, (1, 0, 0))
            create = tenant_pb2.CreateTenantRequest(
                tenant_id=name.removeprefix("tenants/"), quota=tenant_pb2.TenantQuota(max_engines=1)
            )
            services.CreateTenant(create, timeout=TIMEOUT)
            tenants.acknowledge()
            return
        name = self._draw.choice(names)
        known = tenants.present[name]
        assert isinstance(known, tuple)
        engines, issued, revoked = known
        kind = self._draw.randrange(8)
        if kind == 0:
            tenants.unsure = (name, None)
            services.DeleteTenant(tenant_pb2.DeleteTenantRequest(name=name), timeout=TIMEOUT)
        elif kind < 3 and revoked < issued:
            tenants.unsure = (name, (engines, issued, revoked + 1))
            revoke = tenant_pb2.RevokeTokenRequest(name=f"{name}/tokens/{revoked + 1}")
            services.RevokeToken(revoke, timeout=TIMEOUT)
        elif kind < 5:
            tenants.unsure = (name, (engines, issued + 1, revoked))
            issue = tenant_pb2.IssueTokenRequest(parent=name, scope=tenant_pb2.TOKEN_SCOPE_ENGINE)
            services.IssueToken(issue, timeout=TIMEOUT)
        else:
            tenants.unsure = (name, (engines + 1, issued, revoked))
            quota = tenant_pb2.TenantQuota(max_engines=engines + 1)
            services.UpdateTenant(tenant_pb2.UpdateTenantRequest(name=name, quota=quota), timeout=TIMEOUT)
        tenants.acknowledge()

    def _read_back(self) -> list[str]:
        """What the server has after its start, against what was acknowledged before; every sentence is a problem."""
        with Calls(self._server.target) as calls:
            packs = dict.fromkeys(_packs(calls), True)
            base = packs.pop(self._base, None)
            problems = [] if base else [f"the pack that answers, {self._base}, is gone"]
            problems += self._packs.problems("pack", dict(packs))
            problems += self._tenants.problems("tenant", _tenants(calls))
            problems += _folder_problems(self._server.state_dir, {self._base, *packs})
            request = experiment_pb2.GetExperimentRequest(name=EXPERIMENT)
            experiment = calls.experiments.GetExperiment(request, timeout=TIMEOUT).experiment
            oldest, generations = self._history(calls, experiment.generation)
        if experiment.generation not in (self._generation, self._attempted):
            problems.append(
                f"generation {experiment.generation}, acknowledged {self._generation}, tried {self._attempted}"
            )
        numbers = [record.generation for record in generations]
        if numbers != list(range(experiment.generation, oldest - 1, -1)):
            problems.append(f"the history has a hole below generation {experiment.generation}")
        if any(record.binding.seed != record.generation for record in generations):
            problems.append("a generation has the binding of another")
        self._generation = experiment.generation
        return problems

    def _history(self, calls: Calls, newest: int) -> tuple[int, list[experiment_pb2.GenerationRecord]]:
        """Back to the one that was the newest after the kill before, its number first; after the last kill all."""
        oldest = 1 if self.found.kills == self._kills else min(self._read_up_to, newest)
        self._read_up_to = newest
        request = experiment_pb2.ListGenerationsRequest(name=EXPERIMENT, page_size=min(1000, newest - oldest + 1))
        records = calls.client.pages(calls.experiments.ListGenerations, request, "generations")
        return oldest, list(islice(records, newest - oldest + 1))


def _packs(calls: Calls) -> list[str]:
    request = pack_pb2.ListPacksRequest(parent="tenants/default", page_size=1000)
    return [pack.digest for pack in calls.client.pages(calls.packs.ListPacks, request, "packs")]


def _tenants(calls: Calls) -> dict[str, object]:
    found: dict[str, object] = {}
    request = tenant_pb2.ListTenantsRequest(page_size=1000)
    for tenant in calls.client.pages(calls.tenants.ListTenants, request, "tenants"):
        if tenant.name != "tenants/default":
            tokens = calls.tenants.ListTokens(tenant_pb2.ListTokensRequest(parent=tenant.name), timeout=TIMEOUT).tokens
            revoked = sum(token.HasField("revoke_time") for token in tokens)
            found[tenant.name] = (tenant.quota.max_engines, len(tokens), revoked)
    return found


def _folder_problems(state_dir: Path, digests: set[str]) -> list[str]:
    """A damaged database, half a pack, a folder that no row names."""
    with sqlite3.connect(f"file:{state_dir / 'oracle.db'}?mode=ro", uri=True) as database:
        (said,) = database.execute("PRAGMA integrity_check").fetchone()
    database.close()
    problems = [] if said == "ok" else [f"the database is damaged: {said}"]
    expected = {digest.removeprefix("sha256:") for digest in digests}
    for name in ("packs", "compiled"):
        folders = {path.name for path in (state_dir / name).iterdir()}
        if folders != expected:
            problems.append(f"{name}/ differs from the rows by {sorted(folders ^ expected)}")
    if left := sorted(path.name for path in (state_dir / "incoming").iterdir()):
        problems.append(f"incoming/ still has {left}")
    return problems


def _first_answer(engines: list[ShimEngine], killed: float) -> float:
    """When the last of the engines had its first answer from the server that was started after that moment."""
    end = time.monotonic() + _BUDGET_SECONDS
    firsts = []
    for engine in engines:
        while not engine.answered_at or engine.answered_at[-1] < killed:
            if engine.failure is not None or time.monotonic() > end:
                return float("inf")
            time.sleep(0.005)
        firsts.append(next(at for at in engine.answered_at if at >= killed))
        del engine.answered_at[:-1]
    return max(firsts)


def run(folder: Path, sizes: Sizes) -> list[Row]:
    each = [sizes.kills // sizes.servers + (i < sizes.kills % sizes.servers) for i in range(sizes.servers)]
    victims = [
        Victim(folder / f"server-{i}", kills, sizes.engines, sizes.seed + i) for i, kills in enumerate(each) if kills
    ]
    with ThreadPoolExecutor(len(victims)) as pool:
        found = list(pool.map(Victim.run, victims))
    kills = sum(each.kills for each in found)
    problems = [problem for each in found for problem in each.problems]
    failures = [failure for each in found for failure in each.failures]
    steps, equal = sum(each.steps for each in found), sum(each.equal for each in found)
    different = sum(each.different for each in found)
    ready = np.array([value for each in found for value in each.ready_seconds])
    recovery = np.array([max(0.0, value) for each in found for value in each.recovery_seconds])
    done = f"{kills} kill -9 during uploads, deletions, activations, changes of tenants and tokens, steps"
    return [
        judged(
            "killed: nothing acknowledged is lost, no half pack, the store is clean",
            f"{done}; seed {sizes.seed}",
            f"{len(problems)} problems, {sum(each.acknowledged for each in found):,} changes acknowledged"
            + (f": {'; '.join(problems[:3])}" if problems else ""),
            "0",
            holds=not problems and kills == sizes.kills,
        ),
        judged(
            "killed: engines that go on lose no step, and every answer recomputes",
            f"{done}; {len(victims) * sizes.engines} engines",
            f"{steps:,} steps, {equal:,} equal, {different} different, {len(failures)} failed engines"
            + (f": {'; '.join(failures[:2])}" if failures else ""),
            "all equal",
            holds=equal == steps > 0 and not different and not failures,
        ),
        judged(
            "killed: from ready to the first answered step of each engine",
            f"{done}; ready {np.median(ready):.2f} s after the start of the process "
            f"(longest {ready.max():.2f}), {len(victims)} servers side by side",
            f"median {np.median(recovery):.2f} s, longest {recovery.max():.2f} s",
            f"<= {RECOVERY_BOUND_SECONDS:g} s",
            holds=bool(recovery.max() <= RECOVERY_BOUND_SECONDS) and len(recovery) == kills,
        ),
    ]


GUARANTEE = Guarantee(run, LONG, QUICK)
