"""The compiled load client gets what a grpcio client gets, and says so where it does not."""

from __future__ import annotations

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from oracle_calls import Calls, identity
from oracle_process import OracleProcess
from performance.load.client import LoadFailed, LoadRun, NoCompiler, build_client, run_load
from performance.load.script import STREAM, UNARY, Script, ScriptEngine, stream_messages, unary_messages
from performance.load.sequences import mixed_share, step_sequence
from sharded_server import is_stopped, metrics, wait_for
from step_oracle.v1 import oracle_service_pb2, step_pb2

STEPS = step_sequence(300, seed=5)
PERIOD_NS = 1_000_000
# What is not answered by then counts as lost. Longer than any machine stalls: these tests are not about time.
DRAIN_SECONDS = 50.0
STALL_SECONDS = 0.6


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        build_client()
    except NoCompiler as error:
        pytest.skip(str(error))


def opening(calls: Calls, name: str) -> bytes:
    """The first message of a stream of an engine that has attached."""
    engine = identity(name)
    opened = oracle_service_pb2.StreamOpen(engine=engine, incarnation=calls.attach(engine).incarnation)
    return oracle_service_pb2.StreamStepsRequest(open=opened).SerializeToString()


def streams(calls: Calls, names: list[str], steps: list[step_pb2.StepRequest] = STEPS) -> Script:
    messages = stream_messages(steps, period_ns=PERIOD_NS, generation=1)
    engines = [ScriptEngine(0, 100_000 * i, opening(calls, name)) for i, name in enumerate(names)]
    return Script(STREAM, [messages], engines)


def replies_of(run: LoadRun, engine: int) -> list[step_pb2.StepReply]:
    return [reply for number, reply in run.replies if number == engine]


@pytest.mark.parametrize("closed", [False, True])
def test_streamed_answers_equal_those_of_a_grpcio_client(
    closed: bool, shared: Calls, shared_server: OracleProcess
) -> None:
    names = ["load-0", "load-1", "load-2"]
    expected = []
    for name in names:
        stream = shared.join(name)
        expected.append([reply for step in STEPS for reply in stream.ask(step)])
        stream.close()
    run = run_load(
        streams(shared, names), shared_server.target, closed=closed, answers=True, drain_seconds=DRAIN_SECONDS
    )
    assert run.kept_up
    assert run.steps == len(names) * len(STEPS)
    assert [replies_of(run, engine) for engine in range(len(names))] == expected
    assert (run.latency_ns > 0).all()


def test_unary_answers_equal_those_of_a_grpcio_client(shared: Calls, shared_server: OracleProcess) -> None:
    engine = oracle_service_pb2.SampleStepRequest(engine=identity("load-unary")).SerializeToString()
    script = Script(UNARY, [unary_messages(STEPS, period_ns=PERIOD_NS)], [ScriptEngine(0, 0, engine)])
    run = run_load(script, shared_server.target, answers=True, drain_seconds=DRAIN_SECONDS)
    assert run.kept_up
    assert replies_of(run, 0) == shared.sample(identity("load-unary"), STEPS)


def test_an_engine_that_begins_in_the_middle_sends_its_part_alone(shared: Calls, shared_server: OracleProcess) -> None:
    messages = stream_messages(STEPS, period_ns=PERIOD_NS, generation=1)
    engines = [
        ScriptEngine(0, -first * PERIOD_NS, opening(shared, f"load-from-{first}"), first, 50) for first in (0, 100, 250)
    ]
    run = run_load(Script(STREAM, [messages], engines), shared_server.target, answers=True, drain_seconds=DRAIN_SECONDS)
    assert run.kept_up
    assert run.due_ns.tolist() == [i * PERIOD_NS for i in range(50)] * 3
    for number, first in enumerate((0, 100, 250)):
        asked = STEPS[first : first + 50]
        assert replies_of(run, number) == shared.sample(identity(f"load-from-{first}"), asked)


def test_a_part_that_is_not_there_is_an_error(shared: Calls, shared_server: OracleProcess) -> None:
    messages = stream_messages(STEPS, period_ns=PERIOD_NS, generation=1)
    script = Script(STREAM, [messages], [ScriptEngine(0, 0, b"", len(STEPS) - 1, 2)])
    with pytest.raises(LoadFailed, match=f"2 messages from {len(STEPS) - 1} on, of {len(STEPS)}"):
        run_load(script, shared_server.target)


def test_the_client_speaks_over_a_unix_socket(tmp_path: Path, pack_dirs: dict[str, Path]) -> None:
    with OracleProcess(tmp_path / "state", listen=(f"unix:{tmp_path}/s",)) as server, Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["sampled"]))
        run = run_load(streams(calls, ["e"]), server.target, answers=True, drain_seconds=DRAIN_SECONDS)
        assert replies_of(run, 0) == calls.sample(identity("e"), STEPS)


def test_an_open_loop_charges_a_stalled_server_for_what_was_due(shared: Calls, shared_server: OracleProcess) -> None:
    engine = [ScriptEngine(0, 0, opening(shared, "load-due"))]
    messages = stream_messages(STEPS, period_ns=10 * PERIOD_NS, generation=1)
    before = metrics(shared_server)["steps"]
    with ThreadPoolExecutor() as pool:
        script = Script(STREAM, [messages], engine)
        running = pool.submit(run_load, script, shared_server.target, drain_seconds=DRAIN_SECONDS)
        wait_for(lambda: metrics(shared_server)["steps"] > before)
        os.kill(shared_server.pid, signal.SIGSTOP)
        try:
            wait_for(lambda: is_stopped(shared_server.pid))
            stopped = time.monotonic_ns()
            time.sleep(STALL_SECONDS)
            continued = time.monotonic_ns()
        finally:
            os.kill(shared_server.pid, signal.SIGCONT)
        run = running.result()
    assert run.kept_up
    assert (run.due_ns == [i * 10 * PERIOD_NS for i in range(len(STEPS))]).all()
    due = run.begin_ns + run.due_ns
    stalled = (due > stopped) & (due < continued)
    assert stalled.sum() > 20
    assert (run.latency_ns[stalled] >= continued - due[stalled]).all()
    # Those due in its first half were sent while the server stood still: nothing waited for an answer.
    early = due < (stopped + continued) // 2
    assert (run.begin_ns + run.sent_ns[stalled & early] < continued).all()


def test_a_run_that_ends_early_sends_nothing_after_its_end(shared: Calls, shared_server: OracleProcess) -> None:
    """A message after the end of our side of a call is an error of the protocol."""
    script = streams(shared, [f"load-early-{i}" for i in range(8)], STEPS * 100)
    run = run_load(script, shared_server.target, closed=True, max_seconds=0.5)
    assert run.end == "time"
    assert 0 < run.answered < run.messages
    assert (run.failed_engines, run.first_error) == (0, "")


def test_a_server_that_refuses_a_step_is_an_error(shared: Calls, shared_server: OracleProcess) -> None:
    bad = step_pb2.StepRequest(step_index=1, shape=step_pb2.StepShape(concurrency=3))
    script = streams(shared, ["load-bad"], [STEPS[0], bad])
    with pytest.raises(LoadFailed, match=r"status that is not 0.*cannot be"):
        run_load(script, shared_server.target)


def test_a_stream_that_the_server_does_not_open_is_an_error(shared: Calls, shared_server: OracleProcess) -> None:
    never = oracle_service_pb2.StreamStepsRequest().SerializeToString()
    messages = stream_messages(STEPS, period_ns=PERIOD_NS, generation=1)
    with pytest.raises(LoadFailed, match="status that is not 0"):
        run_load(Script(STREAM, [messages], [ScriptEngine(0, 0, never)]), shared_server.target)


def test_only_loopback_is_a_target() -> None:
    with pytest.raises(LoadFailed, match="allowed are 127"):
        run_load(Script(STREAM, [], []), "192.0.2.1:80")


def test_a_sequence_is_what_a_scheduler_makes() -> None:
    steps = step_sequence(3000, seed=1)
    assert steps == step_sequence(3000, seed=1)
    assert 0.10 < mixed_share(steps) < 0.14
    for before, after in itertools.pairwise(steps):
        shape = after.shape
        assert after.step_index == before.step_index + 1
        assert shape.concurrency == shape.num_decode_requests + len(shape.prefill_chunks)
        assert shape.previous_prefill_tokens == sum(chunk.num_tokens for chunk in before.shape.prefill_chunks)
        if shape.num_decode_requests:
            longest, context = shape.max_decode_context_tokens, shape.decode_context_tokens
            assert longest <= context <= shape.num_decode_requests * longest
