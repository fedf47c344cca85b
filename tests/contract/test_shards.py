"""`serve --shards`: many processes that look like one server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import msgspec
import pytest

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, Stream, decode, identity, mixed_steps, reason_of
from oracle_process import OracleProcess
from oracle_server.rpc import wire
from sharded_server import TWO_SHARDS, events, metrics, shard_pids, wait_for
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, oracle_service_pb2_grpc

Dirs = dict[str, Path]
# Latencies of the packs `constant20` and `constant`.
LATENCIES_NS = (20_000_000, 10_000_000)


def test_one_and_two_shards_answer_the_same(
    shards: tuple[Calls, Calls], shared_server: OracleProcess, pack_dirs: Dirs
) -> None:
    steps = mixed_steps(200)
    with Calls(shared_server.target) as alone:
        for kind in ("composed", "sampled", "hybrid"):
            for calls in (alone, shards[0]):
                calls.create(calls.upload(pack_dirs[kind]), f"same-{kind}", seed=5)
            engine = identity("e", f"tenants/default/experiments/same-{kind}")
            expected = alone.sample(engine, steps)
            for shard in shards:
                assert shard.sample(engine, steps) == expected
                stream = shard.open(engine, shard.attach(engine).incarnation)
                assert [stream.ask(step)[0] for step in steps[:50]] == expected[:50]
                stream.close()


def test_the_largest_binding_of_one_request_reaches_every_shard(
    new_server: Callable[..., OracleProcess], pack_dirs: Dirs, tmp_path: Path
) -> None:
    """What fits into a request of 4 MiB is larger on its way to the shards."""
    server = new_server(listen=(f"unix:{tmp_path}/s",), arguments=TWO_SHARDS)
    with Calls(server.targets[0]) as first, Calls(server.targets[1]) as second:
        digest = first.upload(pack_dirs["constant"])
        labels = {f"label-{i:02}": "x" * 36 for i in range(64)}
        binding = experiment_pb2.Binding(default_pack_digest=digest)
        binding.rules.extend([experiment_pb2.Rule(pack_digest=digest, labels=labels)] * 1000)
        binding.length_table.classes.add(
            prompt_bin_begin=range(200),
            quantiles_per_bin=1000,
            quantile_tokens=[float(i) for i in range(1, 1001)] * 200,
        )
        assert 4_000_000 < binding.ByteSize() < 4 << 20
        assert len(msgspec.msgpack.encode(wire.read_binding(binding))) > 4 << 20
        pids = shard_pids(server)
        first.create(digest)
        request = experiment_pb2.ActivateExperimentRequest(name=EXPERIMENT, binding=binding)
        activated = first.experiments.ActivateExperiment(request, timeout=TIMEOUT)
        assert activated.experiment.generation == 2
        for calls in (first, second):
            assert calls.sample(identity("e"), [decode(0)])[0].generation == 2
        assert shard_pids(server) == pids
    server.terminate()
    server.start()
    for target in server.targets:
        with Calls(target) as calls:
            assert calls.sample(identity("e"), [decode(0)])[0].generation == 2


def test_every_shard_takes_every_call(shards: tuple[Calls, Calls], pack_dirs: Dirs) -> None:
    first, second = shards
    name = "tenants/default/experiments/calls"
    digest, other = first.upload(pack_dirs["constant"]), second.upload(pack_dirs["constant20"])
    assert second.upload(pack_dirs["constant"]) == digest
    assert second.create(digest, "calls").generation == 1
    assert first.activate(other, name).experiment.generation == 2
    request = experiment_pb2.RollBackExperimentRequest(name=name)
    assert second.experiments.RollBackExperiment(request, timeout=TIMEOUT).experiment.generation == 3
    history = first.experiments.ListGenerations(experiment_pb2.ListGenerationsRequest(name=name), timeout=TIMEOUT)
    assert [record.generation for record in history.generations] == [3, 2, 1]
    watch = second.experiments.WatchExperiment(experiment_pb2.WatchExperimentRequest(name=name))
    assert next(watch).experiment.generation == 3
    first.activate(other, name)
    assert next(watch).experiment.generation == 4
    watch.cancel()
    for shard in shards:
        assert shard.sample(identity("e", name), [decode(0)])[0].latency_ns[0] == LATENCIES_NS[0]
        device = shard.oracle.GetDevice(
            oracle_service_pb2.GetDeviceRequest(engine=identity("e", name)), timeout=TIMEOUT
        )
        assert (device.generation, device.pack_digest) == (4, other)
    second.experiments.DeleteExperiment(experiment_pb2.DeleteExperimentRequest(name=name), timeout=TIMEOUT)
    for shard in shards:
        with pytest.raises(grpc.RpcError) as caught:
            shard.sample(identity("e", name), [decode(0)])
        assert reason_of(caught.value) == ("NOT_FOUND", "EXPERIMENT_NOT_FOUND")


def test_errors_pass_a_shard_unchanged(
    shards: tuple[Calls, Calls], shared_server: OracleProcess, pack_dirs: Dirs
) -> None:
    def refusals(calls: Calls) -> list[tuple[tuple[str, str], str | None]]:
        seen = []
        nobody = "tenants/nobody/experiments/x"
        for attempt in (
            lambda: calls.sample(identity("e", nobody), [decode(0)]),
            lambda: calls.sample(identity("e", "tenants/default/experiments/none"), [decode(0)]),
            lambda: calls.open(identity("e", nobody), 1),
            lambda: calls.open(identity("e", "tenants/default/experiments/none"), 1),
            lambda: calls.open(identity("e", "tenants/default/experiments/refusals"), 0),
            lambda: calls.attach(identity("e", "tenants/default/experiments/refusals"), device_generation=9),
            lambda: calls.activate("sha256:" + "0" * 64, "tenants/default/experiments/refusals"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                attempt()
            seen.append((reason_of(caught.value), caught.value.details()))
        return seen

    with Calls(shared_server.target) as alone:
        for calls in (alone, shards[0]):
            calls.create(calls.upload(pack_dirs["constant"]), "refusals")
        expected = refusals(alone)
    assert refusals(shards[0]) == expected
    assert refusals(shards[1]) == expected


def test_engines_that_hop_between_shards_see_no_generation_go_back(
    shards: tuple[Calls, Calls], pack_dirs: Dirs
) -> None:
    """Engines change the shard every few steps while packs are swapped; after each swap both shards are at it."""
    name = "tenants/default/experiments/hops"
    digests = [shards[0].upload(pack_dirs["constant20"]), shards[1].upload(pack_dirs["constant"])]
    shards[0].create(digests[1], "hops")
    stop = threading.Event()
    failures: list[BaseException] = []
    hops = [0] * 4

    def hop(number: int) -> None:
        engine = identity(f"e{number}", name)
        incarnation = shards[0].attach(engine).incarnation
        newest = index = 0
        try:
            while not stop.is_set():
                stream = shards[(number + hops[number]) % 2].open(engine, incarnation)
                assert stream.opened.generation >= newest
                newest = stream.opened.generation
                for _ in range(5):
                    (reply,) = stream.ask(decode(index), min_generation=newest)
                    assert reply.generation >= newest
                    assert reply.latency_ns[0] == LATENCIES_NS[reply.generation % 2]
                    newest, index = reply.generation, index + 1
                hops[number] += 1
                # Every other one is left open, to be replaced by the next.
                if hops[number] % 2:
                    stream.close()
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=hop, args=(number,)) for number in range(len(hops))]
    for thread in threads:
        thread.start()
    generation = 1
    while (generation < 60 or min(hops) < 10) and not failures:
        generation = shards[generation % 2].activate(digests[(generation + 1) % 2], name).experiment.generation
        for shard in shards:
            (reply,) = shard.sample(identity("bystander", name), [decode(0)])
            assert (reply.generation, reply.latency_ns[0]) == (generation, LATENCIES_NS[generation % 2])
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not failures


def test_an_activation_is_pushed_at_every_shard(shards: tuple[Calls, Calls], pack_dirs: Dirs) -> None:
    name = "tenants/default/experiments/pushed"
    shards[0].create(shards[0].upload(pack_dirs["constant"]), "pushed")
    streams = [join(shard, f"e{i}", name) for i, shard in enumerate(shards)]
    shards[0].activate(shards[0].upload(pack_dirs["constant20"]), name)
    assert [stream.receive().new_generation for stream in streams] == [2, 2]
    for stream in streams:
        stream.close()


def test_an_id_is_taken_at_every_shard_and_free_at_every_shard(shards: tuple[Calls, Calls], pack_dirs: Dirs) -> None:
    first, second = shards
    name = "tenants/default/experiments/taken"
    first.create(first.upload(pack_dirs["constant"]), "taken")
    for turn in range(10):
        stream = join(shards[turn % 2], "e", name)
        with pytest.raises(grpc.RpcError) as caught:
            shards[(turn + 1) % 2].attach(identity("e", name))
        assert reason_of(caught.value) == ("ALREADY_EXISTS", "ENGINE_ID_TAKEN")
        stream.ask(decode(0))
        stream.close()
    old = join(first, "e", name)
    new = second.open(identity("e", name), 11)
    with pytest.raises(grpc.RpcError) as caught:
        old.receive()
    assert reason_of(caught.value) == ("ALREADY_EXISTS", "ENGINE_ID_TAKEN")
    assert new.ask(decode(0))
    with pytest.raises(grpc.RpcError) as caught:
        first.open(identity("e", name), 10)
    assert reason_of(caught.value) == ("ALREADY_EXISTS", "ENGINE_ID_TAKEN")
    # An engine that breaks off frees its id, too.
    new.call.cancel()
    wait_for(lambda: not engines(first, name))
    assert first.attach(identity("e", name)).incarnation == 12


def test_engines_are_listed_and_counted_over_all_shards(
    shards: tuple[Calls, Calls], sharded: OracleProcess, pack_dirs: Dirs
) -> None:
    name = "tenants/default/experiments/counted"
    shards[0].create(shards[0].upload(pack_dirs["constant"]), "counted")
    streams = [join(shard, f"e{i}", name) for i, shard in enumerate(shards)]
    before = metrics(sharded)
    for i, stream in enumerate(streams):
        counts = oracle_service_pb2.ShimCounts(steps=7, late_answers=1)
        stream.send(steps=[decode(j) for j in range(3 + i)], counts=counts)
        stream.receive()
    after = metrics(sharded)
    assert after["steps"] - before["steps"] == 7
    assert after["step_oracle_shim_steps_total"] - before["step_oracle_shim_steps_total"] == 14
    assert after[f'step_oracle_experiment_streams{{experiment="{name}"}}'] == 2
    assert after["step_oracle_streams"] == 2
    listed = engines(shards[1], name)
    assert {key: (e.streaming, e.steps, e.late_answers) for key, e in listed.items()} == {
        "e0": (True, 3, 1),
        "e1": (True, 4, 1),
    }
    # The engine goes on counting at another shard.
    streams[0].close()
    again = shards[1].open(identity("e0", name), 1)
    again.ask(decode(3))
    assert engines(shards[0], name)["e0"].steps == 4
    for stream in (again, streams[1]):
        stream.close()


def test_one_address_reaches_all_shards(sharded: OracleProcess, shards: tuple[Calls, Calls], pack_dirs: Dirs) -> None:
    name = "tenants/default/experiments/spread"
    shards[0].create(shards[0].upload(pack_dirs["constant"]), "spread")
    for i in range(24):
        with sharded.channel() as channel:
            stub = oracle_service_pb2_grpc.OracleServiceStub(channel)
            attached = stub.AttachEngine(
                oracle_service_pb2.AttachEngineRequest(engine=identity(f"e{i}", name)), timeout=TIMEOUT
            )
            stream = Stream(stub)
            stream.send(
                open=oracle_service_pb2.StreamOpen(engine=identity(f"e{i}", name), incarnation=attached.incarnation)
            )
            stream.receive()
            stream.close()
    closed = [e for e in events(sharded) if e["event"] == "stream closed" and e["experiment"] == name]
    # 24 connections that the kernel spreads: all at one shard by chance once in 2^23.
    assert {event["shard"] for event in closed} == {0, 1}


def join(calls: Calls, engine_id: str, name: str) -> Stream:
    """Attach an engine and open its stream."""
    engine = identity(engine_id, name)
    return calls.open(engine, calls.attach(engine).incarnation)


def engines(calls: Calls, name: str) -> dict[str, experiment_pb2.AttachedEngine]:
    """The attached engines by id."""
    response = calls.experiments.ListEngines(experiment_pb2.ListEnginesRequest(parent=name), timeout=TIMEOUT)
    return {engine.engine_id: engine for engine in response.engines}
