"""Overlays over a real channel: who is touched, what it costs them, and that every answer recomputes."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from builders import build_composed_pack
from oracle_calls import EXPERIMENT, TIMEOUT, Calls, Stream, decode, identity, info_of, mixed_steps, reason_of
from oracle_process import OracleProcess
from oracle_server.rpc.recompute import recompute_at, recompute_from
from sharded_server import wait_for
from step_oracle.v1 import experiment_pb2 as pb
from step_oracle.v1 import oracle_service_pb2, step_pb2, trace_pb2

Dirs = dict[str, Path]
HOUR_NS = 3_600_000_000_000
STALL_NS = 50_000_001


def overlay(binding: pb.Binding, *overlays: pb.Overlay) -> dict[str, Any]:
    """What to activate so that a binding goes on with these overlays."""
    return {"seed": binding.seed, "overlays": overlays}


def with_device_time(steps: Iterable[step_pb2.StepRequest], step_ns: int) -> list[step_pb2.StepRequest]:
    """The steps of an engine whose device is busy for `step_ns` in each."""
    asked = []
    for step in steps:
        asked.append(step_pb2.StepRequest())
        asked[-1].CopyFrom(step)
        asked[-1].device_time_ns = step.step_index * step_ns
    return asked


def latencies(replies: Iterable[step_pb2.StepReply]) -> list[int]:
    return [reply.latency_ns[0] for reply in replies]


def join(calls: Calls, engine_id: str) -> Stream:
    """An engine that evaluates leases."""
    engine = identity(engine_id)
    stream = Stream(calls.oracle)
    opening = oracle_service_pb2.StreamOpen(engine=engine, incarnation=calls.attach(engine).incarnation, leases=True)
    stream.send(open=opening)
    stream.opened = stream.receive().opened
    return stream


class Trace:
    """A step trace as a shim writes it."""

    def __init__(self, path: Path, engine_id: str) -> None:
        self.path = path
        self._records = [trace_pb2.TraceRecord(header=trace_pb2.TraceHeader(engine=identity(engine_id)))]

    def add(self, steps: Iterable[step_pb2.StepRequest], replies: Iterable[step_pb2.StepReply]) -> None:
        for step, reply in zip(steps, replies, strict=True):
            self._records.append(trace_pb2.TraceRecord(step=trace_pb2.TraceStep(request=step, reply=reply)))
        with self.path.open("wb") as file:
            for data in (record.SerializeToString() for record in self._records):
                file.write(struct.pack("<I", len(data)) + data)


def test_every_answer_under_overlays_recomputes(
    calls: Calls, server: OracleProcess, pack_dirs: Dirs, tmp_path: Path
) -> None:
    digest = calls.upload(pack_dirs["composed"])
    experiment = calls.create(digest, seed=2**64 - 1)
    stream, trace = calls.join("traced"), Trace(tmp_path / "traced.trace", "traced")
    asked = with_device_time(mixed_steps(400), HOUR_NS // 100)
    for overlays in (
        (),
        (pb.Overlay(slow_down_factor=1.3), pb.Overlay(slow_down_factor=1.7, begin_step_index=100, end_step_index=200)),
        (pb.Overlay(stall_every_steps=20, stall_ns=STALL_NS, end_device_time_ns=2 * HOUR_NS),),
        (pb.Overlay(error_every_steps=30), pb.Overlay(degradation_per_hour=0.2, begin_device_time_ns=HOUR_NS)),
    ):
        calls.activate(digest, **overlay(experiment.binding, *overlays), time_scale=0.7)
        trace.add(asked, stream.ask(*asked))
    replies = stream.ask(*asked)
    stream.close()
    assert sum(reply.injected_error for reply in replies) > 3

    whole = recompute_from(server.state_dir, [trace.path])
    assert (whole.equal, whole.different, whole.skipped) == (1600, 0, 0)
    present = recompute_at(calls.client, [trace.path])
    assert (present.equal, present.different, present.skipped) == (400, 0, 1200)
    # A device that had been busy for another time would have been answered otherwise.
    for step in asked:
        step.device_time_ns += HOUR_NS
    trace.add(asked, replies)
    assert recompute_from(server.state_dir, [trace.path]).different > 300


def test_a_step_after_a_pause_is_answered_from_the_pack_s_curve_and_recomputes(
    calls: Calls, server: OracleProcess, tmp_path: Path
) -> None:
    build_composed_pack(tmp_path / "pack", prep_ns=500, wake=[(60_000_000, 8_000), (1_000_000_000, 20_000)])
    calls.create(calls.upload(tmp_path / "pack"), time_scale=0.5)
    stream, trace = calls.join("traced"), Trace(tmp_path / "traced.trace", "traced")
    asked = with_device_time(mixed_steps(8), 0)
    pauses = [0, 60_000_000, 0, 530_000_000, 1_000_000_000, 10**13, 0, 90_000_000]
    for step, pause in zip(asked, pauses, strict=True):
        step.device_idle_ns = pause
    replies = stream.ask(*asked)
    stream.close()

    assert [reply.prep_ns - 250 for reply in replies] == [0, 4_000, 0, 7_000, 10_000, 10_000, 0, 4_191]
    trace.add(asked, replies)
    assert recompute_from(server.state_dir, [trace.path]).equal == 8
    assert recompute_at(calls.client, [trace.path]).equal == 8
    asked[0].device_idle_ns = 60_000_000
    other = Trace(tmp_path / "other.trace", "traced")
    other.add(asked, replies)
    assert recompute_at(calls.client, [other.path]).different == 1


def test_a_factor_on_three_of_ten_engines_is_recovered_on_those_and_nobody_else_moves(
    calls: Calls, pack_dirs: Dirs
) -> None:
    digest = calls.upload(pack_dirs["hybrid"])
    experiment = calls.create(digest, seed=3)
    engines = [f"server-{i}/dp{i % 2}" for i in range(10)]
    steps = mixed_steps(300)
    before = {engine: latencies(calls.sample(identity(engine), steps)) for engine in engines}
    slow = {"server-1", "server-4", "server-9"}
    calls.activate(digest, **overlay(experiment.binding, pb.Overlay(slow_down_factor=1.25, engine_ids=sorted(slow))))
    for engine in engines:
        after = latencies(calls.sample(identity(engine), steps))
        if engine.partition("/")[0] in slow:
            assert sum(after) / sum(before[engine]) == pytest.approx(1.25, rel=0.01)
            assert all(abs(new / old - 1.25) < 0.01 for new, old in zip(after, before[engine], strict=True))
        else:
            assert after == before[engine]


def test_rolled_back_overlays_are_gone_and_the_answers_are_those_of_before(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["composed"])
    experiment = calls.create(digest, seed=5)
    steps = mixed_steps(100)
    before = calls.sample(identity("e"), steps)
    calls.activate(
        digest, **overlay(experiment.binding, pb.Overlay(slow_down_factor=2, stall_every_steps=3, stall_ns=9))
    )
    assert latencies(calls.sample(identity("e"), steps)) != latencies(before)
    calls.experiments.RollBackExperiment(pb.RollBackExperimentRequest(name=EXPERIMENT), timeout=TIMEOUT)
    after = calls.sample(identity("e"), steps)
    for reply in before:
        reply.generation = 3
    assert after == before


def test_leases_end_for_exactly_the_engines_that_a_schedule_touches(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["composed"])
    experiment = calls.create(digest, seed=1)
    constant, varying = pb.Overlay(slow_down_factor=1.5), pb.Overlay(slow_down_factor=2, end_step_index=7)
    varying.engine_ids.append("touched")
    streams = {name: join(calls, name) for name in ("touched", "other")}
    seen: list[dict[str, bool]] = []
    for overlays in ((constant,), (constant, varying), (constant,)):
        calls.activate(digest, **overlay(experiment.binding, *overlays))
        seen.append({name: stream.ask(decode(len(seen)))[0].HasField("lease") for name, stream in streams.items()})
    assert seen == [
        {"touched": True, "other": True},
        {"touched": False, "other": True},
        {"touched": True, "other": True},
    ]
    for stream in streams.values():
        stream.close()


def test_stalls_are_as_long_and_as_frequent_as_they_should_be(calls: Calls, pack_dirs: Dirs) -> None:
    """4,000 steps, one in 25: 160 stalls, five standard deviations are 62."""
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest, overlays=[pb.Overlay(stall_every_steps=25, stall_ns=STALL_NS, engine_ids=["e"])])
    replies = calls.sample(identity("e"), [decode(i) for i in range(4000)])
    stalled = [reply for reply in replies if reply.injected_stall_ns]
    assert abs(len(stalled) - 160) <= 62
    assert {(reply.injected_stall_ns, reply.latency_ns[0]) for reply in stalled} == {(STALL_NS, 10_000_000 + STALL_NS)}
    assert {r.latency_ns[0] for r in replies if not r.injected_stall_ns} == {10_000_000}
    assert not any(r.injected_stall_ns for r in calls.sample(identity("f"), [decode(i) for i in range(1000)]))


def test_an_injected_error_is_an_answer_counted_and_logged(
    calls: Calls, server: OracleProcess, pack_dirs: Dirs
) -> None:
    calls.create(calls.upload(pack_dirs["constant"]), overlays=[pb.Overlay(error_every_steps=1, begin_step_index=2)])
    stream = calls.join("e")
    replies = stream.ask(*[decode(i) for i in range(4)])
    stream.close()
    assert [reply.injected_error for reply in replies] == [False, False, True, True]
    assert latencies(replies) == [10_000_000] * 4
    # It is named once: an engine ends by the first.
    wait_for(lambda: server.log.count("injected error") == 1)


BAD = {
    "binding.overlays[0].stall_ns": pb.Overlay(stall_every_steps=5),
    "binding.overlays[0].end_step_index": pb.Overlay(slow_down_factor=2, begin_step_index=9, end_step_index=9),
    "binding.overlays[0].degradation_per_hour": pb.Overlay(degradation_per_hour=float("nan")),
    "binding.overlays[0].slow_down_factor": pb.Overlay(slow_down_factor=-1),
    "binding.overlays[0].engine_ids": pb.Overlay(slow_down_factor=2, engine_ids=["\n"]),
    "binding.overlays[0]": pb.Overlay(labels={"a": "b"}),
}


@pytest.mark.parametrize("field", BAD)
def test_an_overlay_that_cannot_be_is_refused_with_its_field(field: str, shared: Calls) -> None:
    request = pb.GetExperimentRequest(name=EXPERIMENT)
    digest = shared.experiments.GetExperiment(request, timeout=TIMEOUT).experiment.binding.default_pack_digest
    with pytest.raises(grpc.RpcError) as caught:
        shared.activate(digest, overlays=[BAD[field]])
    assert reason_of(caught.value) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    assert info_of(caught.value).metadata["field"] == field
