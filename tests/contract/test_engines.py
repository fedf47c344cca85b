"""Who may stream: ids, incarnations, restarts, pushed generations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, decode, identity, reason_of
from oracle_process import OracleProcess
from sharded_server import wait_for
from step_oracle.v1 import experiment_pb2, oracle_service_pb2
from stores import BOTH_STORES

Dirs = dict[str, Path]


def engines(calls: Calls) -> dict[str, experiment_pb2.AttachedEngine]:
    request = experiment_pb2.ListEnginesRequest(parent=EXPERIMENT)
    return {e.engine_id: e for e in calls.experiments.ListEngines(request, timeout=TIMEOUT).engines}


def test_a_closed_stream_frees_the_id_and_the_next_attach_counts_on(shared: Calls) -> None:
    stream = shared.join("free")
    assert stream.opened.incarnation == 1
    stream.close()
    again = shared.join("free")
    assert again.opened.incarnation == 2
    again.close()


def test_an_id_with_an_open_stream_is_taken(shared: Calls) -> None:
    stream = shared.join("open")
    with pytest.raises(grpc.RpcError) as caught:
        shared.attach(identity("open"))
    assert reason_of(caught.value)[1] == "ENGINE_ID_TAKEN"
    assert stream.ask(decode(0))
    stream.close()


def test_an_engine_that_reconnects_replaces_its_own_stream(shared: Calls) -> None:
    old = shared.join("again")
    new = shared.open(identity("again"), old.opened.incarnation)
    with pytest.raises(grpc.RpcError) as caught:
        old.receive()
    assert reason_of(caught.value)[1] == "ENGINE_ID_TAKEN"
    assert new.ask(decode(0))
    assert engines(shared)["again"].streaming
    new.close()


def test_the_stream_of_an_older_incarnation_is_refused(shared: Calls) -> None:
    shared.join("older").close()
    newer = shared.join("older")
    with pytest.raises(grpc.RpcError) as caught:
        shared.open(identity("older"), 1)
    assert reason_of(caught.value)[1] == "ENGINE_ID_TAKEN"
    assert newer.ask(decode(0))
    newer.close()


def test_a_stream_without_an_attach_is_refused(shared: Calls) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        shared.open(identity("never"), 0)
    assert reason_of(caught.value) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


@BOTH_STORES
def test_a_killed_server_takes_its_engines_back(server: OracleProcess, pack_dirs: Dirs) -> None:
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["composed"]))
        stream = calls.join("e")
        before = stream.ask(decode(7))
        server.kill()
        with pytest.raises(grpc.RpcError):
            stream.receive()
    server.start()
    with Calls(server.target) as calls:
        stream = calls.open(identity("e"), 1)
        assert stream.ask(decode(7)) == before
        with pytest.raises(grpc.RpcError) as caught:
            calls.attach(identity("e"))
        assert reason_of(caught.value)[1] == "ENGINE_ID_TAKEN"
        stream.close()
        assert calls.attach(identity("e")).incarnation == 2


def test_an_activation_is_pushed_on_the_open_stream(calls: Calls, pack_dirs: Dirs) -> None:
    calls.create(calls.upload(pack_dirs["constant"]))
    stream = calls.join("e")
    assert stream.opened.generation == 1
    calls.activate(calls.upload(pack_dirs["constant20"]))
    assert stream.receive().new_generation == 2
    reply = stream.ask(decode(0))[0]
    assert (reply.generation, list(reply.latency_ns)) == (2, [20_000_000])
    stream.close()


def test_a_step_that_wants_a_newer_generation_is_sent_elsewhere(shared: Calls) -> None:
    stream = shared.join("ahead")
    assert stream.ask(decode(0), min_generation=1)
    stream.send(steps=[decode(1)], min_generation=99)
    with pytest.raises(grpc.RpcError) as caught:
        stream.receive()
    assert reason_of(caught.value) == ("UNAVAILABLE", "STALE_GENERATION")


def test_a_device_of_a_generation_not_yet_seen_is_stale(shared: Calls) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        shared.attach(identity("future"), device_generation=99)
    assert reason_of(caught.value) == ("UNAVAILABLE", "STALE_GENERATION")


def test_counts_of_the_shim_are_added_up(shared: Calls, shared_server: OracleProcess) -> None:
    stream = shared.join("counts")
    stream.ask(decode(0))
    for _ in range(2):
        counts = oracle_service_pb2.ShimCounts(
            steps=5,
            leased_steps=3,
            leased_steps_by_support=[0, 1, 0, 2],
            late_answers=1,
            reconnects=1,
            lateness_buckets=[1, 2],
            lateness_sum_ns=30_000,
        )
        stream.send(counts=counts)
    stream.ask(decode(1))
    engine = engines(shared)["counts"]
    # Two it was asked, six it was told of.
    assert (engine.steps, engine.leased_steps, engine.extrapolated_steps) == (8, 6, 4)
    assert (engine.late_answers, engine.reconnects) == (2, 2)
    stream.close()
    assert "counts" not in engines(shared)


@pytest.mark.parametrize("arguments", [(), ("--shards", "2")], ids=["one process", "two shards"])
def test_counts_that_cannot_be_are_kept_where_messages_can_hold_them(
    arguments: tuple[str, ...], new_server: Callable[..., OracleProcess], pack_dirs: Dirs
) -> None:
    server = new_server(arguments=arguments)
    most = (1 << 64) - 1
    counts = oracle_service_pb2.ShimCounts(
        steps=most,
        leased_steps=most,
        leased_steps_by_support=[0, most, 0, most],
        late_answers=most,
        late_answer_ns=most,
        reconnects=most,
        lateness_buckets=[most, most],
        lateness_sum_ns=most,
    )
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        stream = calls.join("liar")
        for step in range(3):
            stream.send(steps=[decode(step)], counts=counts)
            assert stream.receive().replies
        # Shards tell their parent now and then.
        wait_for(lambda: engines(calls)["liar"].late_answers > 0)
        engine = engines(calls)["liar"]
        assert (engine.late_answers, engine.lateness_sum_ns, *engine.lateness_buckets) == (2**62,) * 4
        assert 2**62 <= engine.steps <= 2**62 + 3
        assert stream.ask(decode(3))
        stream.close()
        assert calls.sample(identity("honest"), [decode(0)])


def test_limits_frozen_in_a_running_engine_refuse_another_pack(calls: Calls, pack_dirs: Dirs) -> None:
    calls.create(calls.upload(pack_dirs["constant"]))
    config = oracle_service_pb2.EngineConfig(max_num_seqs=64)
    stream = calls.join("e", config=config)
    tied = calls.upload(pack_dirs["tied"])
    with pytest.raises(grpc.RpcError) as caught:
        calls.activate(tied)
    assert reason_of(caught.value)[1] == "ENGINE_MISMATCH"
    assert "max_num_seqs: the pack has 128, the engine 64 (engines e)" in (caught.value.details() or "")
    response = calls.activate(tied, request={"allow_mismatch": ["max_num_seqs"], "validate_only": True})
    assert (response.experiment.generation, len(response.warnings)) == (1, 1)
    allowed = calls.activate(tied, request={"allow_mismatch": ["max_num_seqs"]})
    assert allowed.experiment.generation == 2
    stream.close()


@BOTH_STORES
def test_what_an_operator_allowed_holds_after_a_restart(server: OracleProcess, pack_dirs: Dirs) -> None:
    config = oracle_service_pb2.EngineConfig(max_num_seqs=64)
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        stream = calls.join("allowed", config=config)
        calls.activate(calls.upload(pack_dirs["tied"]), request={"allow_mismatch": ["max_num_seqs"]})
        assert stream.ask(decode(0))[0].generation == 2
        server.kill()
    server.start()
    with Calls(server.target) as calls:
        assert calls.open(identity("allowed"), 1, config).ask(decode(0))[0].latency_ns[0] == 30_000_000


@BOTH_STORES
def test_an_engine_that_was_away_during_an_activation_is_compared_when_it_comes_back(
    server: OracleProcess, pack_dirs: Dirs
) -> None:
    config = oracle_service_pb2.EngineConfig(max_num_seqs=64)
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        calls.join("away", config=config).close()
        calls.activate(calls.upload(pack_dirs["tied"]))
        with pytest.raises(grpc.RpcError) as caught:
            calls.open(identity("away"), 1, config)
        assert reason_of(caught.value)[1] == "ENGINE_MISMATCH"


def test_an_engine_whose_stream_broke_a_moment_ago_stops_an_activation(calls: Calls, pack_dirs: Dirs) -> None:
    calls.create(calls.upload(pack_dirs["constant"]))
    stream = calls.join("e", config=oracle_service_pb2.EngineConfig(max_num_seqs=64))
    stream.call.cancel()
    while engines(calls):
        pass
    with pytest.raises(grpc.RpcError) as caught:
        calls.activate(calls.upload(pack_dirs["tied"]))
    assert reason_of(caught.value)[1] == "ENGINE_MISMATCH"
    # Its id is free all the same: an engine that was killed starts again at once.
    assert calls.attach(identity("e")).incarnation == 2


def test_a_rule_less_engine_stops_an_activation(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest)
    stream = calls.join("e")
    with pytest.raises(grpc.RpcError) as caught:
        calls.activate("", rules=[experiment_pb2.Rule(labels={"gpu": "x"}, pack_digest=digest)])
    assert reason_of(caught.value)[1] == "ENGINE_MISMATCH"
    stream.close()


def test_an_experiment_with_engines_is_not_deleted(calls: Calls, pack_dirs: Dirs) -> None:
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest)
    stream = calls.join("e")
    request = experiment_pb2.DeleteExperimentRequest(name=EXPERIMENT)
    with pytest.raises(grpc.RpcError) as caught:
        calls.experiments.DeleteExperiment(request, timeout=TIMEOUT)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    stream.close()
    calls.experiments.DeleteExperiment(request, timeout=TIMEOUT)
    # A name never counts from 1 again: an engine's generation does not go back.
    assert calls.create(digest).generation == 2
