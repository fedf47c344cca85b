"""What /metrics says of a server with traffic: every family explained, no label without a bound."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from oracle_calls import EXPERIMENT, Calls, decode, identity
from oracle_process import OracleProcess
from sharded_server import wait_for
from traffic import Engine

Dirs = dict[str, Path]

# service by service what may tell series apart; whatever names one engine, run or step grows without a bound.
ALLOWED_LABELS = {
    *("tenant", "experiment", "method", "code", "reason", "result", "support", "le", "version"),
    *("digest", "pack", "model", "device", "kind"),
}
UNITS = ("_seconds", "_bytes", "_total", "_info", "_ratio")
# Gauges of things that are counted one by one.
COUNTED = ("step_oracle_streams", "step_oracle_processes", "step_oracle_experiments", "step_oracle_ready")


def scrape(server: OracleProcess) -> dict[str, Metric]:
    """The families by name."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(server.metrics_url, timeout=10).read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(server: OracleProcess, name: str, **labels: str) -> float:
    """The sum of the samples of a name with these labels."""
    samples = [sample for family in scrape(server).values() for sample in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, pack_dirs: Dirs) -> Iterator[OracleProcess]:
    """A server that has answered, swapped, refused and been told of late answers."""
    with OracleProcess(tmp_path_factory.mktemp("busy") / "state", metrics="127.0.0.1:0") as server:
        with Calls(server.target) as calls:
            make_traffic(calls, pack_dirs)
        yield server


def make_traffic(calls: Calls, pack_dirs: Dirs) -> None:
    """Something of everything that is counted."""
    composed, constant = calls.upload(pack_dirs["composed"]), calls.upload(pack_dirs["constant"])
    calls.create(composed)
    engine = Engine(calls, "secret-engine")
    engine.step(10, 90, late=2, reconnects=1)
    engine.step(2, context=4 * 10**7)
    calls.activate(constant)
    with pytest.raises(grpc.RpcError):
        calls.activate("sha256:" + "0" * 64)
    calls.sample(identity("secret-engine"), [decode(0)])
    engine.close()


def test_every_family_is_explained_and_named_after_its_unit(busy: OracleProcess) -> None:
    families = {name: family for name, family in scrape(busy).items() if name.startswith("step_oracle_")}
    assert len(families) > 20
    for name, family in families.items():
        assert len(family.documentation) > 10, name
        assert family.samples or family.type == "counter", name
        exposed = {re.sub("_(bucket|count|sum)$", "", sample.name) for sample in family.samples}
        if family.type == "counter":
            assert all(sample.endswith("_total") for sample in exposed), name
        elif family.type == "histogram":
            assert name.endswith("_seconds"), name
        else:
            assert name in COUNTED or name.endswith(UNITS) or name.startswith("step_oracle_experiment_"), name


def test_no_label_grows_with_engines_runs_or_steps(busy: OracleProcess) -> None:
    for family in scrape(busy).values():
        for sample in family.samples:
            assert set(sample.labels) <= ALLOWED_LABELS, sample
            assert "secret-engine" not in sample.labels.values()


def test_the_counts_are_those_of_the_traffic(busy: OracleProcess) -> None:
    def count(name: str, **labels: str) -> float:
        return value(busy, f"step_oracle_{name}", **labels)

    assert count("steps_total", tenant="default", support="interpolated") == 101
    assert count("steps_total", tenant="default", support="extrapolated") == 2
    assert (count("shim_steps_total"), count("shim_leased_steps_total")) == (102, 90)
    assert (count("shim_late_answers_total", tenant="default"), count("shim_reconnects_total")) == (2, 1)
    assert count("shim_late_answer_seconds_total") == pytest.approx(0.006)
    assert (count("pack_swap_total", result="ok"), count("pack_swap_total", result="PACK_NOT_FOUND")) == (1, 1)
    assert count("rpc_total", method="ActivateExperiment", code="NOT_FOUND", reason="PACK_NOT_FOUND") == 1
    assert count("rpc_duration_seconds_count", method="ActivateExperiment") == 2
    assert 0 < count("rpc_duration_seconds_sum", method="UploadPack") < 60
    assert (count("ready"), count("processes"), count("engines_attached_total")) == (1, 1, 1)
    assert count("experiment_generation", experiment=EXPERIMENT) == 2
    assert count("pack_info", experiment=EXPERIMENT, pack="test", model="test/model") == 1
    wait_for(lambda: count("event_loop_lag_seconds_count") >= 2)
    assert value(busy, "process_resident_memory_bytes") > 1e7


def test_a_quota_that_refuses_is_counted(new_server: Callable[..., OracleProcess], pack_dirs: Dirs) -> None:
    import sqlite3

    server = new_server(metrics="127.0.0.1:0")
    server.terminate()
    with sqlite3.connect(server.state_dir / "oracle.db") as db:
        db.execute("UPDATE tenant SET max_engines = 1")
    db.close()
    server.start()
    with Calls(server.target) as calls:
        calls.create(calls.upload(pack_dirs["constant"]))
        calls.attach(identity("a"))
        with pytest.raises(grpc.RpcError):
            calls.attach(identity("b"))
    assert value(server, "step_oracle_quota_rejected_total", method="AttachEngine") == 1


def test_all_processes_are_in_one_scrape(sharded: OracleProcess, shards: tuple[Calls, Calls], pack_dirs: Dirs) -> None:
    before = {name: value(sharded, f"step_oracle_{name}") for name in ("steps_total", "event_loop_lag_seconds_count")}
    name = "tenants/default/experiments/scraped"
    shards[0].create(shards[0].upload(pack_dirs["composed"]), "scraped")
    for i, calls in enumerate(shards):
        engine = Engine(calls, f"scraped-{i}", name)
        engine.step(10, 90, late=1)
        engine.close()
    assert value(sharded, "step_oracle_steps_total", tenant="default") - before["steps_total"] == 200
    assert value(sharded, "step_oracle_processes") == 3
    assert value(sharded, "step_oracle_ready") == 1
    # Four times a second, which a fast pass of the above leaves no time for.
    lags = "event_loop_lag_seconds_count"
    wait_for(lambda: value(sharded, f"step_oracle_{lags}") > before[lags])
