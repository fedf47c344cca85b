"""One server among those that share a database.

The database is the truth, and its revision says how much of it a server has in memory. A change is made in turn
(`begin`, `end`): a server that has it has first read what the others changed. Once it is committed the others are told;
each reads what is newer, maps the packs and answers from the new generation. `follow` returns when all that are alive
have said so, or after FOLLOW_SECONDS: a server that lags is known by its generation, and engines that have seen a newer
one are not answered there.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from oracle_server.errors import DatabaseUnavailable, OracleError
from oracle_server.state import names
from oracle_server.state.attachment import Attachments
from oracle_server.state.credentials import Admission
from oracle_server.state.engines import ElsewhereStream, EngineCounts, EngineRecord
from oracle_server.state.experiments import Experiments, Followers, LiveExperiment
from oracle_server.state.postgres_database import PostgresDatabase
from oracle_server.state.presence import write_presence
from oracle_server.state.records import Records
from oracle_server.state.replica_feed import SILENT_SECONDS, Feed
from oracle_server.state.shadow import Comparison
from oracle_server.state.snapshot import LoadedPack
from oracle_server.state.store import Changes, EnginePlace, ExperimentRow, Store
from oracle_server.state.tenants import Tenants

# How long the others may take to map packs that are about to be activated, and to answer from them afterwards.
PREPARE_SECONDS = 10
FOLLOW_SECONDS = 1.0
# How long packs stay mapped that another server is about to activate.
PREPARED_SECONDS = 60.0
# An engine at a server that has not been heard of for so long counts as one whose stream broke.
GONE_SECONDS = 5.0
# How long a server waits for its turn, and how often it asks.
TURN_SECONDS = 3.0
ASK_SECONDS = (0.001, 0.002, 0.005, 0.01)
TICK_SECONDS = 1.0
START_SECONDS = 10.0
# A notification has 8,000 bytes at most.
_MAX_DIGESTS = 100

_log = logging.getLogger("step_oracle.replicas")


class _Counted(msgspec.Struct, frozen=True, array_like=True):
    """What an engine at a server has done, as the others read it."""

    experiment: str
    engine_id: str
    counts: EngineCounts


class _Counts(msgspec.Struct, frozen=True, array_like=True):
    engines: list[_Counted]
    # Steps answered without a stream, by experiment.
    sampled: dict[str, int]


_counts_decoder = msgspec.msgpack.Decoder(_Counts)


class Replicas:
    """Owns what this server knows of the others. Turns of its Records, Followers beside its shards. Event loop only."""

    # Given by `join`.
    _experiments: Experiments
    _attachments: Attachments
    _tenants: Tenants

    def __init__(
        self, records: Records, database: PostgresDatabase, url: Callable[[], str], store: Store, own: Followers
    ) -> None:
        """`own`: the shards of this server, where it has some."""
        self.server = uuid.uuid4().hex[:12]
        self.revision = -1
        self._records = records
        self._database = database
        self._store = store
        self._own = own
        self._feed = Feed(
            url,
            self.server,
            on_beat=self._hand(self._heard),
            on_notice=self._hand(self._told),
            on_lost=self._hand(self.lost),
        )
        self._loop = asyncio.get_running_loop()
        # Why the database cannot be asked; empty while it can.
        self._down = ""
        self._beaten = asyncio.Event()
        self._wake = asyncio.Event()
        self._queue = asyncio.Lock()
        # The servers that are alive: the counts of their engines, and when each was last heard of.
        self._others: dict[str, bytes] = {}
        self._last_heard: dict[str, float] = {}
        # The revision each has said it has, and who has answered which of our announcements.
        self._at: dict[str, int] = {}
        self._prepared: dict[int, set[str]] = {}
        self._number = 0
        self._answered = asyncio.Event()
        # Sampled steps of other servers that are in those of the experiment.
        self._sampled: dict[tuple[str, str], int] = {}
        self._dirty: dict[tuple[str, str], EngineRecord] = {}
        self._writing: frozenset[tuple[str, str]] = frozenset()
        self._placing = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    def join(self, experiments: Experiments, attachments: Attachments, tenants: Tenants) -> None:
        """Keep these as the database has them."""
        self._experiments, self._attachments, self._tenants = experiments, attachments, tenants

    async def open(self) -> None:
        """Read everything, and begin to follow. DatabaseUnavailable."""
        async with self._records.changing:
            await self._catch_up(await self._records.call(self._store.changes_after, -1))
        self._feed.start()
        try:
            await asyncio.wait_for(self._beaten.wait(), START_SECONDS)
        except TimeoutError:
            raise DatabaseUnavailable(self._down or "the database does not answer; retry") from None
        for work in (self._keep_up(), self._keep_placing(), self._tick()):
            self._start(work)

    async def close(self) -> None:
        """Follow no more. Streams that have ended by now are told of first."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._dirty and not self._down:
            with suppress(OracleError):
                await self._write_places(list(self._dirty.values()))
        await asyncio.to_thread(self._feed.stop)
        if not self._down and self._beaten.is_set():
            await asyncio.to_thread(self._feed.leave)

    # Turns

    def check(self) -> None:
        """DatabaseUnavailable where it is known to be down: nobody waits to learn it once more."""
        if self._down:
            raise DatabaseUnavailable(
                f"the database of the fleet does not answer this server ({self._down}); retry, here or elsewhere. "
                "Attached engines are answered meanwhile"
            )

    def interrupt(self) -> None:
        """End a call that takes too long."""
        self._database.interrupt()

    def lost(self, why: str) -> None:
        """The connection was lost, or cannot be made."""
        if not self._down:
            _log.warning("the database is lost: %s; steps go on, changes are refused", why)
        self._down = why
        # Who is alive shows again when they are heard of.
        self._others = {}

    async def begin(self) -> None:
        """Wait for this server's turn to change something; its memory is then as the database is."""
        await self._queue.acquire()
        try:
            revision = await self._take_turn()
            if revision != self.revision:
                async with self._records.changing:
                    await self._catch_up(await self._records.call(self._store.changes_after, self.revision))
        except BaseException:
            await self.end(made=False)
            raise

    async def end(self, *, made: bool) -> None:
        """Let the others change; `made`: the change was committed and is in memory."""
        try:
            if made and self._store.last_revision == self.revision + 1:
                self.revision = self._store.last_revision
            # Where the connection was lost, so was the turn.
            with suppress(OracleError):
                await self._records.call(self._database.end_turn, always=True)
        finally:
            self._queue.release()

    async def refresh(self) -> None:
        """Read what the others changed, now; DatabaseUnavailable."""
        changes = await self._records.call(self._store.changes_after, self.revision)
        if changes.revision == self.revision:
            return
        # Before the lock is taken: streams open and engines attach meanwhile.
        held = [await self._load_ahead(row) for row in changes.experiments]
        async with self._records.changing:
            await self._catch_up(changes)
        held.clear()

    # Followers: the other servers

    async def prepare(self, digests: Sequence[str]) -> None:
        """Let the others fetch and map packs; one that cannot will lag, and is no reason to refuse."""
        others = set(self._others)
        if not others or not digests:
            return
        self._number = number = self._number + 1
        self._prepared[number] = set()
        try:
            for _ in range(PREPARE_SECONDS):
                # Again each second: one that is connecting anew has missed it.
                await self._say(f"prepare {number} {self.server} {','.join(digests[:_MAX_DIGESTS])}")
                if await self._until(lambda: self._prepared[number] >= (others & set(self._others)), 1.0):
                    break
        finally:
            del self._prepared[number]

    async def follow(self, row: ExperimentRow) -> None:
        """Wait for the others."""
        await self._everywhere()

    async def forget(self, name: str) -> None:
        """Wait for the others."""
        await self._everywhere()

    async def admit(self, admission: Admission) -> None:
        """Wait for the others: they read who may call themselves."""
        await self._everywhere()

    async def count(self) -> None:
        """Bring the records of engines at other servers up to their last beats."""
        for server, data in self._others.items():
            try:
                counts = _counts_decoder.decode(data)
            except msgspec.DecodeError:
                # Of another version, or of one that has just begun.
                continue
            for counted in counts.engines:
                record = self._record(counted.experiment, counted.engine_id)
                if record is not None and record.elsewhere == server:
                    if not record.counts.steps:
                        # What it did before this server knew of it is nothing of the last second.
                        record.rated_steps = counted.counts.steps
                    record.counts = counted.counts
            for name, steps in counts.sampled.items():
                live = self._experiments.get(name)
                before = self._sampled.get((server, name), steps)
                self._sampled[server, name] = steps
                if live is not None and steps > before:
                    live.sampled_elsewhere += steps - before

    async def comparisons(self, name: str) -> Sequence[Sequence[Comparison]]:
        """What others compared stays with them."""
        return ()

    # Engines

    def place(self, record: EngineRecord) -> None:
        """The engine is here, or was: the others have to know, soon."""
        record.elsewhere = ""
        self._dirty[record.identity.experiment, record.identity.engine_id] = record
        self._placing.set()

    # Below: hearing

    def _hand(self, act: Callable[..., None]) -> Callable[..., object]:
        """From the feed's thread to the loop."""

        def hand(*arguments: object) -> None:
            # A loop that has ended hears nothing any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(act, *arguments)

        return hand

    def _heard(self, revision: int, others: Mapping[str, bytes]) -> None:
        now = time.monotonic()
        if self._down:
            _log.warning("the database is back")
            self._down = ""
            # Nobody could be heard of meanwhile.
            self._last_heard = dict.fromkeys(self._last_heard, now)
            self._placing.set()
        self._others = dict(others)
        self._last_heard |= dict.fromkeys(others, now)
        self._beaten.set()
        self._answered.set()
        if revision > self.revision or self._experiments.behind:
            self._wake.set()

    def _told(self, text: str) -> None:
        kind, *words = text.split(" ")
        if kind == "changed" and int(words[0]) > self.revision:
            self._wake.set()
        elif kind == "at":
            self._at[words[0]] = max(int(words[1]), self._at.get(words[0], 0))
            self._answered.set()
        elif kind == "prepare" and words[1] != self.server:
            self._start(self._prepare(words[0], words[1], words[2].split(",")))
        elif kind == "prepared" and words[1] == self.server:
            with suppress(KeyError):
                self._prepared[int(words[0])].add(words[2])
            self._answered.set()

    async def _prepare(self, number: str, asker: str, digests: Sequence[str]) -> None:
        """Another server is about to activate these."""
        held: list[LoadedPack] = []
        try:
            held += [await self._experiments.load_pack(names.check_digest(digest, "digest")) for digest in digests]
            await self._own.prepare(digests)
        except OracleError as error:
            _log.warning("a pack that is about to be activated cannot be had: %s", error)
        self._loop.call_later(PREPARED_SECONDS, held.clear)
        with suppress(OracleError):
            await self._say(f"prepared {number} {asker} {self.server}")

    # Below: following

    async def _keep_up(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.refresh()
                await self._retry_behind()
            except DatabaseUnavailable:
                # The next beat wakes it again.
                pass
            except OracleError as error:
                _log.warning("what the others changed cannot be taken over now: %s", error)

    async def _catch_up(self, changes: Changes) -> None:
        """Bring memory to the revision of `changes`, read after the one it has. Under the lock of memory."""
        if changes.revision <= self.revision:
            return
        for row in changes.experiments:
            await self._take(row)
        for tenant, experiment in changes.deleted_experiments:
            name = names.experiment_name(tenant, experiment)
            self._experiments.behind.pop(name, None)
            if self._experiments.get(name) is not None:
                await self._own.forget(name)
                self._experiments.drop(name)
        await self._tenants.learn(changes, self._own)
        for place in changes.engines:
            self._learn(place)
        self.revision = changes.revision
        if self._others:
            self._start(self._say_at())

    def _learn(self, place: EnginePlace) -> None:
        key = (names.experiment_name(place.tenant, place.experiment), place.engine_id)
        self._attachments.learn(place, is_to_be_written=key in self._dirty or key in self._writing)

    async def _take(self, row: ExperimentRow) -> None:
        """Answer from a generation another server has made current; where its packs cannot be had it is tried again."""
        name = names.experiment_name(row.tenant, row.experiment)
        live = self._experiments.get(name)
        if live is not None and row.current.generation <= live.current.generation:
            return
        try:
            snapshot = await self._experiments.open_row(row)
            await self._own.prepare(row.current.binding.digests())
        except OracleError as error:
            if self._experiments.behind.get(name) != row:
                _log.warning("%s stays behind generation %s: %s", name, row.current.generation, error)
            self._experiments.behind[name] = row
            return
        self._experiments.behind.pop(name, None)
        await self._own.follow(row)
        self._experiments.take(row, snapshot)

    async def _retry_behind(self) -> None:
        for row in list(self._experiments.behind.values()):
            held = await self._load_ahead(row)
            name = names.experiment_name(row.tenant, row.experiment)
            places = (await self._records.call(self._store.changes_after, -1)).engines
            async with self._records.changing:
                if self._experiments.behind.get(name) == row:
                    await self._take(row)
                # Those that came while it was unknown here.
                for place in places:
                    if (place.tenant, place.experiment) == (row.tenant, row.experiment):
                        self._learn(place)
            held.clear()

    async def _load_ahead(self, row: ExperimentRow) -> list[LoadedPack]:
        """The packs of a generation, mapped; those that cannot be had are told of when it is taken."""
        live = self._experiments.get(names.experiment_name(row.tenant, row.experiment))
        if live is None or row.current.generation > live.current.generation:
            with suppress(OracleError):
                return [await self._experiments.load_pack(digest) for digest in row.current.binding.digests()]
        return []

    async def _say_at(self) -> None:
        with suppress(OracleError):
            await self._say(f"at {self.server} {self.revision}")

    # Below: waiting for others

    async def _take_turn(self) -> int:
        end = self._loop.time() + TURN_SECONDS
        asked = 0
        while (revision := await self._records.call(self._database.try_turn)) is None:
            if self._loop.time() > end:
                raise DatabaseUnavailable(
                    f"another server of the fleet has been changing something for {TURN_SECONDS:g} s; retry"
                )
            await asyncio.sleep(ASK_SECONDS[min(asked, len(ASK_SECONDS) - 1)])
            asked += 1
        return revision

    async def _everywhere(self) -> None:
        """Until every server that is alive has what this one changed last, or a second is over."""
        revision, others = self._store.last_revision, set(self._others)
        await self._until(
            lambda: all(self._at.get(o, 0) >= revision for o in others & set(self._others)), FOLLOW_SECONDS
        )

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        end = self._loop.time() + seconds
        while not condition():
            left = end - self._loop.time()
            if left <= 0 or self._down:
                return False
            self._answered.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._answered.wait(), left)
        return True

    async def _say(self, text: str) -> None:
        await self._records.call(self._database.notify, text)

    # Below: where engines are

    async def _keep_placing(self) -> None:
        while True:
            await self._placing.wait()
            self._placing.clear()
            batch, self._dirty = self._dirty, {}
            self._writing = frozenset(batch)
            try:
                if batch:
                    await self._write_places(list(batch.values()))
            except OracleError as error:
                self._dirty = batch | self._dirty
                if not isinstance(error, DatabaseUnavailable):
                    _log.warning("the other servers cannot be told where engines are: %s", error)
                # It is set again when the database is back; without having been lost, after a while.
                self._loop.call_later(TICK_SECONDS, self._placing.set)
            finally:
                self._writing = frozenset()

    async def _write_places(self, records: Sequence[EngineRecord]) -> None:
        here = [self._place_of(record) for record in records if record.stream is not None]
        not_here = [self._place_of(record) for record in records if record.stream is None]
        revision = await self._records.call(self._store.place_engines, here, not_here)
        for record in records:
            if record.stream is not None:
                record.placed = max(record.placed, revision)

    def _place_of(self, record: EngineRecord) -> EnginePlace:
        tenant, experiment = names.parse_experiment(record.identity.experiment, "experiment")
        key = (tenant, experiment, record.identity.engine_id)
        presence = write_presence(record)
        return EnginePlace(*key, record.incarnation, record.accepted_digest, self.server, presence)

    async def _tick(self) -> None:
        """Once a second: say what engines here have done, notice who is gone, and that the database is silent."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._feed.counts = msgspec.msgpack.encode(self._counts())
            if time.monotonic() - self._feed.heard > SILENT_SECONDS + TICK_SECONDS:
                self._feed.interrupt()
                self.lost("it says nothing any more")
            if not self._down:
                self._drop_the_gone(time.monotonic())

    def _counts(self) -> _Counts:
        engines = [
            _Counted(live.name, engine_id, record.counts)
            for live in self._experiments.all()
            for engine_id, record in live.engines.items()
            if not record.elsewhere and record.stream is not None
        ]
        return _Counts(engines, {live.name: live.sampled_steps for live in self._experiments.all()})

    def _drop_the_gone(self, now: float) -> None:
        """Engines at servers that are gone have lost their streams."""
        for live in self._experiments.all():
            for record in live.engines.values():
                if isinstance(record.stream, ElsewhereStream):
                    heard = self._last_heard.setdefault(record.elsewhere, now)
                    if record.elsewhere not in self._others and now - heard > GONE_SECONDS:
                        self._attachments.break_off(record)

    def _record(self, experiment: str, engine_id: str) -> EngineRecord | None:
        live: LiveExperiment | None = self._experiments.get(experiment)
        return None if live is None else live.engines.get(engine_id)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("following the database failed", exc_info=task.exception())
