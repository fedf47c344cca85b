"""Leases on a stream: what is not sent, what waits for its turn, what ends a lease; the counts that go alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest

from fakes import ScriptedOracle, constant
from sharded_server import wait_for
from shim_streams import LATENCY_NS, decode, granting, prefill, step, stream_to
from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import step_pb2
from vllm_shim.errors import OracleLost
from vllm_shim.stream import OracleStream


def test_a_step_inside_a_lease_is_not_sent() -> None:
    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        replies = [stream.wait(decode(stream, i)) for i in range(5)]
        assert [reply.latency_ns[0] for reply in replies] == [LATENCY_NS] * 5
        assert [request.step_index for request in oracle.requests] == [0]


def test_a_step_inside_a_cell_of_samples_is_answered_with_one_of_them() -> None:
    def cell(request: step_pb2.StepRequest) -> step_pb2.StepReply:
        reply: step_pb2.StepReply = granting(1, LATENCY_NS)(request)
        reply.lease.ClearField("residual_pool")
        reply.lease.latency_pool_ns.extend([70_000_001] * 256)
        return reply

    with ScriptedOracle(cell) as oracle, stream_to(oracle.target) as stream:
        replies = [stream.wait(decode(stream, i)) for i in range(5)]
        assert [reply.latency_ns[0] for reply in replies] == [LATENCY_NS, *[70_000_001] * 4]
        assert [request.step_index for request in oracle.requests] == [0]


def test_a_step_with_a_lease_waits_for_the_steps_before_it() -> None:
    release = threading.Event()

    def hold(message: pb.StreamStepsRequest, _: Any) -> None:
        if message.steps and message.steps[0].shape.prefill_chunks:
            release.wait(10)

    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle:
        oracle.before_answer = hold
        with stream_to(oracle.target) as stream:
            stream.wait(decode(stream, 0))
            asked = [stream.submit(prefill(1)), decode(stream, 2)]
            assert not any(pending.is_answered() for pending in asked)
            release.set()
            assert [stream.wait(pending).step_index for pending in asked] == [1, 2]
            assert asked[1].lease is not None
        assert [request.step_index for request in oracle.requests] == [0, 1]


def test_a_lease_is_given_up_where_a_step_before_brings_a_newer_generation() -> None:
    release = threading.Event()

    def swap(message: pb.StreamStepsRequest, _: Any) -> None:
        if message.steps and message.steps[0].shape.prefill_chunks:
            release.wait(10)
            oracle.answer = granting(2, 2 * LATENCY_NS)

    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle:
        oracle.before_answer = swap
        with stream_to(oracle.target) as stream:
            first = decode(stream, 0)
            stream.wait(first)
            asked = [first, stream.submit(prefill(1)), decode(stream, 2), decode(stream, 3)]
            release.set()
            replies = [stream.wait(pending) for pending in asked]
            assert [(r.generation, r.latency_ns[0]) for r in replies] == [
                (1, LATENCY_NS),
                *[(2, 2 * LATENCY_NS)] * 3,
            ]
            assert [pending.lease for pending in asked] == [None] * 4
            assert stream.wait(decode(stream, 4)).generation == 2
        assert [request.step_index for request in oracle.requests] == [0, 1, 2, 3]


def test_steps_that_wait_for_their_turn_are_sent_before_a_later_one() -> None:
    release = threading.Event()

    def hold(message: pb.StreamStepsRequest, _: Any) -> None:
        if message.steps and message.steps[0].step_index == 1:
            release.wait(10)

    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle:
        oracle.before_answer = hold
        with stream_to(oracle.target) as stream:
            stream.wait(decode(stream, 0))
            asked = [stream.submit(prefill(1)), decode(stream, 2), stream.submit(prefill(3))]
            release.set()
            assert [stream.wait(pending).step_index for pending in asked] == [1, 2, 3]
        assert [request.step_index for request in oracle.requests] == [0, 1, 2, 3]


def test_no_lease_answers_after_the_oracle_is_lost() -> None:
    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle, stream_to(oracle.target, BUDGET_SECONDS="0.5") as stream:
        stream.wait(decode(stream, 0))
        assert decode(stream, 1).is_answered()
        oracle._server.stop(None).wait()
        with pytest.raises(OracleLost):
            stream.wait(stream.submit(prefill(2)))
        with pytest.raises(OracleLost):
            stream.wait(decode(stream, 3))


def test_counts_go_alone_once_a_second_while_nothing_is_sent() -> None:
    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        stream.wait(decode(stream, 0))
        reply = stream.wait(decode(stream, 1))
        stream.count_step(15_000, 0, reply)
        wait_for(lambda: bool(oracle.counts))
        assert (oracle.counts[0].leased_steps, oracle.counts[0].last_leased_step_index) == (1, 1)
        assert len(oracle.requests) == 1


def test_the_counts_of_the_last_message_are_not_replaced_by_fresh_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # An engine that stops a second and more after counts went out last.
    monkeypatch.setattr("vllm_shim.stream._COUNTS_EVERY_SECONDS", 0.0)
    last: SimpleQueue[pb.StreamStepsRequest | None] = SimpleQueue()
    last.put(pb.StreamStepsRequest(counts=pb.ShimCounts(steps=6)))
    with ScriptedOracle(constant(LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        assert next(stream._messages(last)).counts.steps == 6


@contextmanager
def living_from_a_lease(**changes: str) -> Iterator[tuple[OracleStream, ScriptedOracle, threading.Event]]:
    """A stream with a lease, and its oracle, which says nothing from the first message of counts on until released."""
    release = threading.Event()

    def mute(message: pb.StreamStepsRequest, _: Any) -> None:
        if message.HasField("counts"):
            release.wait(20)

    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle:
        oracle.before_answer = mute
        with stream_to(oracle.target, BUDGET_SECONDS="5", **changes) as stream:
            stream.wait(decode(stream, 0))
            reply = stream.wait(decode(stream, 1))
            stream.count_step(0, 0, reply)
            wait_for(lambda: bool(oracle.counts))
            assert decode(stream, 2).is_answered()
            stream._unheard_since_ns -= 6_000_000_000
            try:
                yield stream, oracle, release
            finally:
                release.set()


def test_a_lease_does_not_hide_a_silent_server() -> None:
    with living_from_a_lease() as (stream, _, _), pytest.raises(OracleLost, match="nothing heard in"):
        stream.wait(decode(stream, 3))


def test_under_hold_an_engine_with_a_lease_asks_a_silent_server_and_waits() -> None:
    with living_from_a_lease(ON_LOST="hold") as (stream, oracle, release):
        asked = decode(stream, 3)
        assert not asked.is_answered()
        release.set()
        assert stream.wait(asked).step_index == 3
        assert [request.step_index for request in oracle.requests] == [0, 3]
        assert decode(stream, 4).is_answered()


def test_leases_that_no_decode_step_looks_for_do_not_pile_up() -> None:
    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        for index in range(20):
            stream.wait(stream.submit(step(index)))
        assert len(stream._era[1]) <= 1


def test_leases_outlive_a_stream_that_ends_without_an_error() -> None:
    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        stream.wait(decode(stream, 0))
        assert decode(stream, 1).is_answered()
        oracle.messages_per_stream = 1
        stream.wait(stream.submit(prefill(2)))
        # It ends with each message from now on, and the next one opens.
        wait_for(lambda: len(oracle.opened) >= 3)
        oracle.messages_per_stream = 0
        for index in range(3, 6):
            asked = decode(stream, index)
            assert stream.wait(asked).latency_ns[0] == LATENCY_NS
            assert asked.lease is not None
        assert [request.step_index for request in oracle.requests if not request.shape.prefill_chunks] == [0]


def test_leases_do_not_outlive_a_newer_generation_of_the_next_stream() -> None:
    def newer(message: pb.StreamStepsRequest, _: Any) -> None:
        if message.steps and message.steps[0].shape.prefill_chunks:
            oracle.answer = granting(2, 2 * LATENCY_NS)

    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        oracle.before_answer = newer
        stream.wait(decode(stream, 0))
        oracle.messages_per_stream = 1
        stream.wait(stream.submit(prefill(1)))
        oracle.messages_per_stream = 0
        asked = decode(stream, 2)
        assert (stream.wait(asked).generation, asked.lease) == (2, None)
