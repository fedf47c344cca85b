"""`experiment report` of two packs split by a rule, against a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench_results import write_result
from oracle_calls import Calls, decode
from oracle_process import OracleProcess
from step_oracle.v1 import experiment_pb2 as pb

COMMAND = str(Path(sys.executable).with_name("step-oracle"))


def run(*arguments: object, target: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
    words = [COMMAND, "experiment", "report", "default", *map(str, arguments)]
    environment["STEP_ORACLE_TARGET"] = target
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)


def test_two_packs_split_by_a_rule_are_compared(
    calls: Calls, server: OracleProcess, pack_dirs: dict[str, Path], tmp_path: Path
) -> None:
    one, other = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
    calls.create(one, rules=[pb.Rule(fraction=0.5, pack_digest=other)])
    streams, words, packs = [], [], {}
    for i in range(14):
        name = f"vllm-{i}"
        stream = calls.join(name)
        stream.ask(*[decode(step) for step in range(i + 1)])
        streams.append(stream)
    request = pb.ListEnginesRequest(parent="tenants/default/experiments/default")
    for i, attached in enumerate(calls.experiments.ListEngines(request).engines):
        packs[attached.engine_id] = attached.pack_digest
        slow = 1.1 if attached.pack_digest == other else 1.0
        path = write_result(tmp_path / f"{attached.engine_id}.json", i, tpot_ms=20 * slow, engine_spread=0.01)
        words += ["--results", f"{attached.engine_id}={path}"]
    assert 5 <= list(packs.values()).count(other) <= 9

    done = run(*words, "--json", "--baseline", one[7:15], "--png", tmp_path / "r.png", target=server.target)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["resampled"] == "engines"
    assert [arm["packs"] for arm in report["arms"]] == [[one], [other]]
    for arm in report["arms"]:
        assert arm["steps"] == sum(int(e.removeprefix("vllm-")) + 1 for e in arm["engines"])
        assert {packs[e] for e in arm["engines"]} == set(arm["packs"])
    found = report["arms"][1]["differences_percent"]["TPOT mean"]
    assert 0 < found["low"] < 10 < found["high"] < 15
    assert (tmp_path / "r.png").stat().st_size > 20_000

    text = run(*words, "--by", "engine", target=server.target)
    assert text.returncode == 0, text.stderr
    assert "bootstrap of stretches of consecutive requests" in text.stdout
    for stream in streams:
        stream.close()


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ((), 2, "--results"),
        (("--results", "x"), 2, "ENGINE_ID=FILE"),
        (("--results", "e=FILE"), 2, "not attached"),
        (("--results", "e=FILE", "--target", "127.0.0.1:1"), 3, "no oracle server answers"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    words: tuple[str, ...], status: int, says: str, shared: Calls, shared_server: OracleProcess, tmp_path: Path
) -> None:
    file = write_result(tmp_path / "e.json", 1)
    done = run(
        *[word.replace("FILE", str(file)) if "=" in word else word for word in words], target=shared_server.target
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
