"""`experiment overlay` and `experiment shadow` against a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oracle_calls import Calls, decode, identity
from oracle_process import OracleProcess
from sharded_server import wait_for

COMMAND = str(Path(sys.executable).with_name("step-oracle"))


def run(*arguments: object, target: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
    words = [COMMAND, "experiment", *map(str, arguments)]
    environment["STEP_ORACLE_TARGET"] = target
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)


def read(*arguments: object, target: str) -> Any:
    done = run(*arguments, "--json", target=target)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_running_experiment_is_slowed_down_by_one_command_and_back(
    calls: Calls, server: OracleProcess, pack_dirs: dict[str, Path], tmp_path: Path
) -> None:
    target = server.target
    calls.create(calls.upload(pack_dirs["constant"]), seed=9, draft_acceptance_rate=0.5)
    before = read("get", "default", target=target)["binding"]

    def latency(engine_id: str) -> int:
        return calls.sample(identity(engine_id), [decode(0)])[0].latency_ns[0]

    shown = read("overlay", "default", "--slow-down", 2, "--engine", "slow", target=target)
    assert (shown["generation"], shown["overlays"][0]["engine_ids"]) == ("2", ["slow"])
    assert (latency("slow"), latency("other")) == (20_000_000, 10_000_000)
    after = read("get", "default", target=target)["binding"]
    assert {**after, "overlays": []} == before

    shown = read(
        "overlay", "default", "--stall-every", 1, "--stall-ms", 2.5, "--to-device-seconds", 1.5, "--label", "a=b",
        "--time-scale", 0.5, target=target,
    )  # fmt: skip
    stall = shown["overlays"][1]
    assert (stall["stall_ns"], stall["end_device_time_ns"], stall["labels"]) == ("2500000", "1500000000", {"a": "b"})
    assert (len(shown["overlays"]), latency("slow"), latency("other")) == (2, 10_000_000, 5_000_000)
    text = run("overlay", "default", target=target).stdout
    assert "1 step in 1 stalls 2.5 ms" in text
    assert "device time 0 s to 1.5 s" in text

    saved = tmp_path / "overlays.json"
    saved.write_text(json.dumps(shown))
    shown = read("overlay", "default", "--remove", 0, target=target)
    assert ([overlay["stall_ns"] for overlay in shown["overlays"]], latency("slow")) == (["2500000"], 5_000_000)
    assert read("overlay", "default", "--clear", "--file", saved, target=target)["overlays"][0]["engine_ids"] == [
        "slow"
    ]
    assert read("overlay", "default", "--clear", "--dry-run", target=target)["generation"] == "5"
    run("rollback", "default", "--to-generation", 1, target=target)
    assert (read("overlay", "default", target=target)["overlays"], latency("slow")) == ([], 10_000_000)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("--remove", "3"), 2, "numbered from 0"),
        (("--label", "what"), 2, "KEY=VALUE"),
        (("--stall-ms", "-1"), 2, "--stall-ms is -1"),
        (("--stall-every", "5"), 1, "stall_ns"),
        (("--engine", "e"), 1, "no effect"),
        (("--slow-down", "2", "--expected-generation", "7"), 1, "is at 1"),
        (("--file", "/dev/null"), 2, "/dev/null"),
    ],
)
def test_an_overlay_that_cannot_be_is_refused(
    words: tuple[str, ...], status: int, says: str, shared: Calls, shared_server: OracleProcess
) -> None:
    done = run("overlay", "default", *words, target=shared_server.target)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_shadow_begins_shows_and_ends_by_one_command_each(
    calls: Calls, server: OracleProcess, pack_dirs: dict[str, Path]
) -> None:
    target = server.target
    calls.create(calls.upload(pack_dirs["constant"]))
    calls.upload(pack_dirs["constant20"])
    stream = calls.join("e")
    refused = run("shadow", "default", target=target)
    assert refused.returncode == 1
    assert "has compared no step" in refused.stderr
    begun = run("shadow", "default", "--pack", pack_dirs["constant20"], target=target)
    assert begun.returncode == 0, begun.stderr
    stream.ask(*[decode(i) for i in range(8)])
    wait_for(lambda: run("shadow", "default", target=target).returncode == 0)
    report = read("shadow", "default", target=target)
    region = report["regions"][0]
    assert (region["steps"], region["min_difference_ns"], region["longer_steps"]) == ("8", "10000000", "8")
    text = run("shadow", "default", target=target).stdout
    assert "+100.00 %" in text
    assert text.count("decode") == 2
    assert read("shadow", "default", "--stop", target=target)["binding"]["shadow_pack_digest"] == ""
    assert read("shadow", "default", target=target) == report
    assert run("shadow", "default", "--stop", "--pack", "x", target=target).returncode == 2
    stream.close()
