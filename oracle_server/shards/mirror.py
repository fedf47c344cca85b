"""What a shard knows of the state: the current generation of each experiment, and the streams it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any, TypeVar

from oracle_server import pack as packs
from oracle_server.errors import Draining, OracleError, StaleGeneration, Unavailable
from oracle_server.shards.calls import Peer, read_failure
from oracle_server.shards.messages import (
    CATCH_UP,
    CLOSE_STREAM,
    FIND_EXPERIMENT,
    OPEN_STREAM,
    CatchUp,
    CloseStream,
    EndStream,
    OpenStream,
)
from oracle_server.state import names
from oracle_server.state.credentials import Admission, Credentials
from oracle_server.state.engines import EngineCounts, EngineRecord, EngineStream
from oracle_server.state.experiments import LiveExperiment, not_found
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.kernels import warm_kernels
from oracle_server.state.pack_files import PackFiles
from oracle_server.state.principal import CALLER
from oracle_server.state.rates import over_rate
from oracle_server.state.shadow import Comparison
from oracle_server.state.snapshot import LoadedPack, Snapshot
from oracle_server.state.store import ExperimentRow

_T = TypeVar("_T")

# How long packs stay mapped that are about to be activated: those of an activation that was refused go then.
PREPARED_SECONDS = 60.0
PARENT_SECONDS = 10.0
RETRY_SECONDS = (0.1, 0.5, 2.0)


class Mirror:
    """Stands where a Node stands, for the services that answer steps. Event loop only."""

    def __init__(self, state_dir: Path, parent: Peer, process: int) -> None:
        self._files = PackFiles(state_dir)
        self._parent = parent
        self._warm = False
        self._draining = False
        self._over_rate: frozenset[str] = frozenset()
        self.credentials = Credentials()
        self.experiments = MirroredExperiments()
        self.attachments = MirroredStreams(self.experiments, parent, process)

    async def tenant_of(self, experiment_name: str) -> None:
        """As Node.tenant_of; the parent is asked only about experiments that are not here."""
        if self._draining:
            raise Draining("the server is stopping; retry, here or elsewhere")
        tenant, experiment = names.parse_experiment(experiment_name, "experiment")
        CALLER.get().check_tenant(tenant)
        if tenant in self._over_rate:
            raise over_rate(tenant)
        if names.experiment_name(tenant, experiment) not in self.experiments.live:
            await self._parent.call(FIND_EXPERIMENT, names.experiment_name(tenant, experiment), PARENT_SECONDS)

    async def catch_up(self, live: LiveExperiment, generation: int) -> None:
        """As Node.catch_up: the parent asks the database, and this shard has followed when it has answered."""
        if live.snapshot.generation >= generation:
            return
        await self._parent.call(CATCH_UP, CatchUp(live.name, generation), PARENT_SECONDS)
        live.snapshot.check_generation(generation)

    async def prepare(self, digests: Sequence[str]) -> None:
        """Map packs and hold them for a while; the first time compile the kernels."""
        if not self._warm:
            await asyncio.to_thread(warm_kernels)
            self._warm = True
        held = [await self._load(digest) for digest in digests]
        asyncio.get_running_loop().call_later(PREPARED_SECONDS, held.clear)

    async def follow(self, row: ExperimentRow) -> None:
        """Answer from this generation from the next step on."""
        binding = row.current.binding
        name = names.experiment_name(row.tenant, row.experiment)
        loaded, missing = {}, {}
        for digest in binding.digests():
            pack = self._files.loaded(digest)
            if pack is None and await asyncio.to_thread(self._files.has, digest):
                pack = await self._load(digest)
            if pack is not None:
                loaded[digest] = pack
            else:
                # The parent has not got it either; it lets this generation follow anew when it has.
                missing[digest] = "the registry could not give it when the server wanted it"
        snapshot = Snapshot(name, row.current.generation, binding, loaded, missing)
        live = self.experiments.live.get(name)
        if live is None:
            self.experiments.live[name] = LiveExperiment(row, snapshot)
        else:
            live.flip(row.current, snapshot)

    async def forget(self, name: str) -> None:
        """Answer for this experiment no more."""
        self.experiments.live.pop(name, None)

    async def admit(self, admission: Admission) -> None:
        """Take these callers from now on, and end what was opened by others."""
        self._over_rate = admission.over_rate
        self.credentials.replace(admission.principals)

    def sampled(self) -> dict[str, int]:
        """Steps answered without a stream, by experiment."""
        return {name: live.sampled_steps for name, live in self.experiments.live.items()}

    async def comparisons(self, name: str) -> list[Comparison]:
        """What was compared here with the shadow packs of an experiment."""
        live = self.experiments.live.get(name)
        return [] if live is None else live.shadows.comparisons()

    def drain(self) -> None:
        """End every stream with Draining."""
        self._draining = True
        self.attachments.end_all(Draining("the server is stopping; reconnect"))

    async def _load(self, digest: str) -> LoadedPack:
        return await asyncio.to_thread(self._files.load, digest)


class MirroredExperiments:
    """The experiments by name."""

    def __init__(self) -> None:
        self.live: dict[str, LiveExperiment] = {}

    def find(self, name: str) -> LiveExperiment:
        """The experiment of that resource name; ExperimentNotFound."""
        live = self.live.get(name)
        if live is None:
            raise not_found(name)
        return live


class MirroredStreams:
    """Streams open and end only with the parent's word, one call for each; nothing is asked per step."""

    def __init__(self, experiments: MirroredExperiments, parent: Peer, process: int) -> None:
        self._experiments = experiments
        self._parent = parent
        self._process = process
        self._keys = count(1)
        # By stream: its number, and by number: the stream, and its record once the parent has agreed.
        self._key_of: dict[EngineStream, int] = {}
        self._streams: dict[int, EngineStream] = {}
        self._records: dict[int, EngineRecord] = {}
        self._running: set[asyncio.Task[Any]] = set()

    async def open_stream(
        self,
        identity: EngineIdentity,
        facts: packs.EngineFacts,
        incarnation: int,
        allowed: frozenset[str],
        stream: EngineStream,
    ) -> tuple[LiveExperiment, EngineRecord]:
        """As Attachments.open_stream."""
        key = next(self._keys)
        # Known before it is open: the parent may end it before its consent is read here.
        self._key_of[stream], self._streams[key] = key, stream
        request = OpenStream(self._process, key, identity, facts, incarnation, allowed)
        opening = self._start(self._open(request, stream))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The engine hung up meanwhile: nobody else will close what is about to be opened.
            opening.add_done_callback(lambda done: self._start(self._close(stream, by_engine=False)))
            raise

    async def close_stream(self, record: EngineRecord, stream: EngineStream, *, by_engine: bool) -> None:
        """As Attachments.close_stream; at the return the engine's id is free everywhere."""
        await asyncio.shield(self._start(self._close(stream, by_engine=by_engine)))

    def end(self, request: EndStream) -> None:
        """End a stream that a newer one has replaced, here or at another shard."""
        stream = self._streams.get(request.key)
        if stream is not None:
            stream.end(read_failure(request.failure))

    def end_all(self, error: OracleError) -> None:
        """End every stream."""
        for stream in list(self._streams.values()):
            stream.end(error)

    def counts(self) -> dict[int, EngineCounts]:
        """What the engines did on their open streams."""
        return {key: record.counts for key, record in self._records.items()}

    async def _open(self, request: OpenStream, stream: EngineStream) -> tuple[LiveExperiment, EngineRecord]:
        try:
            opened = await self._parent.call(OPEN_STREAM, request, PARENT_SECONDS)
        except BaseException as error:
            self._key_of.pop(stream, None)
            self._streams.pop(request.key, None)
            if isinstance(error, Unavailable):
                # The parent's consent may be on its way.
                self._start(self._tell_closed(CloseStream(self._process, request.key, False, EngineCounts())))
            raise
        identity = request.identity
        record = EngineRecord(
            identity,
            request.facts,
            opened.incarnation,
            opened.accepted_digest,
            request.allowed,
            since=0.0,
            stream=stream,
        )
        self._records[request.key] = record
        try:
            live = self._experiments.find(identity.experiment)
            if live.snapshot.generation < opened.generation:
                raise StaleGeneration(
                    f"{live.name} is at generation {opened.generation}, this shard at {live.snapshot.generation}; retry"
                )
        except OracleError:
            await self._close(stream, by_engine=False)
            raise
        # Where it hears of new generations. Not under its engine's id: an older stream of it may still be ending.
        live.engines[str(request.key)] = record
        return live, record

    async def _close(self, stream: EngineStream, *, by_engine: bool) -> None:
        key = self._key_of.pop(stream, None)
        if key is None:
            return
        self._streams.pop(key, None)
        record = self._records.pop(key, None)
        if record is None:
            return
        live = self._experiments.live.get(record.identity.experiment)
        if live is not None:
            live.engines.pop(str(key), None)
        await self._tell_closed(CloseStream(self._process, key, by_engine, record.counts))

    async def _tell_closed(self, request: CloseStream) -> None:
        """Tell the parent until it has heard: as long as it has not, the engine's id is taken."""
        for delay in chain(RETRY_SECONDS, repeat(RETRY_SECONDS[-1])):
            try:
                await self._parent.call(CLOSE_STREAM, request, PARENT_SECONDS)
            except OracleError:
                # It is paused or very busy. Where it has died, this process dies too.
                await asyncio.sleep(delay)
            else:
                return

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Runs to its end, whatever becomes of the caller."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Looked at here so that a failure whose caller has gone is not reported as forgotten.
            task.exception()
