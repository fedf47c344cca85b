"""A capture read back: its runs, each with its steps in order, its facts, and what the capture itself cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from oracle_server.errors import InvalidArgument
from profiler.capture.launch import runs_of
from profiler.capture.trace_file import MAGIC, CaptureFile, read_capture_file, read_records
from step_oracle.v1 import capture_pb2 as pb
from vllm_shim.timeline import SHORTEST_IDLE_NS

PLAN_FILE = "plan.jsonl"
# Workers and scheduler count steps from one beginning; more than this between them is no delay but another run.
_MOST_OFFSET = 64
_LOOKED_AT = 512
_ENOUGH_TO_ALIGN = 16


class CapturedStep(NamedTuple):
    """One step, from the scheduler and all ranks. Times in nanoseconds of CLOCK_MONOTONIC.

    Of several ranks the device's times are those of the one that was busy longest: collectives bind them, so that is
    how long the step took. Ends of different ranks are not compared: their clocks drift apart (device_times.py).
    """

    step_index: int
    chunk_tokens: tuple[int, ...]
    chunk_context: tuple[int, ...]
    num_decode_requests: int
    num_decode_tokens: int
    decode_context_tokens: int
    max_decode_context_tokens: int
    previous_prefill_tokens: int
    num_new_requests: int
    generated_tokens: int
    dispatch_ns: int
    device_start_ns: int
    device_end_ns: int
    result_ns: int
    # The device had nothing to do when the step came.
    was_idle: bool
    # In the warm-up phase of a plan.
    warm_up: bool
    # From the result before to the dispatch, without the capture's own time; 0: not known (capture.proto).
    host_ns: int = 0

    @property
    def latency_ns(self) -> int:
        """Device-busy time."""
        return self.device_end_ns - self.device_start_ns

    @property
    def total_tokens(self) -> int:
        return sum(self.chunk_tokens) + self.num_decode_tokens


def idle_ns(steps: Sequence[CapturedStep]) -> list[int]:
    """Of each step of a run, how long the device had had nothing to do, as StepRequest.device_idle_ns counts it."""
    pauses = [0, *(after.dispatch_ns - before.device_end_ns for before, after in pairwise(steps))]
    return [pause if pause >= SHORTEST_IDLE_NS else 0 for pause in pauses[: len(steps)]]


@dataclass(frozen=True)
class Overhead:
    """What the capture took, per step in microseconds, and of a step's time in percent.

    `beside_us`: the writers, and what the engine core does for it while the device works.
    """

    scheduler_us: float
    worker_us: float
    beside_us: float
    step_us: float

    @property
    def percent(self) -> float:
        return 100 * (self.scheduler_us + self.worker_us) / self.step_us if self.step_us else 0.0


@dataclass(frozen=True)
class CapturedRun:
    """One engine core, from its start to its end or to where it was killed."""

    name: str
    steps: tuple[CapturedStep, ...]
    # engine.json, and rank-N.json of every rank.
    engine: Mapping[str, Any]
    ranks: tuple[Mapping[str, Any], ...]
    timing: str
    overhead: Overhead
    # What was cut or could not be joined, a sentence each.
    notes: tuple[str, ...] = ()


def read_capture(folder: Path) -> list[CapturedRun]:
    """All runs of a capture folder, or the one run that `folder` is. Raises InvalidArgument saying what is missing.

    A run that cannot be read, of an engine that was killed while it started, is left out: a note of the first run says
    so.
    """
    runs = runs_of(folder) or [folder]
    found, unreadable = [], []
    for run in runs:
        for scheduler in sorted(run.glob("engine*.capture")):
            try:
                found.append(read_run(run, scheduler))
            except InvalidArgument as error:
                unreadable.append(f"{run.name} is left out: {error.message}")
    if not found:
        reason = "; ".join(unreadable) or (
            f"{folder} holds no run-*/engine.capture: it is no capture, or the engine never started"
        )
        raise InvalidArgument(reason, field="capture")
    found[0] = replace(found[0], notes=(*found[0].notes, *unreadable))
    return found


def read_run(run: Path, scheduler: Path) -> CapturedRun:
    """One engine core's files joined."""
    suffix = scheduler.stem.removeprefix("engine")
    workers = [
        path
        for path in sorted(run.glob("rank-*.capture"))
        if path.stem.partition("-dp")[2] == suffix.removeprefix("-dp")
    ]
    files = [read_capture_file(path) for path in (scheduler, *workers)]
    notes = [f"{file.path.name}: {file.cut_bytes} bytes cut, {file.reason}" for file in files if file.cut_bytes]
    scheduled = _scheduled(files[0])
    ranks = [_device_steps(file) for file in files[1:]]
    facts = _facts(run / f"engine{suffix}.json")
    expected = facts.get("engine", {}).get("tensor_parallel_size", 1)
    if not ranks:
        notes.append("no rank wrote a file, so no step has a latency")
    elif len(ranks) < expected:
        notes.append(f"{len(ranks)} of {expected} ranks wrote a file here: the others' times are not known")
    ranks = [_aligned(scheduled, rank, file.path.name, notes) for rank, file in zip(ranks, files[1:], strict=True)]
    warm_up = _warm_up_phases(run)
    steps, unmatched = [], 0
    for index, (base, step) in scheduled.items():
        found = [rank[index] for rank in ranks if index in rank]
        if not found or len(found) < len(ranks):
            unmatched += 1
            continue
        steps.append(_joined(base, step, found, warm_up))
    if unmatched:
        notes.append(f"{unmatched} of {len(scheduled)} steps are not in every rank's file")
    timing = pb.CaptureTiming.Name(files[1].header.timing) if len(files) > 1 else ""
    return CapturedRun(
        name=run.name + suffix,
        steps=tuple(steps),
        engine=facts,
        ranks=tuple(_facts(path.with_suffix(".json")) for path in workers),
        timing=timing.removeprefix("CAPTURE_TIMING_").lower(),
        overhead=_overhead(files[0], files[1:], steps),
        notes=tuple(notes),
    )


class RunTail:
    """Reads a run that is still written: each call of `new_steps` joins what came since the last. One thread.

    Steps that are not in every file yet wait for the next call; nothing comes before so many are there that scheduler
    and workers can be told to count alike, or how far apart. Of several data-parallel ranks it follows the first.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._scheduled: dict[int, _Scheduled] = {}
        workers = (path for path in sorted(run.glob("rank-*.capture")) if "-dp" not in path.stem)
        self._ranks: dict[Path, dict[int, _Device]] = {path: {} for path in workers}
        self._ahead: dict[Path, int] = {}
        self._offsets: dict[Path, int] = {}

    def new_steps(self) -> list[CapturedStep]:
        """Steps that are whole now and were not before, in order."""
        for record in self._new_records(self._run / "engine.capture"):
            self._scheduled |= {step.step_index: (record.scheduled.base_ns, step) for step in record.scheduled.steps}
        for path, rank in self._ranks.items():
            for record in self._new_records(path):
                rank |= {step.step_index: (record.device.base_ns, step) for step in record.device.steps}
            if path not in self._ahead and min(len(self._scheduled), len(rank)) >= _ENOUGH_TO_ALIGN:
                self._ahead[path] = _ahead(self._scheduled, rank)
        if not self._ranks or len(self._ahead) < len(self._ranks):
            return []
        warm_up, joined = _warm_up_phases(self._run), []
        for index in sorted(self._scheduled):
            if any(index + self._ahead[path] not in rank for path, rank in self._ranks.items()):
                continue
            found = [rank.pop(index + self._ahead[path]) for path, rank in self._ranks.items()]
            scheduled = self._scheduled.pop(index)
            if all(_is_same(scheduled, device) for device in found):
                joined.append(_joined(*scheduled, found, warm_up))
        return joined

    def _new_records(self, path: Path) -> Sequence[pb.CaptureRecord]:
        at = self._offsets.get(path, len(MAGIC))
        with path.open("rb") as file:
            file.seek(at)
            records, end, _ = read_records(file.read(), 0)
        self._offsets[path] = at + end
        return records


_Scheduled = tuple[int, pb.ScheduledStep]
_Device = tuple[int, pb.DeviceStep]


def _scheduled(file: CaptureFile) -> dict[int, _Scheduled]:
    return {
        step.step_index: (record.scheduled.base_ns, step) for record in file.records for step in record.scheduled.steps
    }


def _device_steps(file: CaptureFile) -> dict[int, _Device]:
    return {step.step_index: (record.device.base_ns, step) for record in file.records for step in record.device.steps}


def _aligned(
    scheduled: Mapping[int, _Scheduled], rank: dict[int, _Device], name: str, notes: list[str]
) -> dict[int, _Device]:
    """The rank's steps by the scheduler's index: both count from 0, unless something else called the worker too."""
    ahead = _ahead(scheduled, rank)
    if ahead:
        notes.append(f"{name} counts its steps {ahead} away from the scheduler")
    return {
        index: rank[index + ahead]
        for index, step in scheduled.items()
        if index + ahead in rank and _is_same(step, rank[index + ahead])
    }


def _ahead(scheduled: Mapping[int, _Scheduled], rank: Mapping[int, _Device]) -> int:
    """How far the rank's count is ahead of the scheduler's: where most of the first steps fit."""
    first = list(scheduled.items())[:_LOOKED_AT]
    fits: Counter[int] = Counter()
    for offset in range(-_MOST_OFFSET, _MOST_OFFSET + 1):
        fits[offset] = sum(index + offset in rank and _is_same(step, rank[index + offset]) for index, step in first)
    return max(fits, key=lambda offset: (fits[offset], -abs(offset)))


def _is_same(scheduled: _Scheduled, device: _Device) -> bool:
    """Whether a worker's call can be this step: as many tokens, between its dispatch and its result."""
    (base, step), (device_base, call) = scheduled, device
    entry_ns = device_base + call.entry_ns
    is_within = base + step.dispatch_ns <= entry_ns <= base + step.result_ns
    return is_within and call.total_tokens == _total(step)


def _joined(
    base: int, step: pb.ScheduledStep, found: Sequence[_Device], warm_up: Sequence[tuple[int, int]]
) -> CapturedStep:
    shape, dispatch_ns = step.shape, base + step.dispatch_ns
    rank_base, longest = max(found, key=lambda each: each[1].end_ns - each[1].start_ns)
    return CapturedStep(
        step_index=step.step_index,
        chunk_tokens=tuple(chunk.num_tokens for chunk in shape.prefill_chunks),
        chunk_context=tuple(chunk.context_tokens for chunk in shape.prefill_chunks),
        num_decode_requests=shape.num_decode_requests,
        num_decode_tokens=shape.num_decode_tokens,
        decode_context_tokens=shape.decode_context_tokens,
        max_decode_context_tokens=shape.max_decode_context_tokens,
        previous_prefill_tokens=shape.previous_prefill_tokens,
        num_new_requests=len(shape.new_requests),
        generated_tokens=step.generated_tokens,
        dispatch_ns=dispatch_ns,
        device_start_ns=rank_base + longest.start_ns,
        device_end_ns=rank_base + longest.end_ns,
        result_ns=base + step.result_ns,
        was_idle=all(rank.was_idle for _, rank in found),
        warm_up=any(begin <= dispatch_ns < end for begin, end in warm_up),
        host_ns=step.host_ns,
    )


def _total(step: pb.ScheduledStep) -> int:
    return sum(chunk.num_tokens for chunk in step.shape.prefill_chunks) + step.shape.num_decode_tokens


def _overhead(scheduler: CaptureFile, workers: Sequence[CaptureFile], steps: Sequence[CapturedStep]) -> Overhead:
    """Per step; its time is the device's, since dispatch to result spans about two steps under asynchronous scheduling.
    Ranks work side by side: the slowest one's hooks count."""

    def of(file: CaptureFile) -> tuple[float, float]:
        blocks = [record.scheduled if record.HasField("scheduled") else record.device for record in file.records]
        count = sum(len(block.steps) for block in blocks) or 1
        hooks, writer = (sum(getattr(block, name) for block in blocks) for name in ("hook_ns", "writer_cpu_ns"))
        beside = writer + sum(record.scheduled.beside_ns for record in file.records)
        return hooks / count / 1e3, beside / count / 1e3

    each = [of(file) for file in workers] or [(0.0, 0.0)]
    hooks, beside = of(scheduler)
    step_us = sum(step.latency_ns for step in steps) / max(1, len(steps)) / 1e3
    return Overhead(hooks, max(hook for hook, _ in each), beside + max(cpu for _, cpu in each), step_us)


def _warm_up_phases(run: Path) -> list[tuple[int, int]]:
    """(begin, end) of the plan's warm-ups; one that did not end lasts for ever."""
    path = run / PLAN_FILE
    if not path.exists():
        return []
    phases: list[tuple[int, int]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "warm-up begins":
            phases.append((event["monotonic_ns"], 1 << 62))
        elif event.get("event") == "warm-up ends" and phases:
            phases[-1] = (phases[-1][0], event["monotonic_ns"])
    return phases


def _facts(path: Path) -> Mapping[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", field="capture") from None
    return facts if isinstance(facts, dict) else {}
