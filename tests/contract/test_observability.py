"""The rules and the dashboard of deploy/observability, held against a server with traffic and a real Prometheus."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml  # type: ignore[import-untyped]

import expressions
from engine_process import free_port
from oracle_calls import EXPERIMENT, TIMEOUT, Calls
from oracle_process import OracleProcess
from prometheus_tools import prometheus, promtool
from sharded_server import wait_for
from step_oracle.v1 import experiment_pb2
from traffic import Engine

Dirs = dict[str, Path]
# Prometheus makes it itself, one for each target.
OF_PROMETHEUS = {"up"}
# Nothing of these happens to the server of these tests; all other expressions have to find something.
SILENT = {
    "Refused and failed calls A",
    "Engines attached, quota refusals B",
    "annotation Activations",
}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, pack_dirs: Dirs) -> Iterator[OracleProcess]:
    """A server whose engines step for as long as the tests last, some of them late or beyond the pack."""
    folder = tmp_path_factory.mktemp("busy")
    with OracleProcess(folder / "state", metrics="127.0.0.1:0") as server, Calls(server.target) as calls:
        digest = calls.upload(pack_dirs["composed"])
        calls.create(digest)
        calls.activate(digest, seed=2)
        with pytest.raises(grpc.RpcError):
            calls.activate("sha256:" + "0" * 64)
        engine, stop = Engine(calls, "e"), threading.Event()
        asked = experiment_pb2.GetExperimentRequest(name=EXPERIMENT)

        def step() -> None:
            while not stop.wait(0.1):
                engine.step(5, 20, late=1, reconnects=1)
                engine.step(1, context=4 * 10**7)
                calls.experiments.GetExperiment(asked, timeout=TIMEOUT)

        thread = threading.Thread(target=step)
        thread.start()
        try:
            yield server
        finally:
            stop.set()
            thread.join(20)


def test_every_expression_reads_metrics_that_exist(busy: OracleProcess) -> None:
    exposed = set()
    for line in _get(busy.metrics_url).splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            exposed |= {f"{name}_{part}" for part in ("bucket", "count", "sum")} if kind == "histogram" else {name}
    exposed |= {rule["record"] for rule in expressions.rules() if "record" in rule} | OF_PROMETHEUS
    read = {where: expressions.names_in(text) for where, text in {**_rules(), **expressions.of_dashboard()}.items()}
    assert len(read) > 50
    assert all(read.values()), [where for where, names in read.items() if not names]
    unknown = {where: names - exposed for where, names in read.items() if names - exposed}
    assert not unknown


def test_promtool_finds_nothing_wrong() -> None:
    for words in (
        ("check", "rules", *map(str, expressions.RULES)),
        ("check", "config", str(expressions.FOLDER / "prometheus.yml")),
        ("test", "rules", str(expressions.RULE_TESTS)),
    ):
        done = subprocess.run([promtool(), *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{words}: {done.stdout[-6000:]}{done.stderr[-6000:]}"


def test_every_alert_is_tested_once_firing_and_once_silent() -> None:
    tested: dict[str, set[bool]] = {}
    for group in yaml.safe_load(expressions.RULE_TESTS.read_text())["tests"]:
        for case in group["alert_rule_test"]:
            tested.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    alerts = {rule["alert"] for rule in expressions.rules() if "alert" in rule}
    assert tested == {alert: {True, False} for alert in alerts}


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    for rule in expressions.rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning", "info"), rule["alert"]
            assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]


def test_prometheus_finds_data_for_every_panel_and_evaluates_every_rule(busy: OracleProcess, tmp_path: Path) -> None:
    with Prometheus(tmp_path, busy.metrics_url) as server:
        wait_for(lambda: server.query('up{job="step-oracle"}') == ["1"], 60)
        panels = expressions.of_dashboard()
        missing = set(panels) - SILENT

        def has_all() -> bool:
            for where in list(missing):
                if server.query(panels[where]):
                    missing.discard(where)
            return not missing

        try:
            wait_for(has_all, 90)
        except AssertionError:
            pytest.fail(f"no data for {sorted(missing)}")
        wait_for(lambda: {health for _, health, _ in server.rules()} == {"ok"}, 60)
        assert {name for name, _, _ in server.rules()} == set(expressions.of_rules())
        # Late answers with every message: their alert is on its way.
        wait_for(lambda: {"StepOracleLateAnswers", "StepOracleActivationRefused"} <= server.active(), 60)
        assert not server.active() & {"StepOracleDown", "StepOracleNotReady", "StepOracleInternalErrors"}


class Prometheus:
    """A real one on loopback that scrapes one server each second. Use as a context manager."""

    def __init__(self, folder: Path, metrics_url: str) -> None:
        config = yaml.safe_load((expressions.FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(path) for path in expressions.RULES]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [urllib.parse.urlsplit(metrics_url).netloc]
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self._url = f"http://127.0.0.1:{free_port()}"
        self._log = (folder / "prometheus.log").open("wb")
        command = [prometheus(), f"--config.file={path}", f"--storage.tsdb.path={folder}/data"]
        command.append(f"--web.listen-address={urllib.parse.urlsplit(self._url).netloc}")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Prometheus:
        end = time.monotonic() + 60
        while True:
            try:
                _get(f"{self._url}/-/ready")
                return self
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, Path(self._log.name).read_text()[-3000:]
                assert time.monotonic() < end, "Prometheus is not ready"
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()

    def ask(self, what: str, **arguments: str) -> Any:
        """The data of an answer of its API."""
        return json.loads(_get(f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(arguments)}"))["data"]

    def rules(self) -> set[tuple[str, str, str]]:
        """(name, health, last error) of every rule."""
        groups = self.ask("rules")["groups"]
        return {(rule["name"], rule["health"], rule.get("lastError", "")) for g in groups for rule in g["rules"]}

    def active(self) -> set[str]:
        """The alerts that fire or are about to."""
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"]}

    def query(self, expression: str) -> list[str]:
        """The values an expression has now, NaN left out."""
        return [each["value"][1] for each in self.ask("query", query=expression)["result"] if each["value"][1] != "NaN"]


def _rules() -> dict[str, str]:
    return expressions.of_rules()


def _get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text: str = opener.open(url, timeout=10).read().decode()
    return text
