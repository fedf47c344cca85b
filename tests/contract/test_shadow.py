"""A shadow pack beside the one that answers: what it shows equals an offline evaluation of the same steps."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import grpc
import pytest

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, Stream, decode, identity, mixed_steps, reason_of
from oracle_process import OracleProcess
from oracle_server import pack as packs
from oracle_server.rpc import wire
from oracle_server.state.snapshot import LoadedPack, Snapshot
from sharded_server import wait_for
from step_oracle.v1 import experiment_pb2 as pb
from step_oracle.v1 import oracle_service_pb2, step_pb2

Dirs = dict[str, Path]
HOUR_NS = 3_600_000_000_000
BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, float("inf"))


def report_of(calls: Calls, steps: int, name: str = EXPERIMENT, generation: int = 0) -> pb.GetShadowReportResponse:
    """The report once so many steps are compared: they are after their replies."""
    found = pb.GetShadowReportResponse()

    def is_complete() -> bool:
        try:
            request = pb.GetShadowReportRequest(name=name, generation=generation)
            found.CopyFrom(calls.experiments.GetShadowReport(request, timeout=TIMEOUT))
        except grpc.RpcError as error:
            if reason_of(error) != ("NOT_FOUND", "GENERATION_NOT_FOUND"):
                raise
        return sum(region.steps for region in found.regions) >= steps

    wait_for(is_complete)
    return found


def loaded(directory: Path, digest: str, scratch: Path) -> LoadedPack:
    packs.compile_pack(directory, scratch / digest[7:20])
    compiled = packs.load_compiled(scratch / digest[7:20])
    return LoadedPack(digest, compiled.manifest, packs.open_oracle(compiled))


def offline(
    binding: pb.Binding, loaded_packs: dict[str, LoadedPack], asked: dict[str, list[step_pb2.StepRequest]]
) -> list[pb.ShadowRegion]:
    """The same regions from both packs, asked one after the other: each as if it were the one that is bound."""
    pairs: dict[tuple[bool, int, int], list[tuple[int, int]]] = defaultdict(list)
    for engine_id, steps in asked.items():
        engine = wire.read_identity(identity(engine_id))
        plans = []
        for digest in (binding.default_pack_digest, binding.shadow_pack_digest):
            alone = pb.Binding()
            alone.CopyFrom(binding)
            alone.default_pack_digest, alone.shadow_pack_digest = digest, ""
            plans.append(Snapshot(EXPERIMENT, 1, wire.read_binding(alone), loaded_packs).plan(engine))
        for step in steps:
            query, drafts, new = wire.read_step(step)
            one, two = (plan.answer(step.step_index, query, drafts, new, step.device_time_ns) for plan in plans)
            pairs[bool(query.chunk_tokens), one.support, two.support].append((one.latency_ns, two.latency_ns))
    regions = []
    for (mixed, support, shadow_support), latencies in sorted(pairs.items()):
        differences = [two - one for one, two in latencies]
        shares = [abs(two - one) / one for one, two in latencies]
        regions.append(
            pb.ShadowRegion(
                mixed=mixed,
                support=support,  # type: ignore[arg-type]
                shadow_support=shadow_support,  # type: ignore[arg-type]
                steps=len(latencies),
                latency_ns=sum(one for one, _ in latencies),
                shadow_latency_ns=sum(two for _, two in latencies),
                absolute_difference_ns=sum(map(abs, differences)),
                min_difference_ns=min(differences),
                max_difference_ns=max(differences),
                longer_steps=sum(d > 0 for d in differences),
                shorter_steps=sum(d < 0 for d in differences),
                relative_difference_buckets=[
                    sum(low < share <= high for share in shares)
                    for low, high in zip((-1.0, *BOUNDS), BOUNDS, strict=False)
                ],
            )
        )
    return regions


def steps_of(count: int, shift: int) -> list[step_pb2.StepRequest]:
    asked = mixed_steps(count)
    for step in asked:
        step.device_time_ns = (step.step_index + shift) * HOUR_NS // 50
    return asked


@pytest.mark.parametrize(("answering", "shadow"), [("composed", "hybrid"), ("sampled", "constant20")])
def test_the_differences_equal_an_offline_evaluation(
    answering: str, shadow: str, calls: Calls, pack_dirs: Dirs, tmp_path: Path
) -> None:
    digests = [calls.upload(pack_dirs[name]) for name in (answering, shadow)]
    overlays = [pb.Overlay(slow_down_factor=1.1), pb.Overlay(degradation_per_hour=0.3, engine_ids=["b"])]
    overlays.append(pb.Overlay(stall_every_steps=9, stall_ns=7_000_001))
    created = calls.create(digests[0], seed=77, shadow_pack_digest=digests[1], overlays=overlays, time_scale=0.9)
    asked = {"a": steps_of(250, 0), "b": steps_of(150, 9)}
    for engine_id, steps in asked.items():
        stream = calls.join(engine_id)
        alone = calls.sample(identity(engine_id), steps)
        assert stream.ask(*steps[:7]) + [reply for step in steps[7:] for reply in stream.ask(step)] == alone
        stream.close()
    report = report_of(calls, 400)
    names = zip((answering, shadow), digests, strict=True)
    both = {digest: loaded(pack_dirs[name], digest, tmp_path) for name, digest in names}
    assert list(report.regions) == offline(created.binding, both, asked)
    assert [engine.engine_id for engine in report.engines] == ["a", "b"]
    for engine in report.engines:
        only = {engine.engine_id: asked[engine.engine_id]}
        assert list(engine.regions) == offline(created.binding, both, only)
        assert engine.pack_digest == digests[0]
    assert (report.generation, report.shadow_pack_digest) == (1, digests[1])


def test_a_shadow_ends_leases_changes_no_answer_and_keeps_generations_apart(calls: Calls, pack_dirs: Dirs) -> None:
    one, other = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
    calls.create(one)
    engine = identity("e")
    stream = Stream(calls.oracle)
    incarnation = calls.attach(engine).incarnation
    stream.send(open=oracle_service_pb2.StreamOpen(engine=engine, incarnation=incarnation, leases=True))
    stream.receive()
    assert stream.ask(decode(0))[0].HasField("lease")
    with pytest.raises(grpc.RpcError) as caught:
        calls.experiments.GetShadowReport(pb.GetShadowReportRequest(name=EXPERIMENT), timeout=TIMEOUT)
    assert reason_of(caught.value) == ("NOT_FOUND", "GENERATION_NOT_FOUND")
    calls.activate(one, shadow_pack_digest=other)
    for i in range(1, 11):
        reply = stream.ask(decode(i))[0]
        assert (reply.latency_ns[0], reply.HasField("lease")) == (10_000_000, False)
    report_of(calls, 10)
    calls.activate(other, shadow_pack_digest=one)
    stream.ask(*[decode(i) for i in range(11, 16)])
    second = report_of(calls, 5, generation=3)
    first = report_of(calls, 10, generation=2)
    assert [(r.latency_ns, r.shadow_latency_ns, r.min_difference_ns) for r in first.regions] == [
        (100_000_000, 200_000_000, 10_000_000)
    ]
    assert [(r.latency_ns, r.shadow_latency_ns, r.max_difference_ns) for r in second.regions] == [
        (100_000_000, 50_000_000, -10_000_000)
    ]
    calls.activate(one)
    assert stream.ask(decode(16))[0].HasField("lease")
    assert report_of(calls, 5).generation == 3
    stream.close()


def test_a_shadow_pack_must_be_there_and_stays_while_it_is_named(calls: Calls, pack_dirs: Dirs) -> None:
    from step_oracle.v1 import pack_pb2

    one, other = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
    for digest, reason in (("sha256:" + "0" * 64, "PACK_NOT_FOUND"), ("sha256:12", "INVALID_ARGUMENT")):
        with pytest.raises(grpc.RpcError) as caught:
            calls.create(one, shadow_pack_digest=digest)
        assert reason_of(caught.value)[1] == reason
    calls.create(one, shadow_pack_digest=other)
    with pytest.raises(grpc.RpcError) as caught:
        calls.packs.DeletePack(pack_pb2.DeletePackRequest(name=f"tenants/default/packs/{other}"), timeout=TIMEOUT)
    assert reason_of(caught.value)[1] == "PACK_IN_USE"


def test_shards_are_summed(shards: tuple[Calls, Calls], sharded: OracleProcess, pack_dirs: Dirs) -> None:
    name = "tenants/default/experiments/shadowed"
    digests = [shards[0].upload(pack_dirs[pack]) for pack in ("constant", "constant20")]
    shards[0].create(digests[0], "shadowed", shadow_pack_digest=digests[1])
    for number, calls in enumerate(shards):
        for engine_id in ("both", f"only-{number}"):
            engine = identity(engine_id, name)
            stream = calls.open(engine, calls.attach(engine).incarnation)
            stream.ask(*[decode(i) for i in range(10 * (number + 1))])
            stream.close()
    for calls in shards:
        report = report_of(calls, 60, name)
        steps = {engine.engine_id: engine.regions[0].steps for engine in report.engines}
        assert steps == {"both": 30, "only-0": 10, "only-1": 20}
        assert report.regions[0].absolute_difference_ns == 60 * 10_000_000
