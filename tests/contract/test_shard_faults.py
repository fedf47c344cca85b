"""Shards that die, hang or cannot start, and the end of their parent."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import msgspec
import pytest

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, Stream, decode, identity, mixed_steps, reason_of
from oracle_process import OracleProcess
from oracle_server.shards.messages import ShardTask
from sharded_server import TWO_SHARDS, child_of, events, has_ended, is_healthy, metrics, shard_pids, wait_for
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, tenant_pb2

Dirs = dict[str, Path]


def test_a_killed_shard_costs_no_answer(sharded: OracleProcess, shards: tuple[Calls, Calls], pack_dirs: Dirs) -> None:
    name = "tenants/default/experiments/killed"
    shards[0].create(shards[0].upload(pack_dirs["composed"]), "killed", seed=3)
    steps = mixed_steps(3000)
    expected = shards[0].sample(identity("e0", name), steps), shards[0].sample(identity("e1", name), steps)
    different = [0, 0]
    broken = [0, 0]
    asked = [0, 0]
    failures: list[BaseException] = []
    stop = threading.Event()

    def emulate(number: int) -> None:
        """An engine at the common address, as the shim: ask again on a new stream until it is answered."""
        engine = identity(f"e{number}", name)
        try:
            with Calls(sharded.target) as calls:
                incarnation = calls.attach(engine).incarnation
                stream = calls.open(engine, incarnation)
                while not stop.is_set():
                    i = asked[number] % len(steps)
                    try:
                        different[number] += stream.ask(steps[i])[0] != expected[number][i]
                        asked[number] += 1
                    except grpc.RpcError:
                        broken[number] += 1
                        stream = reopen(calls, engine, incarnation)
                stream.close()
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=emulate, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    before = metrics(sharded)
    for shard in (0, 1):
        killed = shard_pids(sharded)[shard]
        begun = list(asked)
        wait_for(lambda begun=begun: min(now - then for now, then in zip(asked, begun, strict=True)) > 20)  # type: ignore[misc]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda shard=shard, killed=killed: shard_pids(sharded).get(shard, killed) != killed)  # type: ignore[misc]
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT)
    assert not failures
    assert different == [0, 0]
    # Each engine had a stream at one of the two.
    assert min(broken) >= 1
    assert metrics(sharded)["steps"] >= before["steps"]
    for calls in shards:
        request = oracle_service_pb2.SampleStepRequest(engine=identity("e0", name), steps=steps[:50])
        answered = calls.oracle.SampleStep(request, timeout=TIMEOUT, wait_for_ready=True)
        assert list(answered.replies) == expected[0][:50]


@pytest.mark.slow
def test_a_shard_that_hangs_is_replaced_before_an_activation_is_acknowledged(
    sharded: OracleProcess, shards: tuple[Calls, Calls], pack_dirs: Dirs
) -> None:
    name = "tenants/default/experiments/hung"
    shards[0].create(shards[0].upload(pack_dirs["constant"]), "hung")
    pid = shard_pids(sharded)[1]
    os.kill(pid, signal.SIGSTOP)
    binding = experiment_pb2.Binding(default_pack_digest=shards[0].upload(pack_dirs["constant20"]))
    activation = experiment_pb2.ActivateExperimentRequest(name=name, binding=binding)
    # It takes as long as a shard may take to answer, up to 15 s.
    activated = shards[0].experiments.ActivateExperiment(activation, timeout=3 * TIMEOUT)
    assert activated.experiment.generation == 2
    assert has_ended(pid)
    wait_for(lambda: len(shard_pids(sharded)) == 2)
    request = oracle_service_pb2.SampleStepRequest(engine=identity("e", name), steps=[decode(0)])
    answered = shards[1].oracle.SampleStep(request, timeout=TIMEOUT, wait_for_ready=True)
    assert answered.replies[0].generation == 2


@pytest.mark.slow
def test_a_shard_that_hangs_is_replaced_though_nobody_changes_anything(sharded: OracleProcess) -> None:
    wait_for(lambda: len(shard_pids(sharded)) == 2)
    pid = shard_pids(sharded)[0]
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: shard_pids(sharded).get(0, pid) != pid, 3 * TIMEOUT)
    assert has_ended(pid)
    why = [event["why"] for event in events(sharded) if event["event"] == "shard ended" and event["pid"] == pid]
    assert [sentence for sentence in why if "it hangs" in str(sentence)]


def test_a_stopped_shard_does_not_outlive_its_parent(new_server: Callable[..., OracleProcess]) -> None:
    server = new_server(arguments=TWO_SHARDS)
    pids = shard_pids(server)
    os.kill(pids[1], signal.SIGSTOP)
    try:
        os.kill(server.pid, signal.SIGKILL)
        wait_for(lambda: all(has_ended(pid) for pid in pids.values()), 5)
    finally:
        if not has_ended(pids[1]):
            os.kill(pids[1], signal.SIGKILL)


def test_a_shard_whose_parent_is_another_process_ends(tmp_path: Path) -> None:
    """Its parent died before the shard could ask to end with it."""
    task = ShardTask(0, 1, 1, (), str(tmp_path), True, 0.0, f"unix:{tmp_path}/p", f"unix:{tmp_path}/p.0", None, False)
    command = [sys.executable, "-m", "oracle_server.shards", msgspec.json.encode(task).decode()]
    done = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


def test_the_sockets_are_gone_before_the_state_folder_is_free(new_server: Callable[..., OracleProcess]) -> None:
    server = new_server(arguments=TWO_SHARDS, metrics="127.0.0.1:0")
    assert list(server.state_dir.glob("parent.sock*"))
    with (server.state_dir / "lock").open() as lock:
        os.kill(server.pid, signal.SIGTERM)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever has the folder now binds these paths.
        assert not list(server.state_dir.glob("parent.sock*"))
    assert server.terminate() == 0


def test_the_end_of_the_parent_is_the_end_of_its_shards(
    new_server: Callable[..., OracleProcess], pack_dirs: Dirs
) -> None:
    server = new_server(arguments=TWO_SHARDS)
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["composed"]))
        stream = calls.join("e")
        before = stream.ask(decode(7))
        pids = shard_pids(server)
        os.kill(server.pid, signal.SIGKILL)
        wait_for(lambda: all(has_ended(pid) for pid in pids.values()), 5)
        with pytest.raises(grpc.RpcError):
            stream.receive()
    wait_for(lambda: server.returncode is not None)
    server.start()
    with Calls(server.target) as calls:
        assert calls.open(identity("e"), 1).ask(decode(7)) == before


def test_sigterm_drains_every_shard(new_server: Callable[..., OracleProcess], pack_dirs: Dirs, tmp_path: Path) -> None:
    server = new_server(listen=(f"unix:{tmp_path}/s",), arguments=TWO_SHARDS)
    pids = shard_pids(server)
    with Calls(server.targets[0]) as first, Calls(server.targets[1]) as second:
        first.create(first.upload(pack_dirs["constant"]))
        streams = [first.join("e0"), second.join("e1")]
        for stream in streams:
            stream.ask(decode(0), decode(1))
        watch = second.experiments.WatchExperiment(experiment_pb2.WatchExperimentRequest(name=EXPERIMENT))
        next(watch)
        assert server.terminate() == 0
        for call in (streams[0].receive, streams[1].receive, lambda: next(watch)):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert reason_of(caught.value) == ("UNAVAILABLE", "DRAINING")
    assert all(has_ended(pid) for pid in pids.values())
    assert [e["steps"] for e in events(server) if e["event"] == "drained"] == [4]
    assert not list(server.state_dir.glob("parent.sock*"))


def test_health_waits_for_the_last_shard(tmp_path: Path) -> None:
    server = OracleProcess(tmp_path / "state", listen=(f"unix:{tmp_path}/s",), arguments=TWO_SHARDS)
    server.start(wait=False)
    try:
        wait_for(lambda: child_of(server.pid, 1) > 0)
        late = child_of(server.pid, 1)
        os.kill(late, signal.SIGSTOP)
        wait_for(lambda: bool(shard_pids(server)))
        with Calls(f"unix:{tmp_path}/s.0") as calls:
            # The first shard has all it needs, and says it does not serve.
            assert calls.tenants.ListTenants(tenant_pb2.ListTenantsRequest(), timeout=TIMEOUT).tenants
        assert not is_healthy(f"unix:{tmp_path}/s.0")
        os.kill(late, signal.SIGCONT)
        server.wait_ready()
        assert is_healthy(f"unix:{tmp_path}/s.0")
        assert is_healthy(f"unix:{tmp_path}/s.1")
    finally:
        server.stop()


def test_what_shards_cannot_start_with_is_told(sharded: OracleProcess, tmp_path: Path) -> None:
    for arguments, status, sentence in (
        (["--listen", sharded.target, *TWO_SHARDS], 1, "cannot be bound"),
        (["--listen", sharded.target], 1, "cannot be bound"),
        (["--listen", f"unix:{tmp_path}/nowhere/s", *TWO_SHARDS], 1, "cannot be bound"),
        (
            ["--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / ("x" * 100)), *TWO_SHARDS],
            1,
            "too long for the sockets",
        ),
        (["--listen", "127.0.0.1:0", "--shards", "0"], 2, "allowed: 1"),
    ):
        command = [str(Path(sys.executable).with_name("step-oracle")), "serve", "--metrics", "off"]
        command += ["--state-dir", str(tmp_path / "refused"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, sentence in done.stderr) == (status, True), done.stderr


def reopen(calls: Calls, engine: oracle_service_pb2.EngineIdentity, incarnation: int) -> Stream:
    """A new stream, as soon as there is one."""
    end = time.monotonic() + TIMEOUT
    while True:
        try:
            return calls.open(engine, incarnation)
        except grpc.RpcError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
