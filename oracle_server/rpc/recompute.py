"""Recomputes the replies of step traces: an answer is a pure function, so every one can be checked after the fact."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from oracle_server import pack as packs
from oracle_server.errors import GenerationNotFound, InvalidArgument, OracleError, PackInvalid, PackNotFound
from oracle_server.rpc import wire
from oracle_server.rpc.client import Client
from oracle_server.state import names
from oracle_server.state.database_file import DatabaseFile
from oracle_server.state.node import DATABASE
from oracle_server.state.pack_files import COMPILED, PACKS, folder_of
from oracle_server.state.snapshot import EnginePlan, LoadedPack, Snapshot
from oracle_server.state.store import Store
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, step_pb2, trace_pb2

MAX_RECORD_BYTES = 64 << 20
MAX_SHOWN = 10
BATCH_STEPS = 256

_LENGTH = struct.Struct("<I")


@dataclass(slots=True)
class Report:
    """Counts over all traces; `examples` are the first differences, one sentence each."""

    equal: int = 0
    different: int = 0
    # Answered from a generation that cannot be asked any more, or not yet answered when the trace ended.
    skipped: int = 0
    examples: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """For people."""
        lines = [f"{self.equal} replies equal, {self.different} different, {self.skipped} skipped"]
        return "\n".join(lines + [f"  {example}" for example in self.examples])

    def compare(self, where: str, reply: step_pb2.StepReply, recomputed: step_pb2.StepReply) -> None:
        """Count one reply. A lease is no part of the answer: it says how later steps may be answered."""
        reply.ClearField("lease")
        recomputed.ClearField("lease")
        if reply == recomputed:
            self.equal += 1
            return
        self.differ(f"{where}: {_differences(reply, recomputed)}")

    def differ(self, example: str) -> None:
        """Count one difference."""
        self.different += 1
        if len(self.examples) < MAX_SHOWN:
            self.examples.append(example)


def recompute_from(state_dir: Path, traces: Sequence[Path], database: Path | None = None) -> Report:
    """Recompute every reply from the generations stored in a server's folder, which may be in use.

    With `database`, the file of a PostgreSQL's URL, the generations are from there and the packs from the folder.
    """
    report = Report()
    store = _open_store(state_dir, database)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            history = _History(store, state_dir, Path(scratch))
            for trace in traces:
                _recompute_trace(history, trace, report)
    finally:
        store.close()
    return report


def _open_store(state_dir: Path, database: Path | None) -> Store:
    if database is not None:
        file = DatabaseFile(database)
        from oracle_server.state.postgres_database import PostgresDatabase

        return Store(PostgresDatabase(file.url, alone=None))
    if not (state_dir / DATABASE).is_file():
        raise InvalidArgument(f"{state_dir} is not the folder of a server: it has no {DATABASE}", field="state_dir")
    return Store.open(state_dir / DATABASE, read_only=True)


def recompute_at(client: Client, traces: Sequence[Path]) -> Report:
    """Ask a running server again; only replies of an experiment's current generation are compared."""
    report = Report()
    for trace in traces:
        header: trace_pb2.TraceHeader | None = None
        batch: list[trace_pb2.TraceStep] = []
        for record in read_trace(trace):
            if record.HasField("header"):
                header = record.header
            elif header is not None:
                batch.append(record.step)
            if header is not None and len(batch) == BATCH_STEPS:
                _ask_again(client, trace, header, batch, report)
                batch = []
        if header is not None and batch:
            _ask_again(client, trace, header, batch, report)
    return report


def read_trace(path: Path) -> Iterator[trace_pb2.TraceRecord]:
    """Records of a trace. A record cut off at the end, as a killed engine leaves it, ends the trace."""
    try:
        with path.open("rb") as file:
            first = True
            while len(prefix := file.read(_LENGTH.size)) == _LENGTH.size:
                (size,) = _LENGTH.unpack(prefix)
                if size > MAX_RECORD_BYTES:
                    raise InvalidArgument(
                        f"{path} is not a step trace: it has a record of {size} bytes", field="traces"
                    )
                data = file.read(size)
                if len(data) < size:
                    return
                record = trace_pb2.TraceRecord.FromString(data)
                if first and not record.HasField("header"):
                    raise InvalidArgument(f"{path} is not a step trace: it begins without a header", field="traces")
                first = False
                yield record
    except (OSError, DecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read as a step trace: {error}", field="traces") from None


class _History:
    """Snapshots of stored generations, opened as they are asked for."""

    def __init__(self, store: Store, state_dir: Path, scratch: Path) -> None:
        self._store = store
        self._state_dir = state_dir
        self._scratch = scratch
        self._snapshots: dict[tuple[str, int], Snapshot] = {}
        self._packs: dict[str, LoadedPack] = {}

    def snapshot(self, experiment_name: str, generation: int) -> Snapshot:
        """GenerationNotFound, PackNotFound."""
        key = (experiment_name, generation)
        if key not in self._snapshots:
            tenant, experiment = names.parse_experiment(experiment_name, "experiment")
            row = self._store.generation(tenant, experiment, generation) if generation < 2**63 else None
            if row is None:
                raise GenerationNotFound(f"{experiment_name} has no generation {generation} in {self._state_dir}")
            loaded = {digest: self._load(digest) for digest in row.binding.answering_digests()}
            self._snapshots[key] = Snapshot(experiment_name, generation, row.binding, loaded)
        return self._snapshots[key]

    def _load(self, digest: str) -> LoadedPack:
        if digest not in self._packs:
            source = self._state_dir / PACKS / folder_of(digest)
            if not source.is_dir():
                raise PackNotFound(f"the pack {digest} is not in {self._state_dir} any more")
            try:
                compiled = packs.load_compiled(self._state_dir / COMPILED / folder_of(digest))
            except PackInvalid:
                # Of another version's layout: the server's own folder is left as it is.
                packs.compile_pack(source, self._scratch / folder_of(digest))
                compiled = packs.load_compiled(self._scratch / folder_of(digest))
            self._packs[digest] = LoadedPack(digest, compiled.manifest, packs.open_oracle(compiled))
        return self._packs[digest]


def _recompute_trace(history: _History, trace: Path, report: Report) -> None:
    identity = None
    plans: dict[int, EnginePlan] = {}
    for record in read_trace(trace):
        if record.HasField("header"):
            identity = wire.read_identity(record.header.engine)
            plans = {}
            continue
        step = record.step
        generation = step.reply.generation
        if identity is None or not generation:
            report.skipped += 1
            continue
        where = f"{trace.name} step {step.request.step_index} generation {generation}"
        recomputed = step_pb2.StepReply()
        try:
            if generation not in plans:
                plans[generation] = history.snapshot(identity.experiment, generation).plan(identity)
            query, drafts, new_requests = wire.read_step(step.request)
            asked = step.request
            answer = plans[generation].answer(
                asked.step_index, query, drafts, new_requests, asked.device_time_ns, asked.device_idle_ns
            )
        except (GenerationNotFound, PackNotFound):
            report.skipped += 1
            continue
        except OracleError as error:
            report.differ(f"{where}: it was answered, and is refused now: {error.message}")
            continue
        wire.write_reply(recomputed, step.request.step_index, generation, answer)
        report.compare(where, step.reply, recomputed)


def _ask_again(
    client: Client, trace: Path, header: trace_pb2.TraceHeader, batch: Iterable[trace_pb2.TraceStep], report: Report
) -> None:
    name = experiment_pb2.GetExperimentRequest(name=header.engine.experiment)
    current = client.call(client.experiments.GetExperiment, name).experiment.generation
    steps = [step for step in batch if step.reply.generation == current]
    report.skipped += sum(1 for _ in batch) - len(steps)
    if not steps:
        return
    request = oracle_service_pb2.SampleStepRequest(
        engine=header.engine, steps=[step.request for step in steps], min_generation=current
    )
    replies = client.call(client.oracle.SampleStep, request).replies
    for step, reply in zip(steps, replies, strict=True):
        if reply.generation != current:
            # Somebody activated another one in between.
            report.skipped += 1
        else:
            where = f"{trace.name} step {step.request.step_index} generation {current}"
            report.compare(where, step.reply, reply)


def _differences(reply: step_pb2.StepReply, recomputed: step_pb2.StepReply) -> str:
    differing = []
    for descriptor in step_pb2.StepReply.DESCRIPTOR.fields:
        answered, again = getattr(reply, descriptor.name), getattr(recomputed, descriptor.name)
        if answered != again:
            differing.append(f"{descriptor.name} was {_plain(answered)}, recomputed {_plain(again)}")
    return "; ".join(differing)[:500]


def _plain(value: Any) -> str:
    return str(value).replace("\n", " ")
