"""The command line against a real server: outputs and exit statuses."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from builders import build_constant_pack
from oracle_calls import EXPERIMENT, Calls, identity, mixed_steps
from oracle_process import OracleProcess
from step_oracle.v1 import trace_pb2

COMMAND = str(Path(sys.executable).with_name("step-oracle"))


def run(*arguments: object, target: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
    if target is not None:
        environment["STEP_ORACLE_TARGET"] = target
    words = [COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)


def read(*arguments: object, target: str) -> Any:
    done = run(*arguments, "--json", target=target)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_experiment_lives_from_a_terminal(server: OracleProcess, pack_dirs: dict[str, Path], tmp_path: Path) -> None:
    target = server.target
    done = run("pack", "upload", pack_dirs["constant"], pack_dirs["composed"], target=target)
    assert done.returncode == 0, done.stderr
    digest = done.stdout.split()[0]
    assert [pack["digest"] for pack in read("pack", "list", target=target)] == sorted(
        line.split()[0] for line in done.stdout.splitlines()
    )
    assert read("pack", "get", digest[7:15], target=target)["manifest"]["name"] == "test"

    lengths = tmp_path / "lengths.json"
    lengths.write_text(
        '{"classes": [{"name": "", "prompt_bin_begin": [0], "quantile_tokens": [5, 9], "quantiles_per_bin": 2}]}'
    )
    rule = f"label.gpu=l40s,tp=2,fraction=0.5,salt=x,model=m=>{pack_dirs['composed']}"
    created = read(
        "experiment", "create", "default", "--pack", digest[:20], "--rule", rule, "--seed", 2**64 - 1,
        "--lengths", lengths, "--support-policy", "refuse", "--draft-acceptance-rate", 0.5, "--time-scale", 2,
        target=target,
    )  # fmt: skip
    binding = created["binding"]
    assert created["generation"] == "1"
    assert binding["default_pack_digest"] == digest
    assert (binding["seed"], binding["support_policy"]) == (str(2**64 - 1), "SUPPORT_POLICY_REFUSE")
    assert (binding["rules"][0]["labels"], binding["rules"][0]["fraction"]) == ({"gpu": "l40s"}, 0.5)

    activated = read("experiment", "activate", "default", "--seed", 5, "--expected-generation", 1, target=target)
    assert {**activated["binding"], "seed": ""} == {**binding, "seed": ""}
    conflict = run("experiment", "activate", EXPERIMENT, "--expected-generation", 1, target=target)
    assert (conflict.returncode, conflict.stdout) == (1, "")
    assert "is at 2" in conflict.stderr
    assert read("experiment", "rollback", "default", target=target)["binding"] == binding
    assert [r["generation"] for r in read("experiment", "history", "default", target=target)] == ["3", "2", "1"]
    assert read("experiment", "engines", "default", target=target) == []
    assert read("experiment", "list", target=target)[0]["name"] == EXPERIMENT
    assert read("tenant", "list", target=target)[0]["name"] == "tenants/default"
    for words in (["experiment", "list"], ["experiment", "get", "default"], ["pack", "list"], ["tenant", "list"]):
        assert run(*words, target=target).stdout

    assert run("pack", "delete", digest, target=target).returncode == 1
    copy = tmp_path / "copy"
    assert run("pack", "download", digest, "-o", copy, target=target).returncode == 0
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {
        p.name: p.read_bytes() for p in pack_dirs["constant"].iterdir()
    }
    assert run("experiment", "delete", "default", target=target).returncode == 0
    assert run("pack", "delete", digest, target=target).returncode == 0


def test_a_whole_binding_comes_from_a_file(server: OracleProcess, pack_dirs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "binding.json"
    file.write_text(json.dumps({"default_pack_digest": str(pack_dirs["constant"]), "seed": "7", "time_scale": 3}))
    created = read("experiment", "create", "x", "--binding", file, "--seed", 8, target=server.target)
    assert (created["binding"]["seed"], created["binding"]["time_scale"]) == ("8", 3.0)


def test_exit_statuses_tell_failures_apart(shared_server: OracleProcess, tmp_path: Path) -> None:
    nobody = "127.0.0.1:1"
    unreachable = run("pack", "list", target=nobody)
    assert unreachable.returncode == 3
    assert "step-oracle serve" in unreachable.stderr
    target = shared_server.target
    assert run("experiment", "get", "nothing", target=target).returncode == 1
    assert run("experiment", "create", target=target).returncode == 2
    assert run("experiment", "create", "x", "--rule", "what", target=target).returncode == 2
    assert run("experiment", "create", "x", "--pack", "abc", target=target).returncode == 1
    assert run("pack", "upload", tmp_path, target=target).returncode == 1
    assert run("pack", "check", tmp_path).returncode == 1
    for done in (unreachable, run("pack", "check", tmp_path)):
        assert "Traceback" not in done.stderr


def test_check_says_what_the_server_would_say(tmp_path: Path) -> None:
    digest = build_constant_pack(tmp_path / "good")
    done = run("pack", "check", tmp_path / "good", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["digest"] == digest
    (tmp_path / "good" / "operators.parquet").write_bytes(b"x")
    bad = run("pack", "check", tmp_path / "good")
    assert bad.returncode == 1
    assert "refused" in bad.stdout


def write_trace(path: Path, calls: Calls, steps: int) -> list[trace_pb2.TraceRecord]:
    engine = identity("traced")
    asked = mixed_steps(steps)
    records = [trace_pb2.TraceRecord(header=trace_pb2.TraceHeader(engine=engine))]
    for step, reply in zip(asked, calls.sample(engine, asked), strict=True):
        records.append(trace_pb2.TraceRecord(step=trace_pb2.TraceStep(request=step, reply=reply)))
    save(path, records)
    return records


def save(path: Path, records: list[trace_pb2.TraceRecord]) -> None:
    with path.open("wb") as file:
        for record in records:
            data = record.SerializeToString()
            file.write(struct.pack("<I", len(data)) + data)


def test_recompute_finds_every_answer_again_and_a_changed_one(
    server: OracleProcess, pack_dirs: dict[str, Path], tmp_path: Path
) -> None:
    first, second = tmp_path / "first.trace", tmp_path / "second.trace"
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["composed"]), seed=3)
        write_trace(first, calls, 300)
        calls.activate(calls.upload(pack_dirs["sampled"]), seed=4)
        records = write_trace(second, calls, 300)

    def recompute(*arguments: object) -> tuple[int, dict[str, Any]]:
        done = run("recompute", *arguments, "--json")
        return done.returncode, json.loads(done.stdout)

    status, report = recompute(first, second, "--state-dir", server.state_dir)
    assert (status, report["equal"], report["different"], report["skipped"]) == (0, 600, 0, 0)
    status, report = recompute(first, second, "--target", server.target)
    assert (status, report["equal"], report["different"], report["skipped"]) == (0, 300, 0, 300)

    records[7].step.reply.latency_ns[0] += 1
    save(second, records)
    for arguments in (("--state-dir", server.state_dir), ("--target", server.target)):
        status, report = recompute(second, *arguments)
        assert (status, report["equal"], report["different"]) == (1, 299, 1)
        assert "latency_ns" in report["examples"][0]

    second.write_bytes(second.read_bytes()[:-3])
    assert recompute(second, "--state-dir", server.state_dir)[1]["equal"] == 298
    second.write_bytes(b"\xff" * 50)
    assert run("recompute", second, "--state-dir", server.state_dir).returncode == 2
    assert run("recompute", second).returncode == 2


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from profiler.cli import main\n"
        "try:\n"
        "    main(['serve', '--help'])\n"
        "finally:\n"
        "    heavy = {'numba', 'numpy', 'pyarrow', 'grpc', 'uvloop', 'google.protobuf'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--state-dir" in done.stdout
