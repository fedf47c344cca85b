"""Packs over the wire: kept whole or not at all, bad ones refused in a child process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from builders import build_composed_pack, build_constant_pack
from oracle_calls import EXPERIMENT, TIMEOUT, Calls, decode, identity, reason_of, upload_messages
from oracle_process import OracleProcess
from step_oracle.v1 import experiment_pb2, pack_pb2

Dirs = dict[str, Path]


def listed(calls: Calls) -> list[str]:
    request = pack_pb2.ListPacksRequest(parent="tenants/default")
    return [pack.digest for pack in calls.packs.ListPacks(request, timeout=TIMEOUT).packs]


def upload(calls: Calls, messages: Iterator[pack_pb2.UploadPackRequest]) -> pack_pb2.UploadPackResponse:
    return calls.packs.UploadPack(messages, timeout=60)  # type: ignore[no-any-return]


def test_a_pack_comes_back_byte_for_byte(calls: Calls, pack_dirs: Dirs) -> None:
    for name in ("composed", "sampled"):
        digest = calls.upload(pack_dirs[name])
        request = pack_pb2.DownloadPackRequest(name=f"tenants/default/packs/{digest}")
        files: dict[str, bytes] = {}
        for part in calls.packs.DownloadPack(request, timeout=TIMEOUT):
            files[part.file] = files.get(part.file, b"") + part.data
        assert files == {path.name: path.read_bytes() for path in pack_dirs[name].iterdir()}
        assert next(iter(files)) == "manifest.json"


def test_an_upload_of_a_stored_pack_is_no_error(calls: Calls, pack_dirs: Dirs) -> None:
    first = calls.client.upload("tenants/default", pack_dirs["composed"])
    second = calls.client.upload("tenants/default", pack_dirs["composed"])
    assert (first.existed, second.existed) == (False, True)
    assert first.pack == second.pack


def test_a_dry_run_stores_nothing(calls: Calls, pack_dirs: Dirs) -> None:
    response = calls.client.upload("tenants/default", pack_dirs["composed"], validate_only=True)
    assert response.pack.digest.startswith("sha256:")
    assert listed(calls) == []


def test_pages_hold_every_pack_once(calls: Calls, tmp_path: Path) -> None:
    digests = set()
    for i in range(5):
        build_constant_pack(tmp_path / str(i), latency_ns=1_000_000 + i)
        digests.add(calls.upload(tmp_path / str(i)))
    request = pack_pb2.ListPacksRequest(parent="tenants/default", page_size=2)
    found = [pack.digest for pack in calls.client.pages(calls.packs.ListPacks, request, "packs")]
    assert found == sorted(digests)


def test_a_pack_in_use_is_kept_until_no_current_binding_names_it(calls: Calls, pack_dirs: Dirs) -> None:
    old, new = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
    calls.create(old)
    request = pack_pb2.DeletePackRequest(name=f"tenants/default/packs/{old}")
    with pytest.raises(grpc.RpcError):
        calls.packs.DeletePack(request, timeout=TIMEOUT)
    calls.activate(new)
    calls.packs.DeletePack(request, timeout=TIMEOUT)
    assert listed(calls) == [new]
    rollback = experiment_pb2.RollBackExperimentRequest(name=EXPERIMENT)
    with pytest.raises(grpc.RpcError) as caught:
        calls.experiments.RollBackExperiment(rollback, timeout=TIMEOUT)
    assert reason_of(caught.value)[1] == "PACK_NOT_FOUND"
    with pytest.raises(grpc.RpcError) as caught:
        calls.packs.GetPack(pack_pb2.GetPackRequest(name=request.name), timeout=TIMEOUT)
    assert reason_of(caught.value)[1] == "PACK_NOT_FOUND"
    # Uploaded again it answers again: content-addressed.
    assert calls.upload(pack_dirs["constant"]) == old
    assert calls.experiments.RollBackExperiment(rollback, timeout=TIMEOUT).experiment.generation == 3


def _changed(directory: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(directory, target)
    change(target)
    return target


def _flip_a_bit(directory: Path) -> None:
    path = directory / "operators.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _claim_more_rows(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][0]["rows"] += 1
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _no_blocks(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["kv_cache"]["blocks"]
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _deep(directory: Path) -> None:
    manifest = (directory / "manifest.json").read_text()
    deep = "[" * 200_000 + "]" * 200_000
    (directory / "manifest.json").write_text(manifest[:-1] + f', "deep": {deep}' + "}")


def _nan(directory: Path) -> None:
    text = (directory / "manifest.json").read_text()
    (directory / "manifest.json").write_text(re.sub(r'"prep_ns":\d+', '"prep_ns":NaN', text))


FAULTS = {
    "a flipped bit": _flip_a_bit,
    "more rows than there are": _claim_more_rows,
    "no KV blocks": _no_blocks,
    "200,000 levels deep": _deep,
    "a number that is none": _nan,
}


def test_a_bad_pack_is_refused_and_the_good_ones_stay(
    server: OracleProcess, calls: Calls, pack_dirs: Dirs, tmp_path: Path
) -> None:
    good = calls.upload(pack_dirs["composed"])
    calls.create(good)
    before = resident_bytes(server.pid)
    for i, (name, change) in enumerate(FAULTS.items()):
        bad = _changed(pack_dirs["constant"], tmp_path / str(i), change)
        messages = upload_messages(bad)
        with pytest.raises(grpc.RpcError) as caught:
            upload(calls, messages)
        assert reason_of(caught.value)[0] in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"), name
        assert reason_of(caught.value)[1] in ("PACK_INVALID", "PACK_DIGEST_MISMATCH", "QUOTA_EXCEEDED"), name
    assert listed(calls) == [good]
    assert calls.sample(identity("e"), [decode(0)])
    assert list((server.state_dir / "incoming").iterdir()) == []
    assert resident_bytes(server.pid) - before < 100 << 20


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


def _chunk(file: str, data: bytes) -> pack_pb2.UploadPackRequest:
    return pack_pb2.UploadPackRequest(chunk=pack_pb2.UploadPackChunk(file=file, data=data))


SEQUENCES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "no begin": lambda m: m[1:],
    "begin twice": lambda m: [m[0], m[0]],
    "no files": lambda m: m[:1],
    "a file too few": lambda m: m[:-1],
    "files in another order": lambda m: [m[0], *reversed(m[1:])],
    "a file of no name in the manifest": lambda m: [m[0], _chunk("../../evil", b"x")],
    "a file that is too long": lambda m: [*m[:2], _chunk(m[1].chunk.file, b"x"), *m[2:]],
    "a chunk after the last file": lambda m: [*m, _chunk(m[-1].chunk.file, b"x")],
    "a chunk that is too large": lambda m: [m[0], _chunk(m[1].chunk.file, b"x" * ((1 << 20) + 1))],
    "nothing": lambda m: [],
}


@pytest.mark.parametrize("fault", SEQUENCES)
def test_an_upload_out_of_order_is_refused(
    fault: str, shared: Calls, shared_server: OracleProcess, tmp_path: Path
) -> None:
    # Two files, so that their order can be wrong.
    build_composed_pack(tmp_path / "two", ratios=[1.0, 1.5])
    messages = list(upload_messages(tmp_path / "two"))
    before = listed(shared)
    with pytest.raises(grpc.RpcError) as caught:
        upload(shared, iter(SEQUENCES[fault](messages)))
    assert reason_of(caught.value)[0] == "INVALID_ARGUMENT"
    assert listed(shared) == before
    assert list((shared_server.state_dir / "incoming").iterdir()) == []


def test_a_client_that_hangs_up_leaves_nothing(shared: Calls, shared_server: OracleProcess, tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack", latency_ns=4321)
    messages = list(upload_messages(tmp_path / "pack"))
    before = listed(shared)

    def hang() -> Iterator[pack_pb2.UploadPackRequest]:
        yield from messages[:1]
        call.cancel()

    call = shared.packs.UploadPack.future(hang(), timeout=TIMEOUT)
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        call.result()
    upload(shared, iter(messages))
    assert len(listed(shared)) == len(before) + 1
    assert list((shared_server.state_dir / "incoming").iterdir()) == []
