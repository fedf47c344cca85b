"""`step-oracle top` against a real server with attached engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from oracle_calls import Calls
from oracle_process import OracleProcess
from sharded_server import wait_for
from traffic import Engine

COMMAND = str(Path(sys.executable).with_name("step-oracle"))
Dirs = dict[str, Path]


def arguments(*words: object, target: str) -> tuple[list[str], dict[str, str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
    return [COMMAND, "top", *map(str, words)], {**environment, "STEP_ORACLE_TARGET": target, "COLUMNS": "140"}


def top(*words: object, target: str) -> subprocess.CompletedProcess[str]:
    command, environment = arguments(*words, target=target)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@contextmanager
def stepping(*engines: Engine, late: int = 0) -> Iterator[None]:
    """The engines step all the time, each 4 steps asked for and 16 leased at once."""
    stop = threading.Event()

    def step() -> None:
        while not stop.wait(0.05):
            for engine in engines:
                engine.step(4, 16, late=late)

    thread = threading.Thread(target=step)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)


@pytest.mark.parametrize("shards", [1, 2])
def test_once_shows_the_fleet_as_it_is_now(
    shards: int, new_server: Callable[..., OracleProcess], pack_dirs: Dirs
) -> None:
    server = new_server(arguments=() if shards == 1 else ("--shards", str(shards)))
    with Calls(server.target) as calls:
        digest = calls.upload(pack_dirs["composed"])
        for name in ("default", "canary"):
            calls.create(digest, name)
        fine = Engine(calls, "fine:8000")
        late = Engine(calls, "late:8000", "tenants/default/experiments/canary")
        with stepping(fine), stepping(late, late=1):
            time.sleep(0.5)
            done = top("--once", "--json", "--interval", "1", target=server.target)
            text = top("--once", "--experiment", "canary", "--interval", "0.5", target=server.target)
        fine.close()
        late.close()

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    engines = {engine["engine_id"]: engine for engine in document["engines"]}
    assert (document["health"], document["fresh"], document["note"]) == ("SERVING", True, "")
    assert {name: engine["state"] for name, engine in engines.items()} == {"fine:8000": "ok", "late:8000": "late"}
    for engine in engines.values():
        assert (engine["lease_share"], engine["extrapolated_share"]) == (0.8, 0.0)
        assert engine["steps_per_second"] > 10
        assert 0 < engine["lateness_p50_seconds"] < 10e-6 < engine["lateness_p99_seconds"] <= 2e-3
        assert (engine["generation"], engine["pack"]) == (1, f"test@{digest[7:13]}")
    assert engines["late:8000"]["new_late_answers"] > 0
    assert [(e["name"].rpartition("/")[2], e["engines"], e["degraded"]) for e in document["experiments"]] == [
        ("canary", 1, 1),
        ("default", 1, 0),
    ]
    assert document["total"]["steps_per_second"] == pytest.approx(
        sum(engine["steps_per_second"] for engine in engines.values())
    )

    assert text.returncode == 0, text.stderr
    lines = text.stdout.splitlines()
    assert "SERVING  1 engines, 1 degraded" in lines[0]
    assert "late:8000" in text.stdout
    assert "fine:8000" not in text.stdout


def test_it_survives_a_server_that_restarts_and_says_so(
    new_server: Callable[..., OracleProcess], pack_dirs: Dirs
) -> None:
    server = new_server()
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        engine = Engine(calls, "e")
        engine.step(50)
        command, environment = arguments("--json", "--interval", "0.2", target=server.target)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            documents = Documents(process)
            wait_for(lambda: bool(documents.last["engines"]))
            server.kill()
            wait_for(lambda: not documents.last["fresh"])
            assert "no answer for" in documents.last["note"]
            assert documents.last["engines"][0]["engine_id"] == "e"
            server.start()
            wait_for(lambda: bool(documents.last["fresh"]))
            assert "answers again" in documents.last["note"]
            again = calls.open(engine.engine, engine.incarnation)
            wait_for(lambda: "restarted" in documents.last["note"])
            assert process.poll() is None
            process.terminate()
            again.close()


class Documents:
    """The lines of `top --json` as they come; a thread of its own reads them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.last: dict[str, Any] = {"engines": [], "fresh": True, "note": ""}
        self._stdout = process.stdout
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._stdout is not None
        for line in self._stdout:
            self.last = json.loads(line)


def test_without_a_server_or_with_wrong_arguments_it_ends_and_says_why(shared_server: OracleProcess) -> None:
    target = shared_server.target
    nobody = top("--once", target="127.0.0.1:1")
    assert nobody.returncode == 3
    assert "step-oracle serve" in nobody.stderr
    unknown = top("--once", "--experiment", "nothing", target=target)
    assert unknown.returncode == 1
    assert "nothing" in unknown.stderr
    for words, allowed in ((("--interval", "0"), "0.2 to 60 seconds"), (("--sort", "x"), "trouble, steps")):
        done = top("--once", *words, target=target)
        assert done.returncode == 2
        assert allowed in done.stderr
