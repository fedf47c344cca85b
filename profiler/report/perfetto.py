"""Steps of a run as a trace that Perfetto and Chrome open: dispatch, device, lateness."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oracle_server.cli.traces import timed_steps
from oracle_server.errors import InvalidArgument

Event = dict[str, Any]
_DEVICE, _ENGINE = 1, 2


class DrawnStep(NamedTuple):
    """One step; times in nanoseconds of one clock, None where the run has no such moment."""

    step_index: int
    dispatch_ns: int
    device_start_ns: int
    device_finish_ns: int
    result_ns: int
    deadline_ns: int | None
    answer_ns: int | None
    num_decode_requests: int
    prefill_tokens: int
    support: str


def write_perfetto(paths: Sequence[Path], output: Path) -> int:
    """Writes one JSON file for all traces and captures; the number of steps in it."""
    engines = [engine for path in paths for engine in read_engines(path)]
    document = perfetto(engines)
    try:
        output.write_text(json.dumps(document), encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"{output} cannot be written: {error}", field="output") from error
    return sum(len(steps) for _, steps in engines)


def read_engines(path: Path) -> list[tuple[str, list[DrawnStep]]]:
    """Engines and steps of a step trace of the shim, or of a capture's folder."""
    if path.is_dir():
        from profiler.capture.steps import read_capture

        return [
            (
                run.name,
                [
                    DrawnStep(
                        *(step.step_index, step.dispatch_ns, step.device_start_ns, step.device_end_ns, step.result_ns),
                        *(None, None, step.num_decode_requests, sum(step.chunk_tokens), "measured"),
                    )
                    for step in run.steps
                ],
            )
            for run in read_capture(path)
        ]
    engine, steps = timed_steps(path)
    if not steps:
        raise InvalidArgument(f"{path} holds no step", field="trace")
    drawn = [
        DrawnStep(
            *(step.step_index, step.dispatch_ns, step.device_start_ns, step.device_finish_ns, step.resolved_ns),
            *(step.deadline_ns, step.answer_ns, step.num_decode_requests, step.prefill_tokens, step.support),
        )
        for step in steps
    ]
    return [(engine, drawn)]


def perfetto(engines: Sequence[tuple[str, Sequence[DrawnStep]]]) -> dict[str, Any]:
    """The Trace Event Format document: a process per engine, times in microseconds from the first dispatch."""
    begin_ns = min((step.dispatch_ns for _, steps in engines for step in steps), default=0)
    events: list[Event] = []
    for process, (engine, steps) in enumerate(engines, start=1):
        events += _names(process, engine)
        for step in steps:
            events += _events(process, step, begin_ns)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"written by": "step-oracle trace perfetto"}}


def _names(process: int, engine: str) -> Iterable[Event]:
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": f"engine {engine}"}}
    for thread, name in ((_DEVICE, "device"), (_ENGINE, "engine")):
        yield {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": process, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}


def _events(process: int, step: DrawnStep, begin_ns: int) -> Iterator[Event]:
    def microseconds(time_ns: int) -> float:
        return (time_ns - begin_ns) / 1e3

    kind = "mixed" if step.prefill_tokens else "decode"
    facts: dict[str, Any] = {
        "step_index": step.step_index,
        "decode_requests": step.num_decode_requests,
        "prefill_tokens": step.prefill_tokens,
        "latency_us": (step.device_finish_ns - step.device_start_ns) / 1e3,
        "support": step.support,
    }
    lateness_us = None if step.deadline_ns is None else (step.result_ns - step.deadline_ns) / 1e3
    if lateness_us is not None:
        facts["lateness_us"] = lateness_us
    where = {"pid": process, "tid": _DEVICE}
    yield {
        **where,
        "ph": "X",
        "cat": "device",
        "name": kind,
        "ts": microseconds(step.device_start_ns),
        "dur": (step.device_finish_ns - step.device_start_ns) / 1e3,
        "args": facts,
    }
    # Steps in flight overlap under asynchronous scheduling: pairs with an id may, slices of one thread may not.
    spans = [("dispatch to result", step.dispatch_ns, step.result_ns)]
    if step.answer_ns is not None:
        spans.append(("oracle", step.dispatch_ns, max(step.answer_ns, step.dispatch_ns)))
    for name, from_ns, to_ns in spans:
        pair = {"pid": process, "tid": _ENGINE, "cat": name, "name": name, "id": step.step_index}
        yield {**pair, "ph": "b", "ts": microseconds(from_ns), "args": {"step_index": step.step_index, "kind": kind}}
        yield {**pair, "ph": "e", "ts": microseconds(to_ns)}
    counter = {"pid": process, "ph": "C"}
    at = microseconds(step.dispatch_ns)
    yield {**counter, "name": "decode requests", "ts": at, "args": {"requests": step.num_decode_requests}}
    yield {**counter, "name": "prefill tokens", "ts": at, "args": {"tokens": step.prefill_tokens}}
    if lateness_us is not None:
        yield {**counter, "name": "lateness", "ts": microseconds(step.result_ns), "args": {"microseconds": lateness_us}}
