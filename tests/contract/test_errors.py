"""Every ErrorReason that can occur is produced over a real channel, with its code."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from builders import build_composed_pack
from oracle_calls import (
    EXPERIMENT,
    TIMEOUT,
    Calls,
    decode,
    identity,
    info_of,
    prefill,
    reason_of,
    upload_messages,
)
from oracle_process import OracleProcess
from oracle_server.pack import Model
from step_oracle.v1 import (
    error_reason_pb2,
    experiment_pb2,
    oracle_service_pb2,
    step_pb2,
    tenant_pb2,
)
from step_oracle.v1.pack_pb2 import DeletePackRequest, GetPackRequest

Dirs = dict[str, Path]
DIGEST = "sha256:" + "0" * 64

NOT_YET = {"UNSPECIFIED"}
# DRAINING is in test_server.py, STARTING in unit/state/test_starting.py, DATABASE_UNAVAILABLE in test_replicas.py,
# PACK_REGISTRY_UNAVAILABLE in test_pack_registry.py, the others in test_authorization.py and test_rotation.py.
ELSEWHERE = {
    *("DRAINING", "STARTING", "DATABASE_UNAVAILABLE", "PACK_REGISTRY_UNAVAILABLE", "UNAUTHENTICATED"),
    *("PERMISSION_DENIED", "CREDENTIAL_REVOKED"),
}


def experiment_not_found(calls: Calls, dirs: Dirs) -> None:
    calls.sample(identity("a"), [decode(0)])


def experiment_exists(calls: Calls, dirs: Dirs) -> None:
    digest = calls.upload(dirs["constant"])
    calls.create(digest)
    calls.create(digest)


def pack_not_found(calls: Calls, dirs: Dirs) -> None:
    calls.create(DIGEST)


def pack_invalid(calls: Calls, dirs: Dirs) -> None:
    calls.packs.UploadPack(upload_messages(dirs["constant"], manifest_json=b'{"schema": "other"}'), timeout=TIMEOUT)


def pack_digest_mismatch(calls: Calls, dirs: Dirs) -> None:
    calls.packs.UploadPack(upload_messages(dirs["constant"], expected_digest=DIGEST), timeout=TIMEOUT)


def pack_in_use(calls: Calls, dirs: Dirs) -> None:
    digest = calls.upload(dirs["constant"])
    calls.create(digest)
    calls.packs.DeletePack(DeletePackRequest(name=f"tenants/default/packs/{digest}"), timeout=TIMEOUT)


def engine_mismatch(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["constant"]))
    calls.attach(identity("a"), config=oracle_service_pb2.EngineConfig(block_size=32))


def engine_id_taken(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["constant"]))
    calls.attach(identity("a"))
    calls.attach(identity("a"))


def experiment_in_use(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["constant"]))
    calls.attach(identity("a"))
    name = "tenants/default/experiments/default"
    calls.experiments.DeleteExperiment(experiment_pb2.DeleteExperimentRequest(name=name), timeout=TIMEOUT)


def no_rule_matches(calls: Calls, dirs: Dirs) -> None:
    rule = experiment_pb2.Rule(pack_digest=calls.upload(dirs["constant"]), labels={"gpu": "l40s"})
    calls.create("", rules=[rule])
    calls.oracle.GetDevice(oracle_service_pb2.GetDeviceRequest(engine=identity("a")), timeout=TIMEOUT)


def generation_conflict(calls: Calls, dirs: Dirs) -> None:
    digest = calls.upload(dirs["constant"])
    calls.create(digest)
    calls.activate(digest, request={"expected_generation": 7})


def stale_generation(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["constant"]))
    calls.sample(identity("a"), [decode(0)], min_generation=2)


def bad_step(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["constant"]))
    calls.sample(identity("a"), [step_pb2.StepRequest()])


def support_refused(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["composed"]), support_policy=experiment_pb2.SUPPORT_POLICY_REFUSE)
    calls.sample(identity("a"), [prefill(0, (1_000_000, 0))])


def acceptance_unknown(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["constant"]))
    calls.attach(identity("a"), config=oracle_service_pb2.EngineConfig(num_speculative_tokens=3))


def invalid_argument(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["constant"]), draft_acceptance_rate=1.5)


def quota_exceeded(calls: Calls, dirs: Dirs) -> None:
    calls.packs.UploadPack(upload_messages(dirs["constant"], manifest_json=b" " * ((1 << 20) + 1)), timeout=TIMEOUT)


def tenant_not_found(calls: Calls, dirs: Dirs) -> None:
    calls.tenants.GetTenant(tenant_pb2.GetTenantRequest(name="tenants/nobody"), timeout=TIMEOUT)


def tenant_exists(calls: Calls, dirs: Dirs) -> None:
    calls.tenants.CreateTenant(tenant_pb2.CreateTenantRequest(tenant_id="default"), timeout=TIMEOUT)


def tenant_in_use(calls: Calls, dirs: Dirs) -> None:
    calls.upload(dirs["constant"])
    calls.tenants.DeleteTenant(tenant_pb2.DeleteTenantRequest(name="tenants/default"), timeout=TIMEOUT)


def token_not_found(calls: Calls, dirs: Dirs) -> None:
    calls.tenants.RevokeToken(tenant_pb2.RevokeTokenRequest(name="tenants/default/tokens/7"), timeout=TIMEOUT)


def generation_not_found(calls: Calls, dirs: Dirs) -> None:
    calls.create(calls.upload(dirs["constant"]))
    request = experiment_pb2.RollBackExperimentRequest(name=EXPERIMENT, to_generation=9)
    calls.experiments.RollBackExperiment(request, timeout=TIMEOUT)


CASES: dict[str, tuple[str, Callable[[Calls, Dirs], Any]]] = {
    "EXPERIMENT_NOT_FOUND": ("NOT_FOUND", experiment_not_found),
    "EXPERIMENT_EXISTS": ("ALREADY_EXISTS", experiment_exists),
    "PACK_NOT_FOUND": ("NOT_FOUND", pack_not_found),
    "PACK_INVALID": ("INVALID_ARGUMENT", pack_invalid),
    "PACK_DIGEST_MISMATCH": ("INVALID_ARGUMENT", pack_digest_mismatch),
    "PACK_IN_USE": ("FAILED_PRECONDITION", pack_in_use),
    "ENGINE_MISMATCH": ("FAILED_PRECONDITION", engine_mismatch),
    "ENGINE_ID_TAKEN": ("ALREADY_EXISTS", engine_id_taken),
    "EXPERIMENT_IN_USE": ("FAILED_PRECONDITION", experiment_in_use),
    "NO_RULE_MATCHES": ("FAILED_PRECONDITION", no_rule_matches),
    "GENERATION_CONFLICT": ("ABORTED", generation_conflict),
    "STALE_GENERATION": ("UNAVAILABLE", stale_generation),
    "BAD_STEP": ("INVALID_ARGUMENT", bad_step),
    "SUPPORT_REFUSED": ("FAILED_PRECONDITION", support_refused),
    "ACCEPTANCE_UNKNOWN": ("FAILED_PRECONDITION", acceptance_unknown),
    "INVALID_ARGUMENT": ("INVALID_ARGUMENT", invalid_argument),
    "QUOTA_EXCEEDED": ("RESOURCE_EXHAUSTED", quota_exceeded),
    "TENANT_NOT_FOUND": ("NOT_FOUND", tenant_not_found),
    "GENERATION_NOT_FOUND": ("NOT_FOUND", generation_not_found),
    "TENANT_EXISTS": ("ALREADY_EXISTS", tenant_exists),
    "TENANT_IN_USE": ("FAILED_PRECONDITION", tenant_in_use),
    "TOKEN_NOT_FOUND": ("NOT_FOUND", token_not_found),
}


@pytest.mark.parametrize("reason", CASES)
def test_a_refused_call_carries_its_reason(reason: str, calls: Calls, pack_dirs: Dirs) -> None:
    code, act = CASES[reason]
    with pytest.raises(grpc.RpcError) as caught:
        act(calls, pack_dirs)
    assert reason_of(caught.value) == (code, reason)
    assert caught.value.details()


def test_every_reason_of_the_protocol_is_produced_by_some_test() -> None:
    declared = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert declared - NOT_YET - ELSEWHERE - {"STORE_FAILED"} == set(CASES)


def test_a_locked_database_refuses_a_change_and_nothing_is_changed(
    server: OracleProcess, calls: Calls, pack_dirs: Dirs
) -> None:
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest)
    other = sqlite3.connect(server.state_dir / "oracle.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(grpc.RpcError) as caught:
            calls.activate(digest, seed=5)
        # Steps need no database.
        assert calls.sample(identity("a"), [decode(0)])[0].generation == 1
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert reason_of(caught.value) == ("FAILED_PRECONDITION", "STORE_FAILED")
    assert calls.activate(digest, seed=5).experiment.generation == 2


def test_a_disk_that_refuses_fails_the_upload_and_nothing_is_changed(
    server: OracleProcess, calls: Calls, pack_dirs: Dirs
) -> None:
    incoming = server.state_dir / "incoming"
    shutil.rmtree(incoming)
    incoming.write_bytes(b"not a folder")
    with pytest.raises(grpc.RpcError) as caught:
        calls.packs.UploadPack(upload_messages(pack_dirs["constant"]), timeout=TIMEOUT)
    assert reason_of(caught.value) == ("FAILED_PRECONDITION", "STORE_FAILED")
    incoming.unlink()
    incoming.mkdir()
    assert calls.upload(pack_dirs["constant"])


def test_a_mismatch_lists_every_item_at_once(calls: Calls, tmp_path: Path) -> None:
    build_composed_pack(tmp_path / "typed", model=Model(id="m", dtype="bfloat16"))
    calls.create(calls.upload(tmp_path / "typed"))
    config = oracle_service_pb2.EngineConfig(block_size=32, dtype="float16", tensor_parallel_size=2)
    with pytest.raises(grpc.RpcError) as caught:
        calls.attach(identity("a"), config=config)
    items = [value for key, value in sorted(info_of(caught.value).metadata.items()) if key.startswith("item_")]
    assert [item.partition(":")[0] for item in items] == ["dtype", "tensor_parallel_size", "block_size"]
    allowed = ["block_size", "dtype", "tensor_parallel_size"]
    assert calls.attach(identity("a"), config=config, allow_mismatch=allowed).incarnation == 1


def test_a_very_long_list_of_items_still_arrives(calls: Calls, pack_dirs: Dirs) -> None:
    """gRPC peers drop a status above 8 KiB of metadata: the list is cut, and says so."""
    calls.create(calls.upload(pack_dirs["constant"]))
    streams = []
    for i in range(60):
        engine = identity(f"{i:03d}-" + "x" * 150)
        calls.attach(engine, config=oracle_service_pb2.EngineConfig(max_num_seqs=1 + i))
        streams.append(engine)
    tied = calls.upload(pack_dirs["tied"])
    with pytest.raises(grpc.RpcError) as caught:
        calls.activate(tied)
    assert reason_of(caught.value) == ("FAILED_PRECONDITION", "ENGINE_MISMATCH")
    metadata = info_of(caught.value).metadata
    assert int(metadata["omitted"]) + len(metadata) - 1 == 60


BAD_STEPS = {
    "no tokens": step_pb2.StepRequest(),
    "fewer decode tokens than requests": decode(0, num_decode_tokens=3),
    "more context than requests times the longest": decode(0, context=4000, max_decode_context_tokens=999),
    "concurrency that is not the sum": decode(0, concurrency=5),
    "draft tokens that do not add up": decode(0, num_decode_tokens=6, num_draft_tokens=[1]),
    "a request with zero draft tokens": decode(0, num_decode_tokens=5, num_draft_tokens=[1, 0]),
    "an empty chunk": prefill(0, (0, 5)),
    "too many chunks": prefill(0, *[(1, 0)] * 4097),
    "too many tokens": prefill(0, (1 << 24, 0), (1, 0)),
    "too much context": decode(0, requests=1, context=(1 << 40) + 1),
    "context without decode requests": prefill(0, (5, 0), decode_context_tokens=5),
    "an index beyond 63 bits": decode(1 << 63),
    "a new request without a key": prefill(0, (5, 0), new_requests=[step_pb2.NewRequest(prompt_tokens=5)]),
}


@pytest.mark.parametrize("fault", BAD_STEPS)
def test_a_step_that_cannot_be_ends_the_stream_after_the_answers_before_it(
    fault: str, shared: Calls, request: pytest.FixtureRequest
) -> None:
    stream = shared.join(f"engine-{list(BAD_STEPS).index(fault)}")
    stream.send(steps=[decode(0), BAD_STEPS[fault]])
    assert len(stream.receive().replies) == 1
    with pytest.raises(grpc.RpcError) as caught:
        stream.receive()
    assert reason_of(caught.value) == ("INVALID_ARGUMENT", "BAD_STEP")


def test_nothing_is_answered_before_open(shared: Calls) -> None:
    call = shared.oracle.StreamSteps(iter([oracle_service_pb2.StreamStepsRequest(steps=[decode(0)])]), timeout=TIMEOUT)
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert reason_of(caught.value) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


@pytest.mark.parametrize("junk", [b"\xff" * 40, os.urandom(200), b"\x0a\xff\xff\xff\xff\x0f"])
def test_bytes_that_are_no_message_do_not_stop_the_server(
    junk: bytes, shared: Calls, shared_server: OracleProcess
) -> None:
    with shared_server.channel() as channel:
        method = channel.unary_unary("/step_oracle.v1.OracleService/AttachEngine", None, None)
        with pytest.raises(grpc.RpcError):
            method(junk, timeout=TIMEOUT)
    assert shared.sample(identity("a"), [decode(0)])


@pytest.mark.parametrize("method", ["OracleService/StreamSteps", "ProfilePackService/UploadPack"])
def test_bytes_that_are_no_message_of_a_stream_are_refused_with_a_reason(
    method: str, shared: Calls, shared_server: OracleProcess
) -> None:
    with shared_server.channel() as channel:
        path = f"/step_oracle.v1.{method}"
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(path, None, None)(iter([b"\xff" * 40]), timeout=TIMEOUT))
    assert reason_of(caught.value) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    assert "cannot be decoded" in str(caught.value.details())
    assert shared.sample(identity("a"), [decode(0)])


NAMES = {
    "experiment": lambda c: c.experiments.GetExperiment(experiment_pb2.GetExperimentRequest(name="x"), timeout=TIMEOUT),
    "tenant": lambda c: c.tenants.GetTenant(tenant_pb2.GetTenantRequest(name="tenants/"), timeout=TIMEOUT),
    "pack": lambda c: c.packs.GetPack(GetPackRequest(name="tenants/default/packs/../x"), timeout=TIMEOUT),
    "engine": lambda c: c.sample(identity("a\nb"), [decode(0)]),
    "page": lambda c: c.tenants.ListTenants(tenant_pb2.ListTenantsRequest(page_token="%%"), timeout=TIMEOUT),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_malformed_name_is_an_invalid_argument(name: str, shared: Calls) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        NAMES[name](shared)
    assert reason_of(caught.value) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")


@pytest.mark.parametrize("method", ["GetExperiment", "ListEngines", "DeleteExperiment", "WatchExperiment"])
def test_an_unknown_tenant_is_told_apart_from_an_unknown_experiment(method: str, shared: Calls) -> None:
    field = "parent" if method == "ListEngines" else "name"
    request = getattr(experiment_pb2, f"{method}Request")(**{field: "tenants/nobody/experiments/default"})
    with pytest.raises(grpc.RpcError) as caught:
        list(getattr(shared.experiments, method)(request, timeout=TIMEOUT))
    assert reason_of(caught.value) == ("NOT_FOUND", "TENANT_NOT_FOUND")


def test_uploads_beyond_the_limit_at_once_are_refused(calls: Calls, pack_dirs: Dirs) -> None:
    hold = threading.Event()
    begun = [threading.Event() for _ in range(4)]

    def slow(i: int) -> Any:
        messages = upload_messages(pack_dirs["composed"], validate_only=True)
        yield next(messages)
        yield next(messages)
        begun[i].set()
        hold.wait(TIMEOUT)
        yield from messages

    futures = [calls.packs.UploadPack.future(slow(i), timeout=TIMEOUT) for i in range(4)]
    for event in begun:
        assert event.wait(TIMEOUT)
    refused = None
    for _ in range(200):
        try:
            calls.packs.UploadPack(upload_messages(pack_dirs["constant"], validate_only=True), timeout=TIMEOUT)
        except grpc.RpcError as error:
            refused = error
            break
    hold.set()
    for future in futures:
        future.result()
    assert refused is not None
    assert reason_of(refused) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
