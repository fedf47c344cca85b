"""How an engine joins an experiment: the device it asks for, its attach, its stream, the way back after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from oracle_server import pack as packs
from oracle_server.errors import (
    AcceptanceUnknown,
    DatabaseUnavailable,
    EngineIdTaken,
    InvalidArgument,
    NoRuleMatches,
    QuotaExceeded,
    StaleGeneration,
)
from oracle_server.state import names
from oracle_server.state.engines import (
    ATTACH_SECONDS,
    LINGER_SECONDS,
    ElsewhereStream,
    EngineRecord,
    EngineStream,
    check_engine,
    mismatch,
    sentence,
)
from oracle_server.state.experiments import Experiments, LiveExperiment
from oracle_server.state.identity import EngineIdentity, pack_of
from oracle_server.state.presence import read_presence, write_presence
from oracle_server.state.records import Records
from oracle_server.state.snapshot import LoadedPack
from oracle_server.state.store import EnginePlace, EngineRow

_MAX_INCARNATION = 2**62


@dataclass(frozen=True, slots=True)
class Attached:
    """What AttachEngine answers."""

    incarnation: int
    generation: int
    pack: LoadedPack
    kv_blocks: packs.KvPlan
    differences: tuple[packs.Difference, ...]
    warnings: tuple[str, ...]


class Attachments:
    """Engines come and go through it. Event loop only."""

    def __init__(self, experiments: Experiments, records: Records, *, monotonic: Callable[[], float]) -> None:
        self._experiments = experiments
        self._records = records
        self._monotonic = monotonic
        # Where several servers share the database: this one's name there, and who tells the others where engines are.
        self.server = ""
        self.place: Callable[[EngineRecord], None] = _nobody

    async def attach(
        self, identity: EngineIdentity, facts: packs.EngineFacts, device_generation: int, allowed: frozenset[str]
    ) -> Attached:
        """Let an engine in: its incarnation, its KV blocks and the differences let pass.

        Raises ExperimentNotFound, NoRuleMatches, EngineMismatch, EngineIdTaken, StaleGeneration, AcceptanceUnknown,
        QuotaExceeded.
        """
        self._experiments.find(identity.experiment)
        return await self._records.change(self._attach(identity, facts, device_generation, allowed))

    async def open_stream(
        self,
        identity: EngineIdentity,
        facts: packs.EngineFacts,
        incarnation: int,
        allowed: frozenset[str],
        stream: EngineStream,
    ) -> tuple[LiveExperiment, EngineRecord]:
        """Give the engine's steps a stream. The engine may be unknown here: the server restarted since it attached."""
        live = self._experiments.find(identity.experiment)
        record = self._returning(live, identity, facts, incarnation, allowed)
        if record is not None:
            self._give(record, stream)
            return live, record
        # Without a turn: an engine that is known comes back whatever the database does.
        opened = self._open_stream(identity, facts, incarnation, allowed, stream)
        change = self._records.change(opened, in_turn=False)
        opening = asyncio.ensure_future(change)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The engine hung up meanwhile: nobody else will close what is about to be opened.
            opening.add_done_callback(lambda done: self._undo(done, stream))
            raise

    async def close_stream(self, record: EngineRecord, stream: EngineStream, *, by_engine: bool) -> None:
        """Free the engine id, unless a newer stream of the same engine has taken over."""
        self._close(record, stream, by_engine=by_engine)

    def _undo(self, opened: asyncio.Future[tuple[LiveExperiment, EngineRecord]], stream: EngineStream) -> None:
        if not opened.cancelled() and opened.exception() is None:
            self._close(opened.result()[1], stream, by_engine=False)

    def _close(self, record: EngineRecord, stream: EngineStream, *, by_engine: bool) -> None:
        if record.stream is stream:
            record.stream = None
            record.ended, record.closed = True, by_engine
            record.since = self._monotonic()
            self.place(record)

    def learn(self, place: EnginePlace, *, is_to_be_written: bool) -> None:
        """Take over where an engine is, as the database has it. Under the lock of memory.

        `is_to_be_written`: where it is by the word of this server is not in the database yet.
        """
        live = self._experiments.get(names.experiment_name(place.tenant, place.experiment))
        if live is None:
            return
        record = live.engines.get(place.engine_id)
        presence = read_presence(place.presence)
        if record is not None and record.incarnation == place.incarnation:
            record.accepted_digest = place.accepted_digest
            is_here = record.stream is not None and not isinstance(record.stream, ElsewhereStream)
            # Its stream came after what was read.
            if is_here and (is_to_be_written or place.revision <= record.placed):
                return
        if place.server == self.server or (record is not None and record.incarnation > place.incarnation):
            return
        if record is None or record.incarnation < place.incarnation:
            if record is not None and record.stream is not None:
                record.stream.end(_attached_again(place.engine_id, place.incarnation, record.incarnation))
            if presence is None:
                live.engines.pop(place.engine_id, None)
                return
            key = (place.incarnation, place.accepted_digest)
            record = EngineRecord(presence.identity, presence.facts, *key, presence.allowed, since=self._monotonic())
            live.engines[place.engine_id] = record
        is_elsewhere = isinstance(record.stream, ElsewhereStream)
        if presence is not None and presence.has_stream:
            if record.stream is not None and not is_elsewhere:
                record.stream.end(_replaced(place.engine_id))
            record.identity, record.facts, record.allowed = presence.identity, presence.facts, presence.allowed
            record.elsewhere, record.stream = place.server, ElsewhereStream()
            record.ended = record.closed = False
        elif record.stream is not None and not is_elsewhere:
            # It is here: the other server has noticed late that it went.
            self.place(record)
        elif is_elsewhere or not record.ended:
            record.elsewhere, record.stream = place.server, None
            record.ended, record.closed = presence is None or presence.ended, presence is None
            record.since = self._monotonic()

    def break_off(self, record: EngineRecord) -> None:
        """The server that an engine is at has gone: its stream is broken, and it may be on its way back."""
        record.stream, record.ended, record.closed = None, True, False
        record.since = self._monotonic()

    def _returning(
        self,
        live: LiveExperiment,
        identity: EngineIdentity,
        facts: packs.EngineFacts,
        incarnation: int,
        allowed: frozenset[str],
    ) -> EngineRecord | None:
        """The engine's record where there is nothing to ask or check: as it is there it has its place.

        A change under way has counted with it, or will. One that has attached again elsewhere meanwhile is heard
        of, and ends the stream.
        """
        record = live.engines.get(identity.engine_id)
        if record is None or record.incarnation != incarnation or not record.may_return(self._monotonic()):
            return None
        given = facts if facts.num_kv_blocks else replace(facts, num_kv_blocks=record.facts.num_kv_blocks)
        if (record.identity, record.facts, record.allowed) != (identity, given, allowed):
            return None
        if live.snapshot.pack_for(identity).digest != record.accepted_digest:
            return None
        _check_speculation(live, facts)
        self._experiments.check_streams(live.tenant, instead_of=record)
        return record

    def _keep(self, live: LiveExperiment, record: EngineRecord) -> None:
        """What the engine was before is no more; a stream that came back to it meanwhile neither."""
        engine_id = record.identity.engine_id
        former = live.engines.get(engine_id)
        if former is not None and former.stream is not None:
            former.stream.end(_attached_again(engine_id, record.incarnation, former.incarnation))
        live.engines[engine_id] = record

    def _give(self, record: EngineRecord, stream: EngineStream) -> None:
        """The stream is now that of the engine."""
        if record.stream is not None:
            record.stream.end(_replaced(record.identity.engine_id))
        record.stream, record.ended, record.closed = stream, False, False
        self.place(record)

    # Below: under the lock of `Records.change`.

    async def _attach(
        self, identity: EngineIdentity, facts: packs.EngineFacts, device_generation: int, allowed: frozenset[str]
    ) -> Attached:
        live = self._experiments.find(identity.experiment)
        snapshot = live.snapshot
        if device_generation > snapshot.generation:
            raise StaleGeneration(
                f"the engine's device is of generation {device_generation} of {live.name}, this server is at "
                f"{snapshot.generation}; retry, here or elsewhere"
            )
        pack = snapshot.pack_for(identity)
        now = self._monotonic()
        self._forget_the_gone(live, now)
        known = live.engines.get(identity.engine_id)
        if known is not None and known.is_live(now):
            raise _taken(identity, known, now)
        self._check_quota(live, identity.engine_id, now)
        _check_speculation(live, facts)
        passed, refused = check_engine(pack, facts, allowed, frozen=False)
        if refused:
            raise mismatch(
                f"the engine {identity.engine_id!r} does not fit the pack {pack.digest}", _sentences(refused)
            )
        passed += await self._device_differences(live, identity, device_generation, pack)
        kv_blocks = packs.plan_kv_blocks(pack.manifest, facts)
        store = self._records.store
        given = replace(facts, num_kv_blocks=kv_blocks.blocks)
        record = EngineRecord(identity, given, 0, pack.digest, allowed, since=now)
        key = (live.tenant, live.experiment, identity.engine_id)
        presence = write_presence(record) if self.server else b""
        incarnation = await self._records.call(store.attach_engine, *key, pack.digest, self.server, presence)
        record.incarnation = incarnation
        self._keep(live, record)
        warnings = _sentences(passed)
        if kv_blocks.warning:
            warnings += (kv_blocks.warning,)
        return Attached(incarnation, snapshot.generation, pack, kv_blocks, passed, warnings)

    async def _open_stream(
        self,
        identity: EngineIdentity,
        facts: packs.EngineFacts,
        incarnation: int,
        allowed: frozenset[str],
        stream: EngineStream,
    ) -> tuple[LiveExperiment, EngineRecord]:
        live = self._experiments.find(identity.experiment)
        row = await self._remembered(live, identity.engine_id, incarnation)
        if not 0 < incarnation < _MAX_INCARNATION:
            raise InvalidArgument(
                f"incarnation is {incarnation}; call AttachEngine first and present its incarnation",
                field="open.incarnation",
            )
        if row is not None and incarnation < row.incarnation:
            raise _attached_again(identity.engine_id, row.incarnation, incarnation)
        pack = live.snapshot.pack_for(identity)
        _check_speculation(live, facts)
        accepted = EngineRow(incarnation, pack.digest)
        if row is None or row.accepted_digest != pack.digest:
            # It attached under another pack: what that pack gave it at its start cannot change any more.
            _, refused = check_engine(pack, facts, allowed, frozen=True)
            if refused:
                raise mismatch(
                    f"the running engine {identity.engine_id!r} does not fit the pack {pack.digest}",
                    _sentences(refused),
                )
        if row != accepted:
            key = (live.tenant, live.experiment, identity.engine_id)
            await self._records.call(self._records.store.accept_engine, *key, accepted)
        now = self._monotonic()
        self._forget_the_gone(live, now)
        record = live.engines.get(identity.engine_id)
        if record is None or not record.may_return(now):
            # It attached before this server started, or never: the quota binds it all the same.
            self._check_quota(live, identity.engine_id, now)
        self._experiments.check_streams(live.tenant, instead_of=record)
        if record is None or record.incarnation != incarnation:
            record = EngineRecord(identity, facts, incarnation, pack.digest, allowed, since=now)
            self._keep(live, record)
        if not facts.num_kv_blocks:
            facts = replace(facts, num_kv_blocks=record.facts.num_kv_blocks)
        record.identity, record.facts, record.allowed = identity, facts, allowed
        record.accepted_digest = pack.digest
        self._give(record, stream)
        return live, record

    async def _remembered(self, live: LiveExperiment, engine_id: str, incarnation: int) -> EngineRow | None:
        """What the database has of an engine; while it does not answer, what is in memory of one that is known.

        DatabaseUnavailable for one that is not.
        """
        try:
            key = (live.tenant, live.experiment, engine_id)
            return await self._records.call(self._records.store.engine, *key)
        except DatabaseUnavailable:
            record = live.engines.get(engine_id)
            if record is None or record.incarnation < incarnation:
                raise
            return EngineRow(record.incarnation, record.accepted_digest)

    async def _device_differences(
        self, live: LiveExperiment, identity: EngineIdentity, device_generation: int, pack: LoadedPack
    ) -> tuple[packs.Difference, ...]:
        """The device the engine was shown, where it is not the pack's: somebody activated another one in between."""
        if device_generation in (0, live.snapshot.generation):
            return ()
        store = self._records.store
        row = await self._records.call(store.generation, live.tenant, live.experiment, device_generation)
        if row is None:
            return ()
        try:
            # As the engine asked then: before it knew its model.
            digest = pack_of(row.binding, replace(identity, model="", tensor_parallel_size=0))
        except NoRuleMatches:
            return ()
        shown = await self._records.call(store.pack, live.tenant, digest)
        if shown is None:
            return ()
        before, now = packs.parse_manifest(shown.manifest).device, pack.manifest.device
        if (before.name, before.memory_bytes) == (now.name, now.memory_bytes):
            return ()
        return (
            packs.Difference(
                "device",
                f"{now.name} ({now.memory_bytes} bytes)",
                f"{before.name} ({before.memory_bytes} bytes)",
                "warn",
            ),
        )

    def _check_quota(self, live: LiveExperiment, engine_id: str, now: float) -> None:
        """QuotaExceeded unless the tenant may have this engine beside its others, those included that may return."""
        limit = self._experiments.tenant(live.tenant).max_engines
        if not limit:
            return
        attached = sum(
            engine.may_return(now) and (other is not live or engine.identity.engine_id != engine_id)
            for other in self._experiments.all()
            if other.tenant == live.tenant
            for engine in other.engines.values()
        )
        if attached >= limit:
            raise QuotaExceeded(f"tenants/{live.tenant} has {attached} engines attached; allowed: {limit}")

    def _forget_the_gone(self, live: LiveExperiment, now: float) -> None:
        gone = [
            engine_id
            for engine_id, engine in live.engines.items()
            if not engine.is_live(now) and now - engine.since > LINGER_SECONDS
        ]
        for engine_id in gone:
            del live.engines[engine_id]


def _nobody(record: EngineRecord) -> None:
    """This server is alone: nobody has to be told where its engines are."""


def _attached_again(engine_id: str, newer: int, incarnation: int) -> EngineIdTaken:
    return EngineIdTaken(
        f"the engine id {engine_id!r} was attached again since (incarnation {newer}, yours is {incarnation}); give "
        "each vLLM server its own STEP_ORACLE_ENGINE_ID"
    )


def _replaced(engine_id: str) -> EngineIdTaken:
    return EngineIdTaken(f"the engine {engine_id!r} opened a newer stream; this one is answered no more")


def _check_speculation(live: LiveExperiment, facts: packs.EngineFacts) -> None:
    if facts.num_speculative_tokens and not live.snapshot.binding.draft_acceptance_rate:
        raise AcceptanceUnknown(
            f"the engine speculates ({facts.num_speculative_tokens} tokens) and {live.name} has no "
            "draft_acceptance_rate; activate one, or start the engine without speculation"
        )


def _taken(identity: EngineIdentity, known: EngineRecord, now: float) -> EngineIdTaken:
    if known.stream is not None:
        held = "has an open stream"
    else:
        held = f"attached {now - known.since:.0f} s ago and keeps its id for {ATTACH_SECONDS:.0f} s"
    return EngineIdTaken(
        f"a live engine has the id {identity.engine_id!r} in {identity.experiment}: it {held}; give each vLLM server "
        "its own STEP_ORACLE_ENGINE_ID"
    )


def _sentences(differences: tuple[packs.Difference, ...]) -> tuple[str, ...]:
    return tuple(sentence(difference) for difference in differences)
