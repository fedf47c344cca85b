"""Streams that end without an error, and several replicas: who is asked next, which connections stay."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from fakes import ScriptedOracle, constant
from shim_streams import LATENCY_NS, config, step, stream_to
from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import step_pb2
from vllm_shim.errors import OracleLost
from vllm_shim.stream import call_unary, replicas_of


@contextmanager
def two_replicas(answer: Any = None) -> Iterator[tuple[ScriptedOracle, ScriptedOracle, str]]:
    with ScriptedOracle(answer or constant(LATENCY_NS)) as a, ScriptedOracle(answer or constant(LATENCY_NS)) as b:
        yield a, b, f"{a.target}, {b.target}"


def test_a_stream_that_ends_without_an_error_is_followed_by_the_next_and_counts_as_no_trouble() -> None:
    with ScriptedOracle(constant(LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        oracle.messages_per_stream = 2
        # The first message opens the stream.
        for index in range(8):
            assert stream.wait(stream.submit(step(index))).step_index == index
        assert len(oracle.opened) >= 4
        assert stream._reconnects == 0
        assert sorted({request.step_index for request in oracle.requests}) == list(range(8))


def test_a_stream_that_ends_without_an_error_takes_its_connection_along() -> None:
    """Whatever goes by connections has a say: a balancer, shards at one port, a name that has more addresses by now."""
    peers = []

    def note(message: pb.StreamStepsRequest, context: grpc.ServicerContext) -> None:
        if message.HasField("open"):
            peers.append(context.peer())

    with ScriptedOracle(constant(LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        oracle.before_answer = note
        oracle.messages_per_stream = 2
        for index in range(8):
            stream.wait(stream.submit(step(index)))
        assert len(set(peers)) == len(peers) >= 4


def test_of_several_replicas_the_connections_stay() -> None:
    peers: dict[int, set[str]] = {}

    def noting(number: int) -> Callable[[pb.StreamStepsRequest, grpc.ServicerContext], None]:
        return lambda _, context: peers.setdefault(number, set()).add(context.peer())

    with two_replicas() as (a, b, targets), stream_to(targets) as stream:
        for number, oracle in enumerate((a, b)):
            oracle.before_answer, oracle.messages_per_stream = noting(number), 2
        for index in range(12):
            stream.wait(stream.submit(step(index)))
        assert min(len(a.opened), len(b.opened)) >= 2
    assert [len(of_one) for of_one in peers.values()] == [1, 1]


def test_where_one_replica_ends_the_other_answers_what_is_pending() -> None:
    with two_replicas() as (a, b, targets), stream_to(targets, BUDGET_SECONDS="20") as stream:
        stream.wait(stream.submit(step(0)))
        here, there = (a, b) if a.opened else (b, a)
        here._server.stop(None).wait()
        begin = time.monotonic()
        pending = [stream.submit(step(1)), stream.submit(step(2))]
        assert [stream.wait(p).step_index for p in pending] == [1, 2]
        # Long before the one that is gone would be tried again for long.
        assert time.monotonic() - begin < 5
        assert sorted({request.step_index for request in there.requests}) == [1, 2]


def test_a_replica_that_refuses_for_now_is_left_for_the_next_one() -> None:
    """It has not seen the generation that the engine has: the engine neither ends nor goes back."""

    def lag(message: pb.StreamStepsRequest, context: grpc.ServicerContext) -> None:
        if message.min_generation > 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "this server is behind")

    def at(generation: int) -> Any:
        return lambda request: step_pb2.StepReply(step_index=request.step_index, latency_ns=[1], generation=generation)

    with two_replicas(at(1)) as (a, b, targets), stream_to(targets) as stream:
        stream.wait(stream.submit(step(0)))
        ahead, behind = (a, b) if a.opened else (b, a)
        ahead.answer, behind.before_answer = at(2), lag
        # Now and then its stream ends, and each time the one that is behind is asked first.
        ahead.messages_per_stream = 3
        generations = [stream.wait(stream.submit(step(index))).generation for index in range(1, 12)]
        assert generations == [2] * 11
        assert len(behind.opened) >= 2


def test_a_replica_that_hangs_is_left_while_the_budget_lasts() -> None:
    release = threading.Event()

    def hang(_: pb.StreamStepsRequest, __: Any) -> None:
        release.wait(20)

    with two_replicas() as (a, b, targets), stream_to(targets, BUDGET_SECONDS="6") as stream:
        stream.wait(stream.submit(step(0)))
        (a if a.opened else b).before_answer = hang
        try:
            assert stream.wait(stream.submit(step(1))).step_index == 1
            assert len(a.opened) == len(b.opened) == 1
        finally:
            release.set()


def test_all_replicas_gone_is_a_lost_oracle() -> None:
    with two_replicas() as (a, b, targets), stream_to(targets, BUDGET_SECONDS="1") as stream:
        stream.wait(stream.submit(step(0)))
        for oracle in (a, b):
            oracle._server.stop(None).wait()
        with pytest.raises(OracleLost, match="budget"):
            stream.wait(stream.submit(step(1)))


def test_a_unary_call_goes_on_to_a_replica_that_answers() -> None:
    gone = ScriptedOracle(constant(LATENCY_NS))
    gone.__exit__()
    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        settings = config(f"{gone.target},{oracle.target}")
        for _ in range(4):
            request = pb.GetDeviceRequest(engine=pb.EngineIdentity(engine_id="engine-0"))
            answer = call_unary(replicas_of(settings), settings, "GetDevice", request, pb.GetDeviceResponse)
            assert answer.device.name == "NVIDIA H100 80GB HBM3"


def test_a_unary_call_that_is_refused_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[pb.GetDeviceRequest] = []

    def refuse(_: ScriptedOracle, request: pb.GetDeviceRequest, context: grpc.ServicerContext) -> None:
        asked.append(request)
        context.abort(grpc.StatusCode.NOT_FOUND, "no experiment")

    monkeypatch.setattr(ScriptedOracle, "GetDevice", refuse)
    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        settings = config(f"{oracle.target},{oracle.target}")
        with pytest.raises(grpc.RpcError, match="no experiment"):
            call_unary(replicas_of(settings), settings, "GetDevice", pb.GetDeviceRequest(), pb.GetDeviceResponse)
        assert len(asked) == 1
