"""A server whose packs are in a real registry: kept there first, brought from there, and fine without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from oracle_calls import EXPERIMENT, TIMEOUT, Calls, decode, identity, reason_of
from oracle_process import OracleFailed, OracleProcess
from oracle_server.rpc.client import Refused
from registry_server import RegistryProcess
from sharded_server import TWO_SHARDS, wait_for
from step_oracle.v1 import experiment_pb2, pack_pb2, tenant_pb2

REPOSITORY = "oracle/packs"
UNAVAILABLE = ("UNAVAILABLE", "PACK_REGISTRY_UNAVAILABLE")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RegistryProcess]:
    """A registry of the test's own, that it may stop."""
    with RegistryProcess(tmp_path / "registry") as process:
        yield process


def arguments(registry: RegistryProcess, *more: str) -> tuple[str, ...]:
    return ("--pack-registry", f"{registry.authority}/{REPOSITORY}", *more)


@pytest.fixture
def fleet(registry: RegistryProcess, new_server: Callable[..., OracleProcess]) -> OracleProcess:
    """A server with that registry."""
    return new_server(arguments=arguments(registry))


def tag(digest: str) -> str:
    return digest.replace(":", "-")


def listed(calls: Calls, tenant: str = "default") -> list[str]:
    request = pack_pb2.ListPacksRequest(parent=f"tenants/{tenant}")
    return [pack.digest for pack in calls.packs.ListPacks(request, timeout=TIMEOUT).packs]


def delete(calls: Calls, digest: str, tenant: str = "default") -> None:
    calls.packs.DeletePack(pack_pb2.DeletePackRequest(name=f"tenants/{tenant}/packs/{digest}"), timeout=TIMEOUT)


def refused(act: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises((grpc.RpcError, Refused)) as caught:
        act()
    error = caught.value
    return (error.code, error.reason) if isinstance(error, Refused) else reason_of(error)  # type: ignore[arg-type]


def lose(server: OracleProcess, digest: str) -> None:
    """As on a server through which the pack was not stored."""
    for folder in ("packs", "compiled"):
        shutil.rmtree(server.state_dir / folder / digest.removeprefix("sha256:"))


def folders(server: OracleProcess) -> dict[str, list[str]]:
    return {
        name: sorted(path.name for path in (server.state_dir / name).iterdir())
        for name in ("packs", "compiled", "incoming")
    }


def test_a_pack_is_in_the_registry_when_its_upload_returns_and_comes_back_after_a_lost_disk(
    registry: RegistryProcess, fleet: OracleProcess, pack_dirs: dict[str, Path]
) -> None:
    steps = [decode(i) for i in range(20)]
    with Calls(fleet.target) as calls:
        digest = calls.upload(pack_dirs["composed"])
        assert registry.tags(REPOSITORY) == [tag(digest)]
        calls.create(digest, seed=5)
        before = calls.sample(identity("vllm-0"), steps)
    assert fleet.terminate() == 0
    for name in ("packs", "compiled"):
        shutil.rmtree(fleet.state_dir / name)
    fleet.start()
    with Calls(fleet.target) as calls:
        assert calls.sample(identity("vllm-0"), steps) == before
        request = pack_pb2.DownloadPackRequest(name=f"tenants/default/packs/{digest}")
        assert b"".join(part.data for part in calls.packs.DownloadPack(request, timeout=TIMEOUT))


def test_the_last_tenant_to_delete_a_pack_takes_it_from_the_registry(
    registry: RegistryProcess, fleet: OracleProcess, pack_dirs: dict[str, Path]
) -> None:
    with Calls(fleet.target) as calls:
        tenant = tenant_pb2.CreateTenantRequest(tenant_id="acme")
        calls.tenants.CreateTenant(tenant, timeout=TIMEOUT)
        digest = calls.upload(pack_dirs["constant"])
        calls.upload(pack_dirs["constant"], "acme")
        delete(calls, digest)
        assert registry.tags(REPOSITORY) == [tag(digest)]
        delete(calls, digest, "acme")
        # It goes after the answer: a registry that hangs holds up no caller.
        wait_for(lambda: registry.tags(REPOSITORY) == [])
        wait_for(lambda: folders(fleet) == {"packs": [], "compiled": [], "incoming": []})
        assert calls.upload(pack_dirs["constant"]) == digest
        assert registry.tags(REPOSITORY) == [tag(digest)]


def test_without_its_registry_a_server_refuses_what_needs_it_and_nothing_else(
    registry: RegistryProcess, fleet: OracleProcess, pack_dirs: dict[str, Path]
) -> None:
    with Calls(fleet.target) as calls:
        here, away = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
        calls.create(here)
        stream = calls.join("vllm-0")
        lose(fleet, away)
        registry.stop()
        assert stream.ask(decode(0))[0].latency_ns[0] == 10_000_000
        assert refused(lambda: calls.upload(pack_dirs["tied"])) == UNAVAILABLE
        assert refused(lambda: calls.activate(away)) == UNAVAILABLE
        assert refused(lambda: calls.create(away, "other")) == UNAVAILABLE
        request = pack_pb2.DownloadPackRequest(name=f"tenants/default/packs/{away}")
        assert refused(lambda: list(calls.packs.DownloadPack(request, timeout=TIMEOUT))) == UNAVAILABLE
        assert listed(calls) == sorted([here, away])
        assert folders(fleet)["packs"] == [here.removeprefix("sha256:")]
        assert folders(fleet)["incoming"] == []
        # What is stored is no upload, what is here can be activated, what nobody uses can be deleted.
        assert calls.upload(pack_dirs["constant"]) == here
        assert calls.activate(here, seed=3).experiment.generation == 2
        delete(calls, away)
        assert stream.ask(decode(1), min_generation=2)[0].generation == 2
        wait_for(lambda: "which no tenant has any more" in fleet.log)
        registry.start()
        tied = calls.upload(pack_dirs["tied"])
        assert calls.activate(tied, request={"allow_mismatch": ["max_num_seqs"]}).experiment.generation == 3
        assert stream.ask(decode(2), min_generation=3)[0].latency_ns[0] == 30_000_000
        stream.close()
    # The deletion could not reach it, and says so: what stays is named by nothing.
    assert registry.tags(REPOSITORY) == sorted([tag(here), tag(away), tag(tied)])


@pytest.mark.parametrize("shards", [(), TWO_SHARDS], ids=["one process", "two shards"])
def test_a_start_without_the_registry_answers_from_what_is_here_and_brings_the_rest_later(
    registry: RegistryProcess,
    new_server: Callable[..., OracleProcess],
    pack_dirs: dict[str, Path],
    shards: tuple[str, ...],
) -> None:
    server = new_server(arguments=arguments(registry, *shards))
    with Calls(server.target) as calls:
        here, away = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
        calls.create(here)
        calls.create(away, "other")
    assert server.terminate() == 0
    lose(server, away)
    registry.stop()
    server.start()
    other = identity("vllm-1", "tenants/default/experiments/other")
    with Calls(server.target) as calls:
        assert calls.sample(identity("vllm-0"), [decode(0)])[0].latency_ns[0] == 10_000_000
        with pytest.raises(grpc.RpcError) as caught:
            calls.attach(other)
        assert reason_of(caught.value) == UNAVAILABLE
        assert f"from the pack {away}, which is not on this server: the registry" in str(caught.value.details())
        assert refused(lambda: calls.sample(other, [decode(0)])) == UNAVAILABLE
        registry.start()

        def answers() -> bool:
            try:
                return bool(calls.sample(other, [decode(0)])[0].latency_ns[0] == 20_000_000)
            except grpc.RpcError as error:
                if reason_of(error) != UNAVAILABLE:
                    raise
                return False

        wait_for(answers)
        stream = calls.open(other, calls.attach(other).incarnation)
        assert stream.ask(decode(0))[0].generation == 1
        stream.close()


def test_a_copy_that_is_not_the_pack_is_refused_and_leaves_nothing(
    registry: RegistryProcess, fleet: OracleProcess, pack_dirs: dict[str, Path]
) -> None:
    with Calls(fleet.target) as calls:
        here, away = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["sampled"])
        calls.create(here)
        lose(fleet, away)
        manifest = json.loads((pack_dirs["sampled"] / "manifest.json").read_text())
        blob = registry.blob(f"sha256:{manifest['files'][0]['sha256']}")
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
        with pytest.raises(grpc.RpcError) as caught:
            calls.activate(away)
        assert reason_of(caught.value) == ("FAILED_PRECONDITION", "STORE_FAILED")
        assert "is damaged" in str(caught.value.details())
        hexadecimal = here.removeprefix("sha256:")
        assert folders(fleet) == {"packs": [hexadecimal], "compiled": [hexadecimal], "incoming": []}


def test_credentials_that_cannot_be_read_end_the_start_with_a_sentence(
    registry: RegistryProcess, new_server: Callable[..., OracleProcess], tmp_path: Path
) -> None:
    with pytest.raises(OracleFailed, match=r"the registry's credentials .* cannot be read"):
        new_server(arguments=arguments(registry, "--pack-registry-credentials", str(tmp_path / "none")))


def test_an_engine_of_the_same_experiment_whose_pack_is_here_is_answered(
    registry: RegistryProcess, fleet: OracleProcess, pack_dirs: dict[str, Path]
) -> None:
    with Calls(fleet.target) as calls:
        here, away = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
        rule = experiment_pb2.Rule(pack_digest=away, labels={"gpu": "h100"})
        calls.create(here, rules=[rule])
    assert fleet.terminate() == 0
    lose(fleet, away)
    registry.stop()
    fleet.start()
    with Calls(fleet.target) as calls:
        assert calls.sample(identity("vllm-0"), [decode(0)])[0].latency_ns[0] == 10_000_000
        labelled = identity("vllm-1", labels={"gpu": "h100"})
        assert refused(lambda: calls.sample(labelled, [decode(0)])) == UNAVAILABLE
        # Nothing of it waits for the registry where the binding names it no more.
        assert calls.activate(here).experiment.name == EXPERIMENT
        assert calls.sample(labelled, [decode(0)])[0].latency_ns[0] == 10_000_000
