"""gRPC's event engine takes no part in a step, unless whoever starts the server wants it to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from oracle_calls import Calls, decode
from oracle_process import OracleProcess
from sharded_server import TWO_SHARDS, shard_pids

MESSAGES = 200
# Its timers go on, in every process, and more often the slower a machine is (125 in two shards were seen); where it
# takes part there are three for each message.
IDLE_SWITCHES = 2 * MESSAGES
Dirs = dict[str, Path]


def switches(pids: list[int]) -> int:
    """How often the threads of the event engine have waited for something to do."""
    found = 0
    for thread in (thread for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir()):
        status = (thread / "status").read_text()
        if status.startswith("Name:\tevent_engine"):
            waits = re.search(r"^voluntary_ctxt_switches:\t(\d+)", status, re.MULTILINE)
            assert waits is not None
            found += int(waits[1])
    return found


def switches_of_messages(server: OracleProcess, pids: Callable[[], list[int]], pack: Path) -> int:
    """In the time of MESSAGES messages, one after the other."""
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack))
        stream = calls.join("e")
        stream.ask(decode(0))
        before = switches(pids())
        for i in range(MESSAGES):
            stream.ask(decode(1 + i))
        took = switches(pids()) - before
        stream.close()
    return took


def test_no_thread_of_it_wakes_up_for_a_message(new_server: Callable[..., OracleProcess], pack_dirs: Dirs) -> None:
    """A gRPC that does not know the switch any more fails here: three of its threads wake up for each message."""
    server = new_server()
    assert switches_of_messages(server, lambda: [server.pid], pack_dirs["constant"]) < IDLE_SWITCHES


def test_nor_in_a_shard(new_server: Callable[..., OracleProcess], pack_dirs: Dirs) -> None:
    server = new_server(arguments=TWO_SHARDS)
    assert (
        switches_of_messages(server, lambda: list(shard_pids(server).values()), pack_dirs["constant"]) < IDLE_SWITCHES
    )


def test_whoever_starts_the_server_has_the_last_word(new_server: Callable[..., OracleProcess], pack_dirs: Dirs) -> None:
    server = new_server(extra_env={"GRPC_EXPERIMENTS": "event_engine_listener"})
    assert switches_of_messages(server, lambda: [server.pid], pack_dirs["constant"]) > MESSAGES
