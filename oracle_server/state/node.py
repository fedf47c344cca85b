"""One server's state, opened from its folder: the database, the packs, the experiments."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from oracle_server.errors import DatabaseUnavailable, Starting, StoreFailed
from oracle_server.state import names
from oracle_server.state.attachment import Attachments
from oracle_server.state.credentials import Credentials
from oracle_server.state.database_file import DatabaseFile
from oracle_server.state.engines import EngineRecord
from oracle_server.state.experiments import Alone, Experiments, Followers, LiveExperiment
from oracle_server.state.kernels import warm_kernels
from oracle_server.state.pack_files import PackFiles
from oracle_server.state.pack_remote import PackRemote
from oracle_server.state.pack_supply import PackSupply
from oracle_server.state.packs import Packs
from oracle_server.state.principal import CALLER
from oracle_server.state.rates import StepRates
from oracle_server.state.records import Records
from oracle_server.state.store import Store, TenantRow
from oracle_server.state.tenants import Tenants
from oracle_server.state.together import Together

if TYPE_CHECKING:
    from oracle_server.state.replicas import Replicas

DATABASE = "oracle.db"


class Node:
    """Owns everything a server keeps. Built empty; nothing is answered before `open` has ended. Event loop only.

    Both clocks are arguments: `monotonic` in seconds, `now_ns` in nanoseconds since 1970. `followers` are the processes
    that answer from its generations, where it does not answer itself. With a `database` it is one of a fleet's servers,
    whose packs lie at `pack_remote`; without that its folder has them all. Made on the event loop.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
        followers: Followers | None = None,
        database: DatabaseFile | None = None,
        pack_remote: PackRemote | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._lock = _lock(state_dir)
        self._monotonic = monotonic
        self._supply = PackSupply(PackFiles(state_dir), pack_remote)
        self._ready = False
        own = followers or Alone()
        try:
            self._records, self.replicas = self._open_records(database, own)
        except BaseException:
            os.close(self._lock)
            raise
        self.followers = own if self.replicas is None else Together(own, self.replicas)
        self.experiments = Experiments(
            self._records, self._supply, monotonic=monotonic, now_ns=now_ns, followers=self.followers
        )
        self.attachments = Attachments(self.experiments, self._records, monotonic=monotonic)
        self.packs = Packs(self.experiments, self._records, self._supply, now_ns=now_ns)
        self.credentials = Credentials()
        self.rates = StepRates(self.experiments, monotonic=monotonic, followers=self.followers)
        self.tenants = Tenants(
            self.experiments, self._records, self.credentials, self.rates, now_ns=now_ns, followers=self.followers
        )
        if self.replicas is not None:
            self.attachments.server, self.attachments.place = self.replicas.server, self.replicas.place
            self.replicas.join(self.experiments, self.attachments, self.tenants)

    async def open(self, operator_hashes: Iterable[bytes] = ()) -> list[str]:
        """Bring packs, experiments and credentials into memory; the digests that had to be compiled anew."""
        await asyncio.to_thread(warm_kernels)
        digests = await self._records.call(self._records.store.digests)
        compiled = await asyncio.to_thread(
            self._supply.files.prepare, digests, may_lack=self._supply.remote is not None
        )
        await self.experiments.load()
        await self.tenants.load(operator_hashes)
        if self.replicas is not None:
            await self.replicas.open()
        self._ready = True
        return compiled

    async def close(self) -> None:
        """Let changes end and close the database; a `pack_remote` has been told before to end what it is at."""
        await self.packs.close()
        await self._supply.close()
        if self.replicas is not None:
            await self.replicas.close()
        await self._records.close()
        os.close(self._lock)

    def check_ready(self) -> None:
        """Starting before the server is ready."""
        if not self._ready:
            raise Starting("the server is starting; retry, or wait for its health to be SERVING")

    async def tenant(self, tenant: str) -> TenantRow:
        """The tenant, if it is the caller's; PermissionDenied, TenantNotFound.

        Every call asks for its tenant first, so this is where a name is compared with the credential. Starting before
        the server is ready.
        """
        CALLER.get().check_tenant(tenant)
        self.check_ready()
        if self.replicas is not None and not self.experiments.knows_tenant(tenant):
            await self.replicas.refresh()
        return self.experiments.tenant(tenant)

    async def tenant_of(self, experiment_name: str) -> TenantRow:
        """The tenant an experiment's name begins with, for calls of engines; also QuotaExceeded."""
        row = await self.tenant(names.parse_experiment(experiment_name, "experiment")[0])
        self.rates.check_tenant(row.tenant)
        await self.look_for(experiment_name)
        return row

    async def look_for(self, experiment_name: str) -> None:
        """Read what the other servers of a fleet changed, where this one does not know an experiment.

        DatabaseUnavailable: nobody can say now whether there is one.
        """
        if self.replicas is not None and self.experiments.get(experiment_name) is None:
            await self.replicas.refresh()

    async def catch_up(self, live: LiveExperiment, generation: int) -> None:
        """Get to a generation an engine has seen at another server of the fleet; StaleGeneration."""
        if self.replicas is not None and live.snapshot.generation < generation:
            # What the database does not tell now is told by the generation.
            with suppress(DatabaseUnavailable):
                await self.replicas.refresh()
        live.snapshot.check_generation(generation)

    def _open_records(self, database: DatabaseFile | None, own: Followers) -> tuple[Records, Replicas | None]:
        if database is None:
            return Records(Store.open(self._state_dir / DATABASE)), None
        # Only here: psycopg is in an extra.
        from oracle_server.state.postgres_database import PostgresDatabase
        from oracle_server.state.replicas import Replicas

        postgres = PostgresDatabase(database.url, alone=self._supply.remote is None)
        records = Records(Store(postgres))
        replicas = Replicas(records, postgres, database.url, records.store, own)
        records.turns = replicas
        return records, replicas

    def engines_of(self, live: LiveExperiment) -> list[EngineRecord]:
        """The engines of an experiment that are attached now."""
        now = self._monotonic()
        return [engine for engine in live.engines.values() if engine.is_live(now)]


def _lock(state_dir: Path) -> int:
    """The state folder has one writer; the lock goes with the process, however it ends."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreFailed(f"the state folder {state_dir} cannot be used: {error}; give another --state-dir") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreFailed(
            f"another server has the state folder {state_dir}; stop it or give another --state-dir"
        ) from error
    return descriptor
