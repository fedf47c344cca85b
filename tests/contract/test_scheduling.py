"""The server's threads run under the policy that costs the least, or under the one they were started with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from oracle_calls import Calls, decode, identity
from oracle_process import OracleProcess
from sharded_server import TWO_SHARDS, events, shard_pids

Dirs = dict[str, Path]


def policies(pid: int) -> set[int]:
    """Of all threads of a process."""
    return {os.sched_getscheduler(int(path.name)) for path in Path(f"/proc/{pid}/task").iterdir()}


def started(server: OracleProcess) -> list[object]:
    return [event["scheduling"] for event in events(server) if event["event"] == "started"]


def test_every_thread_is_a_batch_thread(new_server: Callable[..., OracleProcess], pack_dirs: Dirs) -> None:
    server = new_server()
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        assert calls.sample(identity("e"), [decode(0)])
        assert policies(server.pid) == {os.SCHED_BATCH}
    assert started(server) == ["batch"]


def test_every_thread_of_every_shard_is_a_batch_thread(sharded: OracleProcess) -> None:
    pids = (sharded.pid, *shard_pids(sharded).values())
    assert len(pids) == 3
    assert [policies(pid) for pid in pids] == [{os.SCHED_BATCH}] * 3


def test_the_policy_of_its_start_can_be_kept(new_server: Callable[..., OracleProcess]) -> None:
    server = new_server(extra_env={"STEP_ORACLE_SCHEDULING": "other"}, arguments=TWO_SHARDS)
    for pid in (server.pid, *shard_pids(server).values()):
        assert policies(pid) == {os.sched_getscheduler(0)}
