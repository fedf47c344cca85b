"""Experiments: create, activate, roll back, watch, delete.

Every change is on disk before the snapshot in memory flips, and the flip is one assignment: a step reads `snapshot`
once, so no answer mixes two generations.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from oracle_server.errors import (
    Draining,
    ExperimentExists,
    ExperimentInUse,
    ExperimentNotFound,
    GenerationConflict,
    GenerationNotFound,
    InvalidArgument,
    OracleError,
    PackNotFound,
    QuotaExceeded,
    StaleGeneration,
    TenantNotFound,
)
from oracle_server.state import binding as bindings
from oracle_server.state import names
from oracle_server.state.binding import Binding
from oracle_server.state.credentials import Admission
from oracle_server.state.engines import EngineRecord, check_activation
from oracle_server.state.pack_supply import PackSupply
from oracle_server.state.records import Records
from oracle_server.state.shadow import Comparison, ShadowBook, summed
from oracle_server.state.snapshot import LoadedPack, Snapshot
from oracle_server.state.store import LOCAL_AUTHOR, Author, ExperimentRow, GenerationRow, Store, TenantRow

WATCH_BATCH = 100
TENANTS_BATCH = 1000

_log = logging.getLogger("step_oracle.experiments")


class LiveExperiment:
    """An experiment in memory. Written by the event loop only; `snapshot` is what steps are answered from."""

    __slots__ = (
        "changed",
        "create_time_ns",
        "current",
        "deleted",
        "engines",
        "experiment",
        "name",
        "rated_steps",
        "sampled_elsewhere",
        "sampled_steps",
        "shadows",
        "snapshot",
        "tenant",
        "watches",
    )

    def __init__(self, row: ExperimentRow, snapshot: Snapshot) -> None:
        self.tenant = row.tenant
        self.experiment = row.experiment
        self.name = names.experiment_name(row.tenant, row.experiment)
        self.create_time_ns = row.create_time_ns
        self.current = row.current
        self.snapshot = snapshot
        self.engines: dict[str, EngineRecord] = {}
        # What this process compared; other processes have their own.
        self.shadows = ShadowBook()
        self.deleted = False
        # Steps answered by SampleStep, here and at other servers of the fleet, and how many there were at the last look
        # at the tenant's rate.
        self.sampled_steps = self.sampled_elsewhere = self.rated_steps = 0
        # Open WatchExperiment calls.
        self.watches = 0
        # Replaced at every change; whoever waits takes the event first and looks at the state after.
        self.changed = asyncio.Event()

    def flip(self, record: GenerationRow, snapshot: Snapshot) -> None:
        """Answer from another generation from the next step on, and tell every open stream."""
        self.current = record
        self.snapshot = snapshot
        for engine in self.engines.values():
            if engine.stream is not None:
                engine.stream.announce(record.generation)
        self.wake()

    def wake(self) -> None:
        """Let every watcher look again."""
        event, self.changed = self.changed, asyncio.Event()
        event.set()


@dataclass(frozen=True, slots=True)
class Activation:
    """What an activation did, or would have done."""

    record: GenerationRow
    warnings: tuple[str, ...]


class Followers(Protocol):
    """Other processes that answer steps from the same generations."""

    async def prepare(self, digests: Sequence[str]) -> None:
        """Map these packs, so that `follow` need not wait for the disk; the OracleError of one that cannot."""

    async def follow(self, row: ExperimentRow) -> None:
        """Answer from this generation. At the return nobody answers from an older one. Never fails."""

    async def forget(self, name: str) -> None:
        """Answer for this experiment no more. Never fails."""

    async def count(self) -> None:
        """Add what the engines did elsewhere to their records."""

    async def admit(self, admission: Admission) -> None:
        """Answer these callers, and end what was opened by others. Never fails."""

    async def comparisons(self, name: str) -> Sequence[Sequence[Comparison]]:
        """What each compared of an experiment's steps with its shadow packs."""


class Alone:
    """No other process: this one answers all steps."""

    async def prepare(self, digests: Sequence[str]) -> None:
        """Nothing to do."""

    async def follow(self, row: ExperimentRow) -> None:
        """Nothing to do."""

    async def forget(self, name: str) -> None:
        """Nothing to do."""

    async def count(self) -> None:
        """Nothing to do."""

    async def admit(self, admission: Admission) -> None:
        """Nothing to do."""

    async def comparisons(self, name: str) -> Sequence[Sequence[Comparison]]:
        """Nothing to add."""
        return ()


class Experiments:
    """Owns every experiment in memory. Event loop only."""

    def __init__(
        self,
        records: Records,
        supply: PackSupply,
        *,
        monotonic: Callable[[], float],
        now_ns: Callable[[], int],
        followers: Followers,
    ) -> None:
        self._records = records
        self._supply = supply
        self._followers = followers
        self._monotonic = monotonic
        self._now_ns = now_ns
        self._live: dict[str, LiveExperiment] = {}
        self._tenants: dict[str, TenantRow] = {}
        # Generations another server of the fleet has made current and whose packs cannot be had here, by name.
        self.behind: dict[str, ExperimentRow] = {}
        self._draining = False

    async def load(self) -> None:
        """Bring tenants and stored experiments into memory, their packs mapped and their kernels compiled.

        Packs that are neither here nor to be had are left out; `complete` brings them.
        """
        after = ""
        while tenants := await self._records.call(self._records.store.tenants, after, TENANTS_BATCH):
            self._tenants |= {row.tenant: row for row in tenants}
            after = tenants[-1].tenant
        rows = await self._records.call(self._records.store.experiments)
        snapshots = await asyncio.gather(*(self._open(row.tenant, row.experiment, row.current) for row in rows))
        for row, snapshot in zip(rows, snapshots, strict=True):
            self.take(row, snapshot)
            for digest, why in snapshot.missing.items():
                _log.warning(
                    "%s lacks its pack %s, engines it answers are refused: %s", snapshot.experiment, digest, why
                )

    async def open_row(self, row: ExperimentRow) -> Snapshot:
        """What answers from a stored generation; the OracleError of a pack that cannot be had."""
        name = names.experiment_name(row.tenant, row.experiment)
        loaded = {digest: await self.load_pack(digest) for digest in row.current.binding.digests()}
        return Snapshot(name, row.current.generation, row.current.binding, loaded)

    def take(self, row: ExperimentRow, snapshot: Snapshot) -> None:
        """Answer from a stored generation. Its engines have been asked about by whoever made it current."""
        live = self._live.get(snapshot.experiment)
        if live is None:
            self._live[snapshot.experiment] = LiveExperiment(row, snapshot)
        else:
            live.create_time_ns = row.create_time_ns
            live.flip(row.current, snapshot)

    def drop(self, name: str) -> None:
        """Answer for an experiment no more that has been deleted."""
        live = self._live.pop(name, None)
        if live is not None:
            live.deleted = True
            live.wake()
            for engine in live.engines.values():
                # One that came back while it was being deleted.
                if engine.stream is not None:
                    engine.stream.end(deleted(name))

    async def load_pack(self, digest: str) -> LoadedPack:
        """A stored pack, mapped and warm, from wherever it lies; StoreFailed, Unavailable, PackInvalid."""
        return await self._supply.load(digest)

    def get(self, name: str) -> LiveExperiment | None:
        """The experiment of that resource name, if it is here."""
        return self._live.get(name)

    async def complete(self) -> None:
        """Bring the packs that snapshots lack; engines they answer are let in from then on. Logs what fails."""
        for live in [live for live in self._live.values() if live.snapshot.missing]:
            lacking = live.snapshot
            try:
                found = await self._open(live.tenant, live.experiment, live.current)
                if found.missing.keys() < lacking.missing.keys():
                    await self._followers.prepare(tuple(found.packs))
                    await self._records.change(self._complete(live, lacking, found), in_turn=False)
            except OracleError as error:
                _log.warning("packs of %s cannot be brought: %s", live.name, error.message)

    def find(self, name: str) -> LiveExperiment:
        """The experiment of that resource name; ExperimentNotFound, StaleGeneration where its packs are not here."""
        live = self._live.get(name)
        if live is None:
            if name in self.behind:
                raise StaleGeneration(f"this server has not got the packs of {name} yet; retry, here or elsewhere")
            raise not_found(name)
        return live

    def all(self) -> Iterable[LiveExperiment]:
        """Every experiment of every tenant."""
        return self._live.values()

    def page(self, tenant: str, after: str, limit: int) -> list[LiveExperiment]:
        """Experiments of a tenant in the order of their ids, those behind `after`."""
        mine = sorted(
            (live for live in self._live.values() if live.tenant == tenant and live.experiment > after),
            key=lambda live: live.experiment,
        )
        return mine[:limit]

    def naming(self, tenant: str, digest: str) -> list[str]:
        """Names of a tenant's experiments whose current binding names the pack."""
        current = {name: (live.tenant, live.current.binding) for name, live in self._live.items()}
        current |= {name: (row.tenant, row.current.binding) for name, row in self.behind.items()}
        return [name for name, (owner, binding) in current.items() if owner == tenant and digest in binding.digests()]

    def know_tenant(self, row: TenantRow) -> None:
        """A tenant as it is in the database."""
        self._tenants[row.tenant] = row

    def forget_tenant(self, tenant: str) -> None:
        """A tenant that has been deleted."""
        self._tenants.pop(tenant, None)

    def knows_tenant(self, tenant: str) -> bool:
        """Whether there is such a tenant, as far as this server knows."""
        return tenant in self._tenants

    def tenant(self, tenant: str) -> TenantRow:
        """The tenant's row; TenantNotFound."""
        row = self._tenants.get(tenant)
        if row is None:
            raise TenantNotFound(
                f"there is no tenant {names.tenant_name(tenant)}; `step-oracle tenant list` shows them"
            )
        return row

    async def create(
        self, tenant: str, experiment: str, binding: Binding, author: Author = LOCAL_AUTHOR
    ) -> LiveExperiment:
        """A new experiment; ExperimentExists, PackNotFound, InvalidArgument."""
        names.check_experiment_id(experiment, "experiment_id")
        names.check_comment(author.comment, "comment")
        bindings.check(binding)
        self.tenant(tenant)
        loaded = await self._load_packs(tenant, binding)
        return await self._records.change(self._create(tenant, experiment, binding, loaded, author))

    async def activate(
        self,
        name: str,
        binding: Binding,
        expected_generation: int,
        allowed: frozenset[str],
        *,
        validate_only: bool,
        author: Author = LOCAL_AUTHOR,
    ) -> Activation:
        """Make another binding answer; PackNotFound, GenerationConflict, EngineMismatch, InvalidArgument."""
        live = self.find(name)
        names.check_comment(author.comment, "comment")
        bindings.check(binding)
        _check_expected(live, expected_generation)
        # Packs are mapped and warm before the lock is taken: streams open and engines attach meanwhile.
        loaded = await self._load_packs(live.tenant, binding)
        change = self._activate(name, binding, expected_generation, allowed, "activate", loaded, validate_only, author)
        return await self._records.change(change)

    async def roll_back(
        self,
        name: str,
        to_generation: int,
        expected_generation: int,
        allowed: frozenset[str],
        author: Author = LOCAL_AUTHOR,
    ) -> Activation:
        """Activate the binding of an earlier generation as a new one; GenerationNotFound and as `activate`."""
        live = self.find(name)
        names.check_comment(author.comment, "comment")
        _check_expected(live, expected_generation)
        # 0 means the one before the current; what "current" is, is pinned by the expectation passed on below.
        seen = live.current.generation
        target = to_generation or seen - 1
        row = None
        if 0 < target <= seen:
            row = await self._records.call(self._records.store.generation, live.tenant, live.experiment, target)
        if row is None:
            raise GenerationNotFound(
                f"{name} has no generation {target}; it is at {seen}, `step-oracle experiment history` shows the others"
            )
        loaded = await self._load_packs(live.tenant, row.binding)
        reason = f"roll back to {target}"
        change = self._activate(name, row.binding, expected_generation or seen, allowed, reason, loaded, False, author)
        return await self._records.change(change)

    async def watch(self, name: str, after_generation: int) -> AsyncIterator[tuple[LiveExperiment, GenerationRow]]:
        """The present generation, unless it is `after_generation`, then each new one."""
        live = self.find(name)
        self.check_streams(live.tenant)
        live.watches += 1
        try:
            async for watched in self._watch(live, after_generation):
                yield watched
        finally:
            live.watches -= 1

    def check_streams(self, tenant: str, *, instead_of: EngineRecord | None = None) -> None:
        """QuotaExceeded unless the tenant may open one more stream; that of the engine `instead_of` does not count."""
        limit = self.tenant(tenant).max_streams
        if not limit:
            return
        mine = [live for live in self._live.values() if live.tenant == tenant]
        engines = sum(e.stream is not None and e is not instead_of for live in mine for e in live.engines.values())
        watches = sum(live.watches for live in mine)
        if engines + watches >= limit:
            raise QuotaExceeded(
                f"{names.tenant_name(tenant)} has {engines} engine streams and {watches} watches open; allowed "
                f"together: {limit}"
            )

    async def _watch(
        self, live: LiveExperiment, after_generation: int
    ) -> AsyncIterator[tuple[LiveExperiment, GenerationRow]]:
        last = live.current.generation
        if last != after_generation:
            yield live, live.current
        while True:
            changed = live.changed
            if self._draining:
                raise Draining("the server is stopping; watch again, here or elsewhere")
            if live.deleted:
                raise deleted(live.name)
            if live.current.generation == last:
                await changed.wait()
                continue
            newer = await self._records.call(
                self._records.store.generations_after, live.tenant, live.experiment, last, WATCH_BATCH
            )
            for record in newer:
                # Committed but not yet flipped: it comes with the next change.
                if record.generation > live.current.generation:
                    break
                yield live, record
                last = record.generation

    async def generations(self, name: str, before: int, limit: int) -> list[GenerationRow]:
        """History, newest first."""
        live = self.find(name)
        return await self._records.call(
            self._records.store.generations_before, live.tenant, live.experiment, before, limit
        )

    async def compared(self, name: str, generation: int) -> Comparison:
        """What a generation's shadow pack showed, over all processes; 0: the newest. GenerationNotFound."""
        live = self.find(name)
        elsewhere = await self._followers.comparisons(name)
        return summed([live.shadows.comparisons(), *elsewhere], generation, name)

    async def delete(self, name: str) -> None:
        """Forget an experiment; ExperimentInUse while engines are attached."""
        self.find(name)
        await self._records.change(self._delete(name))

    async def join(self, join: Callable[[list[ExperimentRow]], Awaitable[None]]) -> None:
        """Let a follower begin: it gets every experiment as it is now, and nothing changes until it has."""
        await self._records.change(self._join(join), in_turn=False)

    def drain(self) -> None:
        """End every watch and every open stream with Draining."""
        self._draining = True
        for live in self._live.values():
            live.wake()
            for engine in live.engines.values():
                if engine.stream is not None:
                    engine.stream.end(Draining("the server is stopping; reconnect"))

    # Below: the changes themselves, under the lock of `Records.change`.

    async def _create(
        self, tenant: str, experiment: str, binding: Binding, loaded: dict[str, LoadedPack], author: Author
    ) -> LiveExperiment:
        name = names.experiment_name(tenant, experiment)
        self.tenant(tenant)
        if name in self._live:
            raise ExperimentExists(
                f"the experiment {name} exists; `step-oracle experiment activate` changes what it answers"
            )

        def write(store: Store) -> ExperimentRow:
            _check_packs(store, tenant, binding)
            return store.create_experiment(tenant, experiment, binding, self._now_ns(), author)

        row = await self._records.call(write, self._records.store)
        await self._followers.follow(row)
        live = LiveExperiment(row, Snapshot(name, row.current.generation, binding, loaded))
        self._live[name] = live
        return live

    async def _activate(
        self,
        name: str,
        binding: Binding,
        expected_generation: int,
        allowed: frozenset[str],
        reason: str,
        loaded: dict[str, LoadedPack],
        validate_only: bool,
        author: Author,
    ) -> Activation:
        live = self.find(name)
        _check_expected(live, expected_generation)
        record = GenerationRow(live.current.generation + 1, binding, self._now_ns(), reason, author)
        snapshot = Snapshot(name, record.generation, binding, loaded)
        now = self._monotonic()
        engines = [engine for engine in live.engines.values() if engine.may_return(now)]
        accepted, warnings = check_activation(snapshot, engines, allowed)
        if validate_only:
            return Activation(live.current, warnings)

        def write(store: Store) -> None:
            # One may have been deleted since.
            _check_packs(store, live.tenant, binding)
            store.add_generation(live.tenant, live.experiment, record, accepted)

        await self._records.call(write, self._records.store)
        await self._followers.follow(ExperimentRow(live.tenant, live.experiment, live.create_time_ns, record))
        for engine in engines:
            engine.accepted_digest = accepted[engine.identity.engine_id]
        live.flip(record, snapshot)
        return Activation(record, warnings)

    async def _complete(self, live: LiveExperiment, lacking: Snapshot, found: Snapshot) -> None:
        """The same generation with more of its packs, unless there is a newer one."""
        if live.snapshot is lacking and not live.deleted:
            await self._followers.follow(ExperimentRow(live.tenant, live.experiment, live.create_time_ns, live.current))
            live.snapshot = found
            # A warning too, as the end of one: the log keeps those alone of the standard library's.
            _log.warning("packs of %s have come; it still lacks %d", live.name, len(found.missing))

    async def _delete(self, name: str) -> None:
        live = self.find(name)
        now = self._monotonic()
        attached = sum(engine.is_live(now) for engine in live.engines.values())
        if attached:
            raise ExperimentInUse(f"{attached} engines are attached to {name}; stop them first")
        await self._records.call(self._records.store.delete_experiment, live.tenant, live.experiment)
        await self._followers.forget(name)
        self.drop(name)

    async def _join(self, join: Callable[[list[ExperimentRow]], Awaitable[None]]) -> None:
        await join(
            [
                ExperimentRow(live.tenant, live.experiment, live.create_time_ns, live.current)
                for live in self._live.values()
            ]
        )

    async def _open(self, tenant: str, experiment: str, record: GenerationRow) -> Snapshot:
        """The snapshot of a generation that is current already, with what can be had of its packs."""
        await self._records.call(_check_packs, self._records.store, tenant, record.binding)
        loaded, missing = await self._supply.load_all(record.binding.digests())
        name = names.experiment_name(tenant, experiment)
        why = {digest: error.message for digest, error in missing.items()}
        return Snapshot(name, record.generation, record.binding, loaded, why)

    async def _load_packs(self, tenant: str, binding: Binding) -> dict[str, LoadedPack]:
        await self._records.call(_check_packs, self._records.store, tenant, binding)
        loaded = {digest: await self.load_pack(digest) for digest in binding.digests()}
        for digest, pack in loaded.items():
            stages = pack.manifest.parallel.pipeline
            if stages > 1:
                raise InvalidArgument(
                    f"the pack {digest} has {stages} pipeline stages; packs of one stage are supported so far",
                    field="binding.default_pack_digest",
                )
        await self._followers.prepare(binding.digests())
        return loaded


def _check_packs(store: Store, tenant: str, binding: Binding) -> None:
    """PackNotFound unless the tenant has every pack. On the store's thread."""
    if lacking := store.lacking(tenant, binding.digests()):
        raise PackNotFound(
            f"{names.tenant_name(tenant)} has no pack {lacking[0]}; `step-oracle pack list` shows them, `step-oracle "
            "pack upload` adds one"
        )


def deleted(name: str) -> ExperimentNotFound:
    """The error for an experiment that was here."""
    return ExperimentNotFound(f"the experiment {name} has been deleted")


def not_found(name: str) -> ExperimentNotFound:
    """The refusal of a name nobody has."""
    return ExperimentNotFound(f"there is no experiment {name}; `step-oracle experiment list` shows them")


def not_here_yet(error: OracleError, seen_generation: int) -> OracleError:
    """The refusal of an engine that has seen a generation of what is not found.

    This server is behind a replica, or the experiment has been deleted: the engine tries again, here and elsewhere,
    and its own budget decides. Any other error, or one of an engine that has seen none, stays what it is.
    """
    if not seen_generation or not isinstance(error, ExperimentNotFound | TenantNotFound):
        return error
    return StaleGeneration(
        f"{error.message}; the engine has seen its generation {seen_generation}: this server is behind, or the "
        "experiment has been deleted; retry, here or elsewhere"
    )


def _check_expected(live: LiveExperiment, expected_generation: int) -> None:
    current = live.current.generation
    if expected_generation not in (0, current):
        raise GenerationConflict(
            f"expected_generation is {expected_generation}, {live.name} is at {current}; read it again and decide anew"
        )
