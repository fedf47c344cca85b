"""The oracle in a replay's own process answers as the server does."""

from __future__ import annotations

import pytest

from builders import build_composed_pack, plausible_operators
from oracle_server.errors import AcceptanceUnknown, SupportRefused
from oracle_server.pack import CompiledPack, compile_pack, host_time, load_compiled, open_oracle
from oracle_server.rpc import wire
from oracle_server.state.binding import Binding
from oracle_server.state.identity import EngineIdentity
from oracle_server.state.snapshot import LoadedPack, Snapshot
from profiler.replay.local_oracle import LocalOracle
from step_oracle.v1 import step_pb2 as pb

ENGINE = "host:8000"
LARGEST = max(requests for requests, _ in plausible_operators()["generation_attention"])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledPack:
    folder = tmp_path_factory.mktemp("pack")
    build_composed_pack(folder / "pack", ratios=(0.9, 1.0, 1.2), prep_ns=700, copy_ns=300, host=(5_000, 17))
    compile_pack(folder / "pack", folder / "compiled")
    return load_compiled(folder / "compiled")


def steps() -> list[pb.StepRequest]:
    found = []
    for index in range(40):
        shape = pb.StepShape(previous_prefill_tokens=17 * index)
        for chunk in range(index % 3):
            shape.prefill_chunks.add(num_tokens=30 + 211 * index, context_tokens=100 * chunk)
            shape.new_requests.add(request_key=f"r{index}-{chunk}", prompt_tokens=8000, ignore_eos=True, max_tokens=9)
        count = 1 + index
        shape.num_decode_requests = shape.num_decode_tokens = count
        shape.decode_context_tokens, shape.max_decode_context_tokens = 400 * count, 900 if count > 2 else 400
        shape.concurrency = count + len(shape.prefill_chunks)
        found.append(pb.StepRequest(step_index=3 * index, shape=shape))
    return found


def local(compiled: CompiledPack, **options: object) -> LocalOracle:
    host = host_time(compiled.manifest.latency)
    return LocalOracle(open_oracle(compiled), seed=11, engine_id=ENGINE, host=host, **options)  # type: ignore[arg-type]


def test_every_reply_is_the_server_s(compiled: CompiledPack) -> None:
    pack = LoadedPack(compiled.digest, compiled.manifest, open_oracle(compiled))
    binding = Binding(default_pack_digest=compiled.digest, seed=11)
    snapshot = Snapshot("tenants/default/experiments/default", 1, binding, {compiled.digest: pack})
    plan = snapshot.plan(EngineIdentity(snapshot.experiment, ENGINE, {}, "m", 1))
    oracle = local(compiled)

    for step in steps():
        query, drafts, new_requests = wire.read_step(step)
        expected = pb.StepReply()
        wire.write_reply(expected, step.step_index, 1, plan.answer(step.step_index, query, drafts, new_requests))
        assert oracle.wait(oracle.submit(step)) == expected
    assert sum(oracle.counts.steps.values()) == 40
    assert sum(oracle.counts.device_ns.values()) == sum(oracle.latencies_ns)


def test_a_null_oracle_repeats_the_latencies_it_is_given(compiled: CompiledPack) -> None:
    oracle = local(compiled, latencies_ns=list(range(5, 45)))

    assert [oracle.wait(oracle.submit(step)).latency_ns[0] for step in steps()] == list(range(5, 45))


def test_steps_outside_the_pack_are_counted_or_refused(compiled: CompiledPack) -> None:
    count = 4 * LARGEST
    shape = pb.StepShape(num_decode_requests=count, num_decode_tokens=count, concurrency=count)
    shape.decode_context_tokens, shape.max_decode_context_tokens = 100 * count, 100
    step = pb.StepRequest(step_index=0, shape=shape)

    served = local(compiled)
    served.submit(step)
    assert served.counts.steps == {pb.SUPPORT_EXTRAPOLATED: 1}
    with pytest.raises(SupportRefused, match=f"{count} decode requests"):
        local(compiled, refuse_extrapolated=True).submit(step)


def test_draft_tokens_are_refused_for_nobody_knows_how_many_hold(compiled: CompiledPack) -> None:
    shape = pb.StepShape(num_decode_requests=1, num_decode_tokens=3, concurrency=1, num_draft_tokens=[2])
    shape.decode_context_tokens = shape.max_decode_context_tokens = 50

    with pytest.raises(AcceptanceUnknown):
        local(compiled).submit(pb.StepRequest(step_index=0, shape=shape))


def test_a_dummy_batch_costs_a_decode_step_and_counts_as_no_answer(compiled: CompiledPack) -> None:
    oracle = local(compiled, refuse_extrapolated=True)
    shape = pb.StepShape(num_decode_requests=1, num_decode_tokens=1, concurrency=1)
    shape.decode_context_tokens = shape.max_decode_context_tokens = 1
    same = local(compiled).submit(pb.StepRequest(step_index=9, shape=shape)).reply

    latency_ns, prep_ns, copy_ns = oracle.dummy(9)

    assert same is not None
    assert (latency_ns, prep_ns, copy_ns) == (same.latency_ns[0], 700, 300)
    assert (oracle.latencies_ns, oracle.dummy_steps, oracle.counts.steps) == ([latency_ns], 1, {})
    # The same steps at no cost of the oracle: the list holds dummies too.
    assert local(compiled, latencies_ns=[5, 6]).dummy(9)[0] == 5
