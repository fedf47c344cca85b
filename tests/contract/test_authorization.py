"""Every RPC with every credential over a real channel, and two tenants that never see each other."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from oracle_calls import TIMEOUT, Calls, decode, identity, reason_of, upload_messages
from secured_server import SecuredServer, write_secret
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, pack_pb2, tenant_pb2

Dirs = dict[str, Path]
NOTHING = "{tenant}/experiments/nothing"
ZERO = "sha256:" + "0" * 64
ENGINE = {"experiment": NOTHING, "engine_id": "e"}

# For every method a request that names a tenant and changes nothing, and what becomes of it where it is allowed.
REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "GetDevice": ({"engine": ENGINE}, "EXPERIMENT_NOT_FOUND"),
    "AttachEngine": ({"engine": ENGINE}, "EXPERIMENT_NOT_FOUND"),
    "StreamSteps": ({"open": {"engine": ENGINE, "incarnation": 1}}, "EXPERIMENT_NOT_FOUND"),
    "SampleStep": ({"engine": ENGINE}, "EXPERIMENT_NOT_FOUND"),
    "UploadPack": ({"begin": {"parent": "{tenant}", "manifest_json": b"{}"}}, "PACK_INVALID"),
    "ListPacks": ({"parent": "{tenant}"}, ""),
    "GetPack": ({"name": "{tenant}/packs/" + ZERO}, "PACK_NOT_FOUND"),
    "DownloadPack": ({"name": "{tenant}/packs/" + ZERO}, "PACK_NOT_FOUND"),
    "DeletePack": ({"name": "{tenant}/packs/" + ZERO}, "PACK_NOT_FOUND"),
    "CreateExperiment": ({"parent": "{tenant}", "experiment_id": "x"}, "INVALID_ARGUMENT"),
    "GetExperiment": ({"name": NOTHING}, "EXPERIMENT_NOT_FOUND"),
    "ListExperiments": ({"parent": "{tenant}"}, ""),
    "ActivateExperiment": ({"name": NOTHING}, "EXPERIMENT_NOT_FOUND"),
    "RollBackExperiment": ({"name": NOTHING}, "EXPERIMENT_NOT_FOUND"),
    "WatchExperiment": ({"name": NOTHING}, "EXPERIMENT_NOT_FOUND"),
    "ListGenerations": ({"name": NOTHING}, "EXPERIMENT_NOT_FOUND"),
    "ListEngines": ({"parent": NOTHING}, "EXPERIMENT_NOT_FOUND"),
    "DeleteExperiment": ({"name": NOTHING}, "EXPERIMENT_NOT_FOUND"),
    "GetShadowReport": ({"name": NOTHING}, "EXPERIMENT_NOT_FOUND"),
    "ListTenants": ({}, ""),
    "GetTenant": ({"name": "{tenant}"}, ""),
    "CreateTenant": ({"tenant_id": "acme"}, "TENANT_EXISTS"),
    "UpdateTenant": ({"name": "{tenant}", "quota": {"over_rate": 9}}, "INVALID_ARGUMENT"),
    "DeleteTenant": ({"name": "{tenant}"}, "TENANT_IN_USE"),
    "IssueToken": ({"parent": "{tenant}"}, "INVALID_ARGUMENT"),
    "ListTokens": ({"parent": "{tenant}"}, ""),
    "RevokeToken": ({"name": "{tenant}/tokens/999"}, "TOKEN_NOT_FOUND"),
}
SERVICES = [
    oracle_service_pb2.DESCRIPTOR.services_by_name["OracleService"],
    pack_pb2.DESCRIPTOR.services_by_name["ProfilePackService"],
    experiment_pb2.DESCRIPTOR.services_by_name["ExperimentService"],
    tenant_pb2.DESCRIPTOR.services_by_name["TenantService"],
]
METHODS: dict[str, MethodDescriptor] = {method.name: method for service in SERVICES for method in service.methods}
ENGINE_METHODS = {"GetDevice", "AttachEngine", "StreamSteps", "SampleStep"}
OPERATOR_METHODS = {"CreateTenant", "UpdateTenant", "DeleteTenant"}
# Credentials, and which methods they may call on the names of tenants/acme.
CREDENTIALS = {
    "acme engine": ENGINE_METHODS,
    "acme admin": set(METHODS) - OPERATOR_METHODS,
    "globex engine": set[str](),
    "globex admin": {"ListTenants"},
    "operator": set(METHODS),
}


@pytest.fixture(scope="module", params=[(), ("--shards", "2")], ids=["one process", "two shards"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pack_dirs: Dirs
) -> Iterator[SecuredServer]:
    """Two tenants, each with an experiment of the same name; the pack of `acme` is in `globex` as well, but for one."""
    with SecuredServer(tmp_path_factory.mktemp("gated"), arguments=request.param) as server:
        for tenant in ("acme", "globex"):
            server.add_tenant(tenant)
            with server.calls() as calls:
                calls.create(calls.upload(pack_dirs["constant"], tenant), tenant=tenant)
        yield server


@pytest.fixture(scope="module")
def tokens(server: SecuredServer) -> dict[str, Path]:
    """The file of each credential."""
    named = {
        f"{tenant} {scope}": server.issue(tenant, scope)[0]
        for tenant in ("acme", "globex")
        for scope in ("engine", "admin")
    }
    return named | {"operator": server.operator_file}


def outcome(calls: Calls, name: str, tenant: str = "tenants/acme") -> tuple[str, str]:
    """(reason, message) of a call of the method; empty where it succeeds."""
    method = METHODS[name]
    request_type, response_type = (message_factory.GetMessageClass(d) for d in (method.input_type, method.output_type))
    service = {"OracleService": calls.oracle, "ProfilePackService": calls.packs}.get(
        method.containing_service.name,
        calls.tenants if "Tenant" in method.containing_service.name else calls.experiments,
    )
    request = request_type(**_named(REQUESTS[name][0], tenant))
    assert isinstance(request, Message)
    try:
        answer = getattr(service, name)(iter([request]) if method.client_streaming else request, timeout=TIMEOUT)
        for response in answer if method.server_streaming else [answer]:
            assert isinstance(response, response_type)
    except grpc.RpcError as error:
        return reason_of(error)[1], error.details() or ""
    return "", ""


def _named(value: Any, tenant: str) -> Any:
    if isinstance(value, dict):
        return {key: _named(item, tenant) for key, item in value.items()}
    return value.replace("{tenant}", tenant) if isinstance(value, str) else value


def test_every_method_of_the_protocol_is_in_the_matrix() -> None:
    assert set(REQUESTS) == set(METHODS)


@pytest.mark.parametrize("credential", ["none", "a wrong one", "one of another scheme"])
def test_without_a_valid_credential_nothing_is_answered(credential: str, server: SecuredServer, tmp_path: Path) -> None:
    token = None
    if credential != "none":
        token = write_secret(tmp_path / "token", "sto_" + "x" * 43 if credential == "a wrong one" else "a b")
    with Calls(server.process.target, server.access(token)) as calls:
        assert {name: outcome(calls, name)[0] for name in METHODS} == dict.fromkeys(METHODS, "UNAUTHENTICATED")


@pytest.mark.parametrize("credential", CREDENTIALS)
def test_a_credential_allows_its_methods_for_its_tenant_and_no_others(
    credential: str, server: SecuredServer, tokens: dict[str, Path]
) -> None:
    expected = {name: REQUESTS[name][1] if name in CREDENTIALS[credential] else "PERMISSION_DENIED" for name in METHODS}
    with server.calls(tokens[credential]) as calls:
        assert {name: outcome(calls, name)[0] for name in METHODS} == expected


@pytest.mark.parametrize("credential", ["globex engine", "globex admin"])
def test_another_tenant_cannot_be_told_from_one_that_is_not_there(
    credential: str, server: SecuredServer, tokens: dict[str, Path]
) -> None:
    with server.calls(tokens[credential]) as calls:
        for name in set(METHODS) - {"ListTenants", "CreateTenant"}:
            there, absent = (outcome(calls, name, f"tenants/{tenant}") for tenant in ("acme", "nobo"))
            assert there[0] == "PERMISSION_DENIED"
            assert (there[0], there[1].replace("acme", "nobo")) == absent, name


def test_health_and_reflection_need_no_credential(server: SecuredServer) -> None:
    assert server.process.is_serving()


def test_a_tenant_sees_itself_alone(server: SecuredServer, tokens: dict[str, Path]) -> None:
    def names(token: str) -> list[str]:
        with server.calls(tokens[token]) as calls:
            response = calls.tenants.ListTenants(tenant_pb2.ListTenantsRequest(), timeout=TIMEOUT)
        return [tenant.name for tenant in response.tenants]

    assert names("globex admin") == ["tenants/globex"]
    assert names("operator") == ["tenants/acme", "tenants/default", "tenants/globex"]


def test_a_secret_comes_once_and_is_in_no_list_and_no_log(server: SecuredServer) -> None:
    path, name = server.issue("acme", "engine", "once")
    secret = path.read_text().strip()
    with server.calls() as calls:
        listed = calls.tenants.ListTokens(tenant_pb2.ListTokensRequest(parent="tenants/acme"), timeout=TIMEOUT)
    assert name in [token.name for token in listed.tokens]
    assert secret not in str(listed)
    assert secret not in server.process.log
    server.revoke(name)


def test_two_tenants_with_the_same_ids_never_see_each_other(
    server: SecuredServer, tokens: dict[str, Path], pack_dirs: Dirs
) -> None:
    """Engines of one id, experiments of one id, one pack in both, one in the first alone."""
    with server.calls(tokens["acme admin"]) as acme, server.calls(tokens["globex admin"]) as globex:
        mine = {
            calls: f"tenants/{tenant}/experiments/default" for calls, tenant in ((acme, "acme"), (globex, "globex"))
        }
        streams = {}
        for calls, name in mine.items():
            engine = identity("same", name)
            streams[calls] = calls.open(engine, calls.attach(engine).incarnation)
        only_acme = acme.upload(pack_dirs["constant20"], "acme")

        watched: queue.SimpleQueue[experiment_pb2.Experiment] = queue.SimpleQueue()
        watch = globex.experiments.WatchExperiment(
            experiment_pb2.WatchExperimentRequest(name=mine[globex]), timeout=TIMEOUT
        )
        watched.put(next(watch).experiment)
        acme.activate(only_acme, mine[acme])
        (reply,) = streams[acme].ask(decode(0), min_generation=2)
        assert (reply.generation, reply.latency_ns[0]) == (2, 20_000_000)
        (reply,) = streams[globex].ask(decode(0))
        assert (reply.generation, reply.latency_ns[0]) == (1, 10_000_000)
        globex.activate(globex.upload(pack_dirs["constant"], "globex"), mine[globex], seed=9)
        # The next thing a watch of `globex` says is the change of `globex`, not that of `acme` before it.
        watched.put(next(watch).experiment)
        seen = [watched.get(), watched.get()]
        watch.cancel()
        assert [(e.name, e.generation, e.binding.seed) for e in seen] == [(mine[globex], 1, 0), (mine[globex], 2, 9)]

        for calls, name in mine.items():
            engines = calls.experiments.ListEngines(experiment_pb2.ListEnginesRequest(parent=name), timeout=TIMEOUT)
            assert [(e.engine_id, e.steps) for e in engines.engines] == [("same", 1)]
            tenant = name.split("/")[1]
            found = calls.experiments.ListExperiments(
                experiment_pb2.ListExperimentsRequest(parent=f"tenants/{tenant}"), timeout=TIMEOUT
            )
            assert [e.name for e in found.experiments] == [name]
            # Engines of the other tenant under its name: refused, whatever their id.
            other = next(other for other in mine.values() if other != name)
            with pytest.raises(grpc.RpcError) as caught:
                calls.open(identity("same", other), 1)
            assert reason_of(caught.value)[1] == "PERMISSION_DENIED"
        for stream in streams.values():
            stream.close()


def test_a_digest_gives_no_way_to_the_pack_of_another_tenant(
    server: SecuredServer, tokens: dict[str, Path], pack_dirs: Dirs
) -> None:
    with server.calls(tokens["acme admin"]) as acme, server.calls(tokens["globex admin"]) as globex:
        digest = acme.upload(pack_dirs["composed"], "acme")

        def refusal(act: Any) -> tuple[str, str]:
            with pytest.raises(grpc.RpcError) as caught:
                act()
            return reason_of(caught.value)

        own = f"tenants/globex/packs/{digest}"
        for request in (pack_pb2.GetPackRequest(name=own), pack_pb2.DeletePackRequest(name=own)):
            method = getattr(globex.packs, type(request).__name__.removesuffix("Request"))
            assert refusal(lambda m=method, r=request: m(r, timeout=TIMEOUT))[1] == "PACK_NOT_FOUND"
        download = pack_pb2.DownloadPackRequest(name=own)
        assert refusal(lambda: list(globex.packs.DownloadPack(download, timeout=TIMEOUT)))[1] == "PACK_NOT_FOUND"
        assert refusal(lambda: globex.create(digest, "thief", "globex"))[1] == "PACK_NOT_FOUND"
        assert refusal(lambda: globex.activate(digest, "tenants/globex/experiments/default"))[1] == "PACK_NOT_FOUND"
        # Knowing its manifest is not having its files: every byte is asked for, as from the first who has it.
        begin = list(upload_messages(pack_dirs["composed"], parent="tenants/globex"))[:1]
        assert refusal(lambda: globex.packs.UploadPack(iter(begin), timeout=TIMEOUT))[1] == "PACK_INVALID"
        response = globex.client.upload("tenants/globex", pack_dirs["composed"])
        assert not response.existed
        # Each deletes its own; the other's stays.
        acme.packs.DeletePack(pack_pb2.DeletePackRequest(name=f"tenants/acme/packs/{digest}"), timeout=TIMEOUT)
        assert list(globex.packs.DownloadPack(download, timeout=TIMEOUT))


def test_the_history_says_who_and_why(server: SecuredServer, tokens: dict[str, Path]) -> None:
    name = "tenants/acme/experiments/audited"
    with server.calls(tokens["acme admin"]) as acme, server.calls() as operator:
        packs = acme.packs.ListPacks(pack_pb2.ListPacksRequest(parent="tenants/acme"), timeout=TIMEOUT).packs
        binding = experiment_pb2.Binding(default_pack_digest=packs[0].digest)
        create = experiment_pb2.CreateExperimentRequest(
            parent="tenants/acme", experiment_id="audited", binding=binding, comment="first"
        )
        acme.experiments.CreateExperiment(create, timeout=TIMEOUT)
        operator.activate(packs[0].digest, name, request={"comment": "why not"}, seed=1)
        back = experiment_pb2.RollBackExperimentRequest(name=name, comment="it was worse")
        acme.experiments.RollBackExperiment(back, timeout=TIMEOUT)
        history = acme.experiments.ListGenerations(experiment_pb2.ListGenerationsRequest(name=name), timeout=TIMEOUT)
        listed = acme.tenants.ListTokens(tenant_pb2.ListTokensRequest(parent="tenants/acme"), timeout=TIMEOUT).tokens
        with pytest.raises(grpc.RpcError) as caught:
            acme.activate(packs[0].digest, name, request={"comment": "x" * 1001})
        operator.experiments.DeleteExperiment(experiment_pb2.DeleteExperimentRequest(name=name), timeout=TIMEOUT)
    (admin,) = [token.name for token in listed if token.scope == tenant_pb2.TOKEN_SCOPE_ADMIN]
    assert [(r.reason, r.principal, r.comment) for r in history.generations] == [
        ("roll back to 1", admin, "it was worse"),
        ("activate", "operator", "why not"),
        ("create", admin, "first"),
    ]
    assert reason_of(caught.value) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
