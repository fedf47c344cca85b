"""Quotas over a real channel, with one process and with shards: marked, detached, refused, never slowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, Stream, decode, identity, reason_of, upload_messages
from oracle_process import OracleProcess
from sharded_server import metrics, wait_for
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, pack_pb2, tenant_pb2

Dirs = dict[str, Path]
TENANT = "tenants/default"


@pytest.fixture(scope="module", params=[(), ("--shards", "2")], ids=["one process", "two shards"])
def limited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pack_dirs: Dirs
) -> Iterator[OracleProcess]:
    """A server without credentials, whose default experiment answers."""
    folder = tmp_path_factory.mktemp("limited")
    with OracleProcess(folder / "state", metrics="127.0.0.1:0", arguments=request.param) as process:
        with Calls(process.target) as calls:
            calls.create(calls.upload(pack_dirs["constant"]))
        yield process


@pytest.fixture
def calls(limited: OracleProcess) -> Iterator[Calls]:
    """A connection; the quota is taken away at the end."""
    with Calls(limited.target) as connection:
        yield connection
        set_quota(connection)


def set_quota(calls: Calls, **quota: Any) -> None:
    request = tenant_pb2.UpdateTenantRequest(name=TENANT, quota=tenant_pb2.TenantQuota(**quota))
    calls.tenants.UpdateTenant(request, timeout=TIMEOUT)


def degraded(calls: Calls) -> dict[str, bool]:
    request = experiment_pb2.ListEnginesRequest(parent=EXPERIMENT)
    return {e.engine_id: e.degraded for e in calls.experiments.ListEngines(request, timeout=TIMEOUT).engines}


def refusal(act: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    return reason_of(caught.value)


QUOTA = ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")


def test_engines_streams_and_watches_are_counted_when_they_come(calls: Calls) -> None:
    set_quota(calls, max_engines=1)
    stream = calls.join("first")
    assert refusal(lambda: calls.attach(identity("second"))) == QUOTA
    assert refusal(lambda: calls.open(identity("never-attached"), 1)) == QUOTA
    set_quota(calls, max_streams=1)
    watch = experiment_pb2.WatchExperimentRequest(name=EXPERIMENT)
    assert refusal(lambda: next(calls.experiments.WatchExperiment(watch, timeout=TIMEOUT))) == QUOTA
    second = identity("second")
    incarnation = calls.attach(second).incarnation
    assert refusal(lambda: calls.open(second, incarnation)) == QUOTA
    stream.close()
    opened: Stream = calls.open(second, incarnation)
    opened.close()
    watching = calls.experiments.WatchExperiment(watch, timeout=TIMEOUT)
    assert next(watching).experiment.name == EXPERIMENT
    watching.cancel()


def test_packs_and_their_bytes_are_counted_at_the_upload(calls: Calls, pack_dirs: Dirs) -> None:
    def upload() -> None:
        calls.packs.UploadPack(upload_messages(pack_dirs["tied"]), timeout=TIMEOUT)

    set_quota(calls, max_packs=1)
    assert refusal(upload) == QUOTA
    set_quota(calls, max_pack_bytes=1)
    assert refusal(upload) == QUOTA
    listed = calls.packs.ListPacks(pack_pb2.ListPacksRequest(parent=TENANT), timeout=TIMEOUT).packs
    assert len(listed) == 1
    set_quota(calls, max_packs=2, max_pack_bytes=sum(pack.size_bytes for pack in listed) + (1 << 20))
    upload()
    request = pack_pb2.DeletePackRequest(
        name=next(
            pack.name
            for pack in calls.packs.ListPacks(pack_pb2.ListPacksRequest(parent=TENANT), timeout=TIMEOUT).packs
            if pack.digest != listed[0].digest
        )
    )
    calls.packs.DeletePack(request, timeout=TIMEOUT)


def test_engines_of_a_tenant_over_its_rate_are_marked_and_answered_all_the_same(
    calls: Calls, limited: OracleProcess
) -> None:
    set_quota(calls, max_steps_per_second=10)
    busy, idle = calls.join("busy"), calls.join("idle")
    assert len(busy.ask(*(decode(i) for i in range(500)))) == 500
    wait_for(lambda: degraded(calls) == {"busy": True, "idle": False})
    samples = metrics(limited)
    assert samples['step_oracle_tenant_over_rate{tenant="default"}'] == 1
    assert samples['step_oracle_tenant_degraded_engines{tenant="default"}'] == 1
    # Nothing is refused and no stream ended.
    assert busy.ask(decode(500))
    assert idle.ask(decode(0))
    for stream in (busy, idle):
        stream.close()
    set_quota(calls)
    assert not any("tenant_over_rate" in name for name in metrics(limited))


def test_leased_steps_count(calls: Calls) -> None:
    set_quota(calls, max_steps_per_second=10)
    stream = calls.join("leased")
    stream.send(
        counts=oracle_service_pb2.ShimCounts(steps=500, leased_steps=500, leased_steps_by_support=[0, 500, 0, 0])
    )
    wait_for(lambda: degraded(calls)["leased"])
    stream.close()


def test_by_policy_streams_end_with_the_quota_and_nothing_is_let_in_until_the_tenant_has_fallen_back(
    calls: Calls,
) -> None:
    set_quota(calls, max_steps_per_second=50, over_rate=tenant_pb2.OVER_RATE_POLICY_DETACH)
    busy, late, silent = (calls.join(name) for name in ("detached", "late", "silent"))
    busy.ask(*(decode(i) for i in range(500)))
    assert refusal(busy.receive) == QUOTA
    # Nobody of the tenant is let in for a while. A stream that takes a step meanwhile is answered, then ended.
    wait_for(lambda: _refused(calls))
    assert refusal(lambda: calls.attach(identity("new"))) == QUOTA
    assert late.ask(decode(0))
    assert refusal(late.receive) == QUOTA
    # The control plane answers.
    assert "silent" in degraded(calls)
    wait_for(lambda: not _refused(calls))
    assert silent.ask(decode(0))
    silent.close()


def test_steps_without_a_stream_count(calls: Calls) -> None:
    set_quota(calls, max_steps_per_second=50, over_rate=tenant_pb2.OVER_RATE_POLICY_DETACH)
    calls.sample(identity("e"), [decode(i) for i in range(500)])
    wait_for(lambda: _refused(calls))
    set_quota(calls, max_steps_per_second=10_000)
    wait_for(lambda: not _refused(calls))


def _refused(calls: Calls) -> bool:
    try:
        calls.sample(identity("probe"), [decode(0)])
    except grpc.RpcError as error:
        return reason_of(error) == QUOTA
    return False
