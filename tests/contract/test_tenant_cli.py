"""`step-oracle tenant` against a real server: an operator, a tenant's administrator and an engine, from a terminal."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from oracle_process import OracleProcess
from secured_server import SecuredServer

COMMAND = str(Path(sys.executable).with_name("step-oracle"))


def run(target: str, token: Path | None, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEP_ORACLE_")}
    environment["STEP_ORACLE_TARGET"] = target
    if token is not None:
        environment["STEP_ORACLE_TOKEN_FILE"] = str(token)
    return subprocess.run([COMMAND, *map(str, words)], capture_output=True, text=True, timeout=60, env=environment)


def read(target: str, token: Path | None, *words: object) -> Any:
    done = run(target, token, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_tenant_lives_from_a_terminal(tmp_path: Path, pack_dirs: dict[str, Path]) -> None:
    with SecuredServer(tmp_path / "server") as server:
        target, operator = server.process.target, server.operator_file
        made = read(target, operator, "tenant", "create", "acme", "--max-engines", 5, "--over-rate", "detach")
        assert (made["name"], made["quota"]["max_engines"]) == ("tenants/acme", 5)
        assert made["quota"]["over_rate"] == "OVER_RATE_POLICY_DETACH"
        changed = read(target, operator, "tenant", "update", "acme", "--max-steps-per-second", 10**12)
        # What is not given stays.
        assert changed["quota"] == {**made["quota"], "max_steps_per_second": str(10**12)}
        assert read(target, operator, "tenant", "show", "acme") == changed
        assert run(target, operator, "tenant", "update", "acme", "--over-rate", "slow").returncode == 2

        admin, engine = tmp_path / "admin", tmp_path / "engine"
        done = run(target, operator, "tenant", "token", "issue", "acme", "--scope", "admin", "-o", admin)
        assert (done.returncode, "tenants/acme/tokens/1 is in" in done.stdout) == (0, True), done.stderr
        assert stat.S_IMODE(admin.stat().st_mode) == 0o600
        assert admin.read_text().strip() not in done.stdout + done.stderr
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        # The administrator goes on alone.
        shown = run(target, admin, "tenant", "token", "issue", "acme", "--scope", "engine", "--comment", "fleet")
        assert shown.returncode == 0, shown.stderr
        engine.write_text(shown.stdout)
        assert shown.stdout.startswith("sto_")
        assert run(target, admin, "pack", "upload", pack_dirs["constant"], "--tenant", "acme").returncode == 0
        created = read(
            target, admin, "experiment", "create", "e", "--tenant", "acme", "--pack", pack_dirs["constant"],
            "--comment", "the first one",
        )  # fmt: skip
        assert created["name"] == "tenants/acme/experiments/e"
        (record,) = read(target, admin, "experiment", "history", "e", "--tenant", "acme")
        assert (record["principal"], record["comment"]) == ("tenants/acme/tokens/1", "the first one")
        table = run(target, admin, "experiment", "history", "e", "--tenant", "acme").stdout
        assert "tenants/acme/tokens/1" in table
        assert "the first one" in table

        for words in (["pack", "list", "--tenant", "acme"], ["tenant", "list"], ["tenant", "token", "list", "acme"]):
            refused = run(target, engine, *words)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert "scope engine" in refused.stderr
        assert run(target, None, "tenant", "list").returncode == 1
        assert run(target, admin, "tenant", "create", "other").returncode == 1
        assert [tenant["name"] for tenant in read(target, admin, "tenant", "list")] == ["tenants/acme"]

        in_use = run(target, operator, "tenant", "delete", "acme")
        assert (in_use.returncode, "experiments tenants/acme/experiments/e" in in_use.stderr) == (1, True)
        tokens = read(target, admin, "tenant", "token", "list", "acme")
        assert [(t["name"], t["scope"], t["comment"]) for t in tokens] == [
            ("tenants/acme/tokens/1", "TOKEN_SCOPE_ADMIN", ""),
            ("tenants/acme/tokens/2", "TOKEN_SCOPE_ENGINE", "fleet"),
        ]
        assert run(target, admin, "tenant", "token", "revoke", "tenants/acme/tokens/2").returncode == 0
        assert "not valid" in run(target, engine, "experiment", "list", "--tenant", "acme").stderr
        listed = run(target, admin, "tenant", "token", "list", "acme")
        assert "engine" in listed.stdout
        assert run(target, admin, "experiment", "delete", "e", "--tenant", "acme").returncode == 0
        digest = read(target, admin, "pack", "list", "--tenant", "acme")[0]["digest"]
        assert run(target, admin, "pack", "delete", digest, "--tenant", "acme").returncode == 0
        assert run(target, operator, "tenant", "delete", "acme").returncode == 0
        assert run(target, admin, "tenant", "list").returncode == 1


def test_without_credentials_who_did_it_is_local(server: OracleProcess, pack_dirs: dict[str, Path]) -> None:
    target = server.target
    read(target, None, "experiment", "create", "e", "--pack", pack_dirs["constant"], "--comment", "a")
    read(target, None, "experiment", "activate", "e", "--seed", 3, "--comment", "b")
    read(target, None, "experiment", "rollback", "e", "--comment", "c")
    history = read(target, None, "experiment", "history", "e")
    assert [(r["principal"], r["comment"]) for r in history] == [("local", "c"), ("local", "b"), ("local", "a")]
