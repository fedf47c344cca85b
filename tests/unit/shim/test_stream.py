"""One stream, over a real channel: order, resends, budget, refusal."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from fakes import ScriptedOracle, constant
from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import step_pb2
from vllm_shim.config import ShimConfig
from vllm_shim.errors import OracleLost
from vllm_shim.step_shape import DecodeStep
from vllm_shim.stream import OracleStream, PendingStep, call_unary, replicas_of

LATENCY_NS = 5_000_000
# CPython's, and the shim's in a hurry.
USUAL_INTERVAL, HURRIED_INTERVAL = 0.005, 0.0001


def config(target: str, **changes: str) -> ShimConfig:
    variables = {"STEP_ORACLE_TARGET": target, "STEP_ORACLE_ENGINE_ID": "engine-0"}
    return ShimConfig.from_environment(variables | {f"STEP_ORACLE_{k}": v for k, v in changes.items()}, [])


@contextmanager
def stream_to(target: str, hurried_seconds: float = USUAL_INTERVAL, /, **changes: str) -> Iterator[OracleStream]:
    settings = config(target, **changes)
    opening = pb.StreamOpen(engine=pb.EngineIdentity(engine_id="engine-0"), incarnation=7)
    stream = OracleStream(settings, replicas_of(settings), opening, hurried_seconds=hurried_seconds)
    try:
        yield stream
    finally:
        stream.close()


def step(index: int) -> step_pb2.StepRequest:
    shape = step_pb2.StepShape(num_decode_requests=1, num_decode_tokens=1, concurrency=1)
    return step_pb2.StepRequest(step_index=index, shape=shape)


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


def granting(generation: int, latency_ns: int) -> Any:
    """Answers that lease everything there is to lease."""

    def answer(request: step_pb2.StepRequest) -> step_pb2.StepReply:
        reply = step_pb2.StepReply(step_index=request.step_index, latency_ns=[latency_ns], generation=generation)
        if not request.shape.prefill_chunks:
            reply.lease.num_decode_requests = 1
            reply.lease.context_tokens_end = reply.lease.max_context_tokens_end = 1 << 40
            reply.lease.residual_pool.append(1.0)
            reply.lease.intercept_ns, reply.lease.generation = latency_ns, generation
        return reply

    return answer


def decode(stream: OracleStream, index: int) -> PendingStep:
    one = DecodeStep([], [], [], 1, 100, 100, 0)
    request = step(index)
    request.shape.decode_context_tokens = request.shape.max_decode_context_tokens = 100
    return stream.submit_decode(index, one, lambda _: request)


def prefill(index: int) -> step_pb2.StepRequest:
    shape = step_pb2.StepShape(prefill_chunks=[step_pb2.PrefillChunk(num_tokens=3)], concurrency=1)
    return step_pb2.StepRequest(step_index=index, shape=shape)


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
        end = time.monotonic() + 10
        while not oracle.counts:
            assert time.monotonic() < end, "no heartbeat"
            time.sleep(0.05)
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
            end = time.monotonic() + 10
            while not oracle.counts:
                assert time.monotonic() < end, "no heartbeat"
                time.sleep(0.02)
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


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


def test_a_stream_that_ends_without_an_error_is_followed_by_the_next_and_counts_as_no_trouble() -> None:
    with ScriptedOracle(constant(LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        oracle.messages_per_stream = 2
        # The first message opens the stream.
        for index in range(8):
            assert stream.wait(stream.submit(step(index))).step_index == index
        assert len(oracle.opened) >= 4
        assert stream._counts["reconnects"] == 0
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


def test_leases_outlive_a_stream_that_ends_without_an_error() -> None:
    with ScriptedOracle(granting(1, LATENCY_NS)) as oracle, stream_to(oracle.target) as stream:
        stream.wait(decode(stream, 0))
        assert decode(stream, 1).is_answered()
        oracle.messages_per_stream = 1
        stream.wait(stream.submit(prefill(2)))
        # It ends with each message from now on, and the next one opens.
        wait_until(lambda: len(oracle.opened) >= 3)
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


@contextmanager
def two_replicas(answer: Any = None) -> Iterator[tuple[ScriptedOracle, ScriptedOracle, str]]:
    with ScriptedOracle(answer or constant(LATENCY_NS)) as a, ScriptedOracle(answer or constant(LATENCY_NS)) as b:
        yield a, b, f"{a.target}, {b.target}"


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
