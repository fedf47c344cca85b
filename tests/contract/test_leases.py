"""Leases over a real channel: what is granted, what is not, and what ends them."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from oracle_calls import Calls, Stream, decode, identity, prefill
from oracle_process import OracleProcess
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, step_pb2
from vllm_shim.config import ShimConfig
from vllm_shim.lease import LeasedReply, LeaseTable, message_of
from vllm_shim.step_shape import DecodeStep
from vllm_shim.stream import OracleStream, replicas_of

Dirs = dict[str, Path]


def join(calls: Calls, engine_id: str, *, leases: bool = True) -> Stream:
    """Attach an engine of the default experiment and open its stream, with leases or without."""
    engine = identity(engine_id)
    stream = Stream(calls.oracle)
    incarnation = calls.attach(engine).incarnation
    stream.send(open=oracle_service_pb2.StreamOpen(engine=engine, incarnation=incarnation, leases=leases))
    stream.opened = stream.receive().opened
    return stream


@contextmanager
def shim(calls: Calls, target: str, engine_id: str, **variables: str) -> Iterator[OracleStream]:
    """The shim's own stream of an engine, as the executor opens it."""
    named = {"STEP_ORACLE_TARGET": target, "STEP_ORACLE_ENGINE_ID": engine_id}
    config = ShimConfig.from_environment(named | {f"STEP_ORACLE_{k}": v for k, v in variables.items()}, [])
    engine = identity(engine_id)
    opening = oracle_service_pb2.StreamOpen(
        engine=engine, incarnation=calls.attach(engine).incarnation, leases=config.leases
    )
    stream = OracleStream(config, replicas_of(config), opening)
    try:
        yield stream
    finally:
        stream.close()


def answer(
    stream: OracleStream, step_index: int, requests: int = 4, context: int = 4000
) -> tuple[step_pb2.StepReply, bool]:
    """The reply to a decode-only step as the executor gets and counts it, and whether it came from a lease."""
    longest = -(-context // requests)
    step = DecodeStep([], [], [], requests, context, longest, 0)
    pending = stream.submit_decode(step_index, step, lambda _: decode(step_index, requests, context))
    reply = stream.wait(pending)
    stream.count_step(0, 0, reply)
    return message_of(reply), pending.lease is not None


def wait_until(what: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
    end = time.monotonic() + timeout_seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def engine_of(calls: Calls, engine_id: str) -> experiment_pb2.AttachedEngine:
    request = experiment_pb2.ListEnginesRequest(parent="tenants/default/experiments/default")
    engines: list[experiment_pb2.AttachedEngine] = list(calls.experiments.ListEngines(request).engines)
    return next(engine for engine in engines if engine.engine_id == engine_id)


@pytest.mark.parametrize("pack", ["composed", "hybrid"])
def test_a_granted_piece_answers_what_the_server_would(pack: str, calls: Calls, pack_dirs: Dirs) -> None:
    overlay = experiment_pb2.Overlay(slow_down_factor=1.3)
    calls.create(calls.upload(pack_dirs[pack]), seed=2**64 - 1, time_scale=0.7, overlays=[overlay])
    stream = join(calls, "e")
    table = LeaseTable()
    leased = 0
    for i in range(400):
        requests = 1 + i % 7
        context = requests * (700 + i)
        found = table.find(requests, context, 700 + i, 0)
        reply = stream.ask(decode(i, requests, context))[0]
        if found is not None:
            leased += 1
            reply.ClearField("lease")
            assert LeasedReply(found, i, context, 700 + i).message() == reply
        elif reply.HasField("lease"):
            table.take(reply.lease)
    stream.close()
    assert leased > 300


def test_an_exact_cell_of_a_sampled_pack_is_leased_and_a_blended_one_is_not(calls: Calls, pack_dirs: Dirs) -> None:
    overlay = experiment_pb2.Overlay(slow_down_factor=1.3)
    calls.create(calls.upload(pack_dirs["sampled"]), seed=2**64 - 1, time_scale=0.7, overlays=[overlay])
    stream = join(calls, "e")
    table = LeaseTable()
    leased = []
    for i in range(120):
        requests = 1 + i % 4
        found = table.find(requests, requests * (700 + i), 700 + i, 0)
        reply = stream.ask(decode(i, requests, requests * (700 + i)))[0]
        assert reply.HasField("lease") is (reply.support == step_pb2.SUPPORT_EXACT)
        if found is not None:
            leased.append(requests)
            reply.ClearField("lease")
            assert LeasedReply(found, i, requests * (700 + i), 700 + i).message() == reply
        elif reply.HasField("lease"):
            table.take(reply.lease)
    stream.close()
    # Steps of three requests are nobody's samples.
    assert [leased.count(requests) for requests in (1, 2, 3, 4)] == [29, 29, 0, 29]


def test_only_what_can_be_leased_is(shared: Calls) -> None:
    stream = join(shared, "which")
    assert stream.ask(decode(0))[0].HasField("lease")
    assert not stream.ask(prefill(1, (10, 0)))[0].HasField("lease")
    mixed = decode(2)
    mixed.shape.prefill_chunks.add(num_tokens=5)
    mixed.shape.concurrency += 1
    assert not stream.ask(mixed)[0].HasField("lease")
    # Far beyond the contexts that were measured, where every point has another distance.
    assert not stream.ask(decode(3, 2, 2_000_000))[0].HasField("lease")
    stream.close()


def test_no_lease_goes_to_an_engine_that_did_not_ask_for_any(shared: Calls) -> None:
    stream = join(shared, "without", leases=False)
    assert not stream.ask(decode(0))[0].HasField("lease")
    stream.close()
    assert not shared.sample(identity("e"), [decode(0)])[0].HasField("lease")


def test_a_server_without_leases_grants_none_and_answers_the_same(
    new_server: Callable[..., OracleProcess], pack_dirs: Dirs
) -> None:
    answers = []
    for name, leases in (("with", "1"), ("without", "0")):
        server = new_server(name, extra_env={"STEP_ORACLE_LEASES": leases})
        with Calls(server.target) as calls:
            calls.create(calls.upload(pack_dirs["composed"]), seed=5)
            with shim(calls, server.target, "e") as stream:
                replies = [answer(stream, i, context=4000 + 4 * i) for i in range(50)]
                assert any(leased for _, leased in replies) is (leases == "1")
                for reply, _ in replies:
                    reply.ClearField("lease")
                answers.append([reply for reply, _ in replies])
    assert answers[0] == answers[1]


def test_a_refusing_policy_leases_nothing_outside_the_pack(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["composed"])
    calls.create(digest)
    stream = join(calls, "e")
    many = decode(0, 400, 400 * 500)
    assert stream.ask(many)[0].lease.support == step_pb2.SUPPORT_EXTRAPOLATED
    calls.activate(digest, support_policy=experiment_pb2.SUPPORT_POLICY_REFUSE)
    assert stream.ask(decode(1))[0].HasField("lease")
    stream.close()


def test_an_activation_ends_the_leases_of_an_open_stream(calls: Calls, server: OracleProcess, pack_dirs: Dirs) -> None:
    one, other = calls.upload(pack_dirs["composed"]), calls.upload(pack_dirs["constant"])
    calls.create(one)
    with shim(calls, server.target, "e") as stream:
        assert [answer(stream, i)[1] for i in range(3)] == [False, True, True]
        calls.activate(other)
        # Pushed: no message of ours brings it.
        wait_until(lambda: stream._era[0] == 2)
        replies = [answer(stream, i) for i in range(3, 6)]
        assert [leased for _, leased in replies] == [False, True, True]
        assert [(r.generation, r.latency_ns[0]) for r, _ in replies] == [(2, 10_000_000)] * 3
        calls.experiments.RollBackExperiment(
            experiment_pb2.RollBackExperimentRequest(name="tenants/default/experiments/default")
        )
        wait_until(lambda: stream._era[0] == 3)
        assert [answer(stream, i)[0].generation for i in range(6, 8)] == [3, 3]


def test_a_lease_does_not_outlive_its_stream(calls: Calls, server: OracleProcess, pack_dirs: Dirs) -> None:
    calls.create(calls.upload(pack_dirs["composed"]))
    with shim(calls, server.target, "e") as stream:
        before = [answer(stream, i) for i in range(2)]
        server.kill()
        server.start()
        after = [answer(stream, i) for i in range(2, 5)]
        # The first one is asked for, by the stream that was opened anew.
        assert [leased for _, leased in before + after] == [False, True, False, True, True]
        replies = calls.sample(identity("e"), [decode(i) for i in range(5)])
        for (reply, _), expected in zip(before + after, replies, strict=True):
            reply.ClearField("lease")
            assert reply == expected


def test_the_server_counts_what_it_did_not_see(new_server: Callable[..., OracleProcess], pack_dirs: Dirs) -> None:
    server = new_server(metrics="127.0.0.1:0")
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["composed"]))
        with shim(calls, server.target, "e") as stream:
            leased = sum(answer(stream, i, context=4000 + 4 * i)[1] for i in range(200))
            # No message follows: the engine's heartbeat tells it.
            wait_until(lambda: engine_of(calls, "e").leased_steps == leased)
            engine = engine_of(calls, "e")
            assert (engine.steps, engine.extrapolated_steps) == (200, 0)
            leased += sum(answer(stream, i, 400, 400 * 500)[1] for i in range(200, 250))
            wait_until(lambda: engine_of(calls, "e").leased_steps == leased)
            engine = engine_of(calls, "e")
            assert (engine.steps, engine.extrapolated_steps) == (250, 50)
        with urllib.request.urlopen(server.metrics_url, timeout=10) as page:  # noqa: S310
            text = page.read().decode()
    counted = sum(float(line.split()[1]) for line in text.splitlines() if line.startswith("step_oracle_steps_total"))
    assert counted == 250
    assert f"step_oracle_shim_leased_steps_total {float(leased)}" in text


def test_the_shim_asks_for_every_step_where_its_leases_are_off(shared: Calls, shared_server: OracleProcess) -> None:
    with shim(shared, shared_server.target, "off", LEASES="0") as stream:
        assert not any(answer(stream, i)[1] for i in range(20))


def test_a_step_behind_one_that_waits_is_answered_from_a_lease_all_the_same(
    shared: Calls, shared_server: OracleProcess
) -> None:
    with shim(shared, shared_server.target, "behind") as stream:
        answer(stream, 0)
        asked: list[Any] = [stream.submit(prefill(1, (10, 0)))]
        step = DecodeStep([], [], [], 4, 4000, 1000, 0)
        asked.append(stream.submit_decode(2, step, lambda _: decode(2)))
        assert [stream.wait(pending).step_index for pending in asked] == [1, 2]
        assert asked[1].lease is not None
        expected = shared.sample(identity("behind"), [decode(2)])[0]
        assert message_of(asked[1].reply) == expected


def test_counts_that_come_alone_are_answered_with_the_generation(shared: Calls) -> None:
    stream = join(shared, "heartbeat")
    stream.send(counts=oracle_service_pb2.ShimCounts(steps=3))
    assert stream.receive().new_generation == stream.opened.generation
    stream.send(steps=[decode(0)], counts=oracle_service_pb2.ShimCounts(steps=1))
    reply = stream.receive()
    assert (len(reply.replies), reply.new_generation) == (1, 0)
    stream.close()
