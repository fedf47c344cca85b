"""One stream, over a real channel: order, resends, budget, refusal."""

import sys
import threading
import time
from typing import Any

import grpc
import pytest

from fakes import ScriptedOracle, constant
from shim_streams import LATENCY_NS, USUAL_INTERVAL, config, decode, granting, prefill, step, stream_to
from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import step_pb2
from vllm_shim.errors import OracleLost
from vllm_shim.stream import OracleStream, replicas_of

# The shim's.
HURRIED_INTERVAL = 0.0001


def test_replies_reach_their_steps() -> None:
    def answer(request: step_pb2.StepRequest) -> step_pb2.StepReply:
        return step_pb2.StepReply(step_index=request.step_index, latency_ns=[request.step_index + 1], generation=3)

    with ScriptedOracle(answer) as oracle, stream_to(oracle.target) as stream:
        pending = [stream.submit(step(i)) for i in range(50)]
        assert [stream.wait(p).latency_ns[0] for p in pending] == list(range(1, 51))
        assert all(p.answer_ns >= p.submit_ns for p in pending)
        assert oracle.opened[0].incarnation == 7


def test_a_broken_stream_is_opened_again_and_pending_steps_are_asked_again() -> None:
    broken = threading.Event()

    def break_once(message: pb.StreamStepsRequest, context: grpc.ServicerContext) -> None:
        if message.steps and message.steps[0].step_index == 1 and not broken.is_set():
            broken.set()
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        oracle.before_answer = break_once
        with stream_to(oracle.target) as stream:
            first = stream.wait(stream.submit(step(0)))
            second = stream.wait(stream.submit(step(1)))
        assert (first.step_index, second.step_index) == (0, 1)
        assert len(oracle.opened) == 2
        assert [r.step_index for r in oracle.requests] == [0, 1, 1]


def test_a_server_that_comes_back_within_the_budget_answers_everything() -> None:
    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        address = oracle.target
        with stream_to(address, BUDGET_SECONDS="20") as stream:
            stream.wait(stream.submit(step(0)))
            oracle._server.stop(None).wait()
            pending = [stream.submit(step(1)), stream.submit(step(2))]
            with ScriptedOracle(constant(LATENCY_NS), address=address) as again:
                assert [stream.wait(p).step_index for p in pending] == [1, 2]
                assert [r.step_index for r in again.requests] == [1, 2]


def test_a_spent_budget_ends_every_step_with_oracle_budget_and_step() -> None:
    with ScriptedOracle(constant(LATENCY_NS)) as oracle, stream_to(oracle.target, BUDGET_SECONDS="0.5") as stream:
        stream.wait(stream.submit(step(0)))
        oracle._server.stop(None).wait()
        pending = [stream.submit(step(41)), stream.submit(step(42))]
        for lost in pending:
            with pytest.raises(OracleLost) as caught:
                stream.wait(lost)
        message = str(caught.value)
        assert oracle.target in message
        assert "step 41" in message
        assert "budget 0.5 s" in message
        with pytest.raises(OracleLost):
            stream.wait(stream.submit(step(43)))


def test_a_silent_server_counts_as_lost() -> None:
    release = threading.Event()

    def silent(_: pb.StreamStepsRequest, __: Any) -> None:
        release.wait(10)

    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        oracle.before_answer = silent
        with stream_to(oracle.target, BUDGET_SECONDS="0.5") as stream:
            with pytest.raises(OracleLost, match="no answer in"):
                stream.wait(stream.submit(step(0)))
            release.set()


def test_a_refusal_is_not_retried() -> None:
    def refuse(_: pb.StreamStepsRequest, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "pack differs: block_size")

    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        oracle.before_answer = refuse
        with stream_to(oracle.target) as stream:
            started = time.monotonic()
            with pytest.raises(OracleLost, match="pack differs: block_size"):
                stream.wait(stream.submit(step(0)))
            assert time.monotonic() - started < 5
        assert len(oracle.opened) == 1


def test_an_id_that_is_taken_ends_an_engine_at_the_opening_of_a_stream_alone() -> None:
    taken = threading.Event()

    def take(message: pb.StreamStepsRequest, context: grpc.ServicerContext) -> None:
        if message.steps and (message.steps[0].step_index == 1 and not taken.is_set()):
            taken.set()
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "the engine opened a newer stream")

    def refuse(_: pb.StreamStepsRequest, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.ALREADY_EXISTS, "the engine id was attached again since")

    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        oracle.before_answer = take
        with stream_to(oracle.target) as stream:
            stream.wait(stream.submit(step(0)))
            assert stream.wait(stream.submit(step(1))).step_index == 1
            oracle.before_answer = refuse
            with pytest.raises(OracleLost, match="attached again since"):
                stream.wait(stream.submit(step(2)))
        assert len(oracle.opened) == 3


def test_under_hold_the_budget_does_not_end_anything() -> None:
    held = threading.Event()

    def late(_: pb.StreamStepsRequest, __: Any) -> None:
        held.wait(1.0)

    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        oracle.before_answer = late
        with stream_to(oracle.target, BUDGET_SECONDS="0.2", ON_LOST="hold") as stream:
            assert stream.wait(stream.submit(step(0))).step_index == 0


def test_an_answer_to_a_step_nobody_asked_is_an_error() -> None:
    def wrong(request: step_pb2.StepRequest) -> step_pb2.StepReply:
        return step_pb2.StepReply(step_index=request.step_index + 1, latency_ns=[1])

    with (
        ScriptedOracle(wrong) as oracle,
        stream_to(oracle.target) as stream,
        pytest.raises(OracleLost, match="answer to step 1 while step 0 is pending"),
    ):
        stream.wait(stream.submit(step(0)))


def test_the_highest_generation_seen_goes_with_every_message() -> None:
    seen: list[int] = []

    def record(message: pb.StreamStepsRequest, _: Any) -> None:
        if message.steps:
            seen.append(message.min_generation)

    def answer(request: step_pb2.StepRequest) -> step_pb2.StepReply:
        return step_pb2.StepReply(step_index=request.step_index, latency_ns=[1], generation=9)

    with ScriptedOracle(answer) as oracle:
        oracle.before_answer = record
        with stream_to(oracle.target) as stream:
            stream.wait(stream.submit(step(0)))
            stream.wait(stream.submit(step(1)))
    assert seen == [0, 9]


def test_counts_arrive_with_the_last_message() -> None:
    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        with stream_to(oracle.target) as stream:
            stream.wait(stream.submit(step(0)))
            stream.count_step(15_000, 0)
            stream.count_step(70_000, 1_000)
        counts = oracle.counts[-1]
    assert (counts.steps, counts.late_answers, counts.late_answer_ns) == (2, 1, 1_000)
    assert list(counts.lateness_buckets)[:5] == [0, 1, 0, 1, 0]
    assert counts.lateness_sum_ns == 85_000


def test_a_step_that_is_counted_while_counts_are_taken_is_in_one_message() -> None:
    with ScriptedOracle(constant(LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        done, taken = threading.Event(), []

        def take() -> None:
            while not done.is_set():
                taken.append(stream._take_counts().steps)

        takers = [threading.Thread(target=take) for _ in range(2)]
        for taker in takers:
            taker.start()
        for _ in range(20_000):
            stream.count_step(0, 0)
        done.set()
        for taker in takers:
            taker.join()
        assert sum(taken) + stream._take_counts().steps == 20_000


def test_threads_take_turns_faster_only_while_an_answer_is_awaited() -> None:
    """Else vLLM's own threads come before the next step: 2 ms a step on a slow core."""
    release = threading.Event()

    def hold(message: pb.StreamStepsRequest, _: Any) -> None:
        release.wait(10)

    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle, stream_to(oracle.target, HURRIED_INTERVAL) as stream:
        assert sys.getswitchinterval() == pytest.approx(USUAL_INTERVAL)
        first = stream.submit(step(0))
        assert sys.getswitchinterval() == pytest.approx(HURRIED_INTERVAL)
        stream.wait(first)
        oracle.before_answer = hold
        later = stream.submit(prefill(1))
        stream.count_step(0, 0, first.reply)
        # The step after the one that is resolved is under way still.
        assert sys.getswitchinterval() == pytest.approx(HURRIED_INTERVAL)
        release.set()
        stream.wait(later)
        stream.count_step(0, 0, later.reply)
        assert sys.getswitchinterval() == pytest.approx(USUAL_INTERVAL)
        leased = decode(stream, 2)
        assert leased.is_answered()
        assert sys.getswitchinterval() == pytest.approx(USUAL_INTERVAL)


def test_several_streams_of_a_process_leave_it_as_it_is() -> None:
    with ScriptedOracle(constant(LATENCY_NS)) as oracle:
        settings = config(oracle.target)
        stream = OracleStream(settings, replicas_of(settings), pb.StreamOpen())
        try:
            asked = stream.submit(step(0))
            assert sys.getswitchinterval() == pytest.approx(USUAL_INTERVAL)
            stream.wait(asked)
        finally:
            stream.close()


def test_an_engine_that_spins_lets_its_threads_in_all_the_time() -> None:
    with (
        ScriptedOracle(constant(LATENCY_NS)) as oracle,
        stream_to(oracle.target, HURRIED_INTERVAL, WAIT="spin") as stream,
    ):
        assert sys.getswitchinterval() == pytest.approx(HURRIED_INTERVAL)
        asked = stream.submit(step(0))
        stream.wait(asked)
        stream.count_step(0, 0, asked.reply)
        assert sys.getswitchinterval() == pytest.approx(HURRIED_INTERVAL)
    assert sys.getswitchinterval() == pytest.approx(USUAL_INTERVAL)
