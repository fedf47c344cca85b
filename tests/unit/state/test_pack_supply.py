"""Packs of a server and of its fleet: brought once, kept whole or not at all, stored and deleted in turn."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builders import build_constant_pack
from oracle_server import pack as packs
from oracle_server.errors import (
    OracleError,
    PackInvalid,
    PackNotFound,
    PackRegistryUnavailable,
    QuotaExceeded,
    StoreFailed,
)
from oracle_server.state import pack_supply
from oracle_server.state.binding import Binding
from oracle_server.state.node import Node
from oracle_server.state.pack_files import RECENT, PackFiles, Upload
from oracle_server.state.pack_supply import PackSupply
from oracle_server.state.store import TenantRow


@dataclass
class FolderRemote:
    """A PackRemote over a folder; `failure` is what it raises; while `gate` is not set a call waits."""

    folder: Path
    failure: OracleError | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.gate.set()

    async def push(self, digest: str, folder: Path) -> None:
        await self._begin("push")
        shutil.copytree(folder, self.folder / digest, dirs_exist_ok=True)

    async def fetch(self, digest: str, folder: Path) -> None:
        await self._begin("fetch")
        if not (self.folder / digest).exists():
            raise StoreFailed(f"there is no {digest}")
        shutil.copytree(self.folder / digest, folder, dirs_exist_ok=True)

    async def delete(self, digest: str) -> None:
        await self._begin("delete")
        shutil.rmtree(self.folder / digest, ignore_errors=True)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    async def _begin(self, call: str) -> None:
        self.calls.append(call)
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def remote(tmp_path: Path) -> FolderRemote:
    return FolderRemote(tmp_path / "remote")


@pytest.fixture
async def fleet(tmp_path: Path, remote: FolderRemote) -> AsyncIterator[Node]:
    """A server of a fleet whose packs `remote` keeps; the tenants default and acme."""
    opened = Node(tmp_path / "state", pack_remote=remote)
    await opened.open()
    await opened.tenants.create(TenantRow("acme"))
    yield opened
    await opened.close()


def files_of(node: Node) -> PackFiles:
    return node._supply.files


def make(tmp_path: Path, latency_ns: int = 10_000_000) -> tuple[str, Path]:
    folder = tmp_path / f"pack-{latency_ns}"
    return build_constant_pack(folder, latency_ns=latency_ns), folder


async def store(node: Node, folder: Path, tenant: str = "default") -> str:
    async with node.packs.upload(tenant, (folder / "manifest.json").read_bytes()) as upload:
        for entry in upload.manifest.files:
            await node.packs.write(upload, entry.name, (folder / entry.name).read_bytes())
        row, _, _ = await node.packs.keep(tenant, upload, check_only=False)
    return row.digest


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of threads and folders, that set no asyncio.Event
            await asyncio.sleep(0.01)


def left(node: Node) -> list[str]:
    """Names below all three folders."""
    files = files_of(node)
    return sorted(p.name for folder in (files._packs, files._compiled, files._incoming) for p in folder.iterdir())


async def test_a_pack_is_pushed_before_anybody_sees_it(fleet: Node, remote: FolderRemote, tmp_path: Path) -> None:
    digest, folder = make(tmp_path)
    remote.gate.clear()
    storing = asyncio.create_task(store(fleet, folder))
    await until(lambda: remote.calls == ["push"])
    assert await fleet.packs.find("default", digest) is None
    remote.gate.set()
    assert await storing == digest
    assert await fleet.packs.find("default", digest) is not None
    assert remote.names() == [digest]


async def test_a_push_that_fails_leaves_nothing(fleet: Node, remote: FolderRemote, tmp_path: Path) -> None:
    digest, folder = make(tmp_path)
    remote.failure = PackRegistryUnavailable("down")
    with pytest.raises(PackRegistryUnavailable, match="down"):
        await store(fleet, folder)
    assert (await fleet.packs.page("default", "", 9), left(fleet), remote.names()) == ([], [], [])
    remote.failure = None
    assert await store(fleet, folder) == digest


async def test_a_row_that_cannot_be_written_leaves_nothing_there_either(
    fleet: Node, remote: FolderRemote, tmp_path: Path
) -> None:
    _, folder = make(tmp_path)
    remote.gate.clear()
    storing = asyncio.create_task(store(fleet, folder))
    await until(lambda: remote.calls == ["push"])
    await fleet.tenants.update(TenantRow("default", max_packs=1, max_pack_bytes=1))
    remote.gate.set()
    with pytest.raises(QuotaExceeded):
        await storing
    assert (left(fleet), remote.names()) == ([], [])


async def test_a_push_of_another_tenants_pack_that_fails_takes_nothing_from_that_tenant(
    fleet: Node, remote: FolderRemote, tmp_path: Path
) -> None:
    digest, folder = make(tmp_path)
    await store(fleet, folder)
    remote.failure = PackRegistryUnavailable("down")
    with pytest.raises(PackRegistryUnavailable):
        await store(fleet, folder, "acme")
    assert files_of(fleet).has(digest)
    assert remote.names() == [digest]
    assert (await fleet._supply.load(digest)).digest == digest


async def test_a_pack_that_many_ask_for_is_brought_once(fleet: Node, remote: FolderRemote, tmp_path: Path) -> None:
    digest, folder = make(tmp_path)
    await remote.push(digest, folder)
    remote.calls.clear()
    remote.gate.clear()
    asking = [asyncio.create_task(fleet._supply.load(digest)) for _ in range(5)]
    await until(lambda: remote.calls == ["fetch"])
    # Who gives up stops nobody else.
    asking[0].cancel()
    remote.gate.set()
    loaded = await asyncio.gather(*asking[1:])
    assert {pack.digest for pack in loaded} == {digest}
    assert remote.calls == ["fetch"]
    assert [path.name for path in files_of(fleet)._incoming.iterdir()] == []


async def test_what_comes_is_checked_as_an_upload_is(fleet: Node, remote: FolderRemote, tmp_path: Path) -> None:
    digest, folder = make(tmp_path)
    await remote.push(digest, folder)
    (remote.folder / digest / "operators.parquet").write_bytes(b"no parquet")
    with pytest.raises(StoreFailed, match=r"the registry's copy of the pack .* is refused"):
        await fleet._supply.load(digest)
    other, other_folder = make(tmp_path, 5)
    shutil.copytree(other_folder, remote.folder / "sha256:0")
    with pytest.raises(StoreFailed, match=f"the folder holds the pack {other}"):
        await fleet._supply.load("sha256:0")
    assert left(fleet) == []


async def test_a_server_without_a_fleet_says_what_it_lacks(tmp_path: Path) -> None:
    supply = PackSupply(PackFiles(tmp_path / "state"))
    supply.files.prepare(set())
    with pytest.raises(PackInvalid):
        await supply.load("sha256:" + 64 * "0")
    with pytest.raises(PackInvalid):
        await supply.load_all(["sha256:" + 64 * "0"])


async def test_a_damaged_or_lost_folder_is_no_reason_not_to_start_in_a_fleet(
    remote: FolderRemote, tmp_path: Path
) -> None:
    fleet = Node(tmp_path / "state", pack_remote=remote)
    await fleet.open()
    (first, first_folder), (second, second_folder), (third, third_folder) = (make(tmp_path, n) for n in (1, 2, 3))
    for digest, folder in ((first, first_folder), (second, second_folder), (third, third_folder)):
        await store(fleet, folder)
        await fleet.experiments.create("default", f"e{digest[7:12]}", Binding(default_pack_digest=digest))
    await fleet.close()
    files = files_of(fleet)
    shutil.rmtree(files.place(first))
    shutil.rmtree(files._compiled / second.removeprefix("sha256:"))
    (files.place(second) / "operators.parquet").write_bytes(b"damaged")
    remote.calls.clear()
    again = Node(tmp_path / "state", pack_remote=remote)
    assert await again.open() == []
    assert remote.calls == ["fetch", "fetch"]
    assert all(files_of(again).has(digest) for digest in (first, second, third))
    assert packs.check_pack(files.place(second)).digest == second
    await again.close()


async def test_an_experiment_without_its_pack_is_there_and_is_completed_at_its_generation(
    remote: FolderRemote, tmp_path: Path
) -> None:
    fleet = Node(tmp_path / "state", pack_remote=remote)
    await fleet.open()
    digest, folder = make(tmp_path)
    await store(fleet, folder)
    name = (await fleet.experiments.create("default", "default", Binding(default_pack_digest=digest))).name
    await fleet.close()
    files_of(fleet).remove(digest)
    remote.failure = PackRegistryUnavailable("down")
    again = Node(tmp_path / "state", pack_remote=remote)
    await again.open()
    live = again.experiments.find(name)
    assert (live.snapshot.missing, live.snapshot.packs, live.current.generation) == ({digest: "down"}, {}, 1)
    await again.experiments.complete()
    assert live.snapshot.missing == {digest: "down"}
    remote.failure = None
    await again.experiments.complete()
    assert (live.snapshot.missing, set(live.snapshot.packs), live.snapshot.generation) == ({}, {digest}, 1)
    await again.close()


async def test_a_start_does_not_wait_for_a_pack_that_does_not_come(
    remote: FolderRemote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path / "state", pack_remote=remote)
    await node.open()
    (here, here_folder), (away, away_folder) = make(tmp_path, 1), make(tmp_path, 2)
    for digest, folder in ((here, here_folder), (away, away_folder)):
        await store(node, folder)
        await node.experiments.create("default", f"e{digest[7:12]}", Binding(default_pack_digest=digest))
    await node.close()
    files_of(node).remove(away)
    remote.gate.clear()
    # Longer than mapping the one that is here: that one must not be late.
    monkeypatch.setattr(pack_supply, "WAIT_SECONDS", 2.0)
    again = Node(tmp_path / "state", pack_remote=remote)
    await again.open()
    lacking = {
        digest: live.snapshot.missing for live in again.experiments.all() for digest in live.current.binding.digests()
    }
    assert lacking == {here: {}, away: {away: "the registry has not given it in 2 s"}}
    # It is on its way all the same.
    remote.gate.set()
    monkeypatch.setattr(pack_supply, "WAIT_SECONDS", 60.0)
    await again.experiments.complete()
    assert [live.snapshot.missing for live in again.experiments.all()] == [{}, {}]
    assert remote.calls.count("fetch") == 1
    await again.close()


async def test_a_deletion_is_answered_while_the_registry_hangs_and_ends_with_it(
    fleet: Node, remote: FolderRemote, tmp_path: Path
) -> None:
    digest, folder = make(tmp_path)
    await store(fleet, folder)
    remote.gate.clear()
    await asyncio.wait_for(fleet.packs.delete("default", digest), 20)
    assert await fleet.packs.find("default", digest) is None
    again = asyncio.create_task(store(fleet, folder))
    turn = fleet.packs._turn(digest)
    await until(lambda: len(remote.calls) > 2 or bool(turn._waiters))
    assert remote.calls == ["push", "delete"]
    remote.gate.set()
    # Stored anew after the deletion has ended, and not lost in it.
    await again
    assert remote.calls == ["push", "delete", "push"]
    assert (remote.names(), files_of(fleet).has(digest)) == ([digest], True)


async def test_a_pack_another_server_stores_while_it_is_deleted_here_stays_in_the_registry(
    fleet: Node, remote: FolderRemote, tmp_path: Path
) -> None:
    digest, folder = make(tmp_path)
    await store(fleet, folder)
    row = await fleet.packs.get("default", digest)
    remote.gate.clear()
    await fleet.packs.delete("default", digest)
    await until(lambda: remote.calls[-1] == "delete")
    # As another server of the fleet does, over the same database.
    await fleet._records.call(fleet._records.store.add_pack, row)
    remote.gate.set()
    await until(lambda: remote.calls == ["push", "delete", "push"] and remote.names() == [digest])
    assert files_of(fleet).has(digest)


class HeldFiles:
    """Stands for one method of a PackFiles: says when it is at it, and goes on when it is let."""

    def __init__(self, files: PackFiles, method: str) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()
        self._do = getattr(files, method)
        setattr(files, method, self)

    def __call__(self, *arguments: object) -> object:
        self.begun.set()
        assert self.may_end.wait(20), "nobody lets it go on"
        return self._do(*arguments)


@pytest.mark.parametrize("kept_by", [None, "remote"])
async def test_a_pack_that_one_tenant_deletes_while_another_stores_it_keeps_its_files(
    tmp_path: Path, kept_by: str | None
) -> None:
    remote = FolderRemote(tmp_path / "remote") if kept_by else None
    node = Node(tmp_path / "state", pack_remote=remote)
    await node.open()
    await node.tenants.create(TenantRow("acme"))
    digest, folder = make(tmp_path)
    await store(node, folder)
    # The bytes of acme's upload have arrived and are being checked: the files are there already.
    checking = HeldFiles(files_of(node), "check")
    storing = asyncio.create_task(store(node, folder, "acme"))
    await until(checking.begun.is_set)
    deleting = asyncio.create_task(node.packs.delete("default", digest))
    # The deletion gets as far as it may: to its end, were it not made to wait its turn.
    turn = node.packs._turn(digest)
    await until(lambda: deleting.done() or bool(turn._waiters))
    assert not deleting.done()
    checking.may_end.set()
    assert await storing == digest
    await deleting
    assert await node.packs.find("default", digest) is None
    assert await node.packs.find("acme", digest) is not None
    assert files_of(node).has(digest)
    assert (await node._supply.load(digest)).digest == digest
    assert remote is None or remote.names() == [digest]
    await node.close()


async def test_a_pack_that_one_tenant_stores_while_another_deletes_it_gets_files_of_its_own(
    fleet: Node, remote: FolderRemote, tmp_path: Path
) -> None:
    digest, folder = make(tmp_path)
    await store(fleet, folder)
    removing = HeldFiles(files_of(fleet), "remove")
    deleting = asyncio.create_task(fleet.packs.delete("default", digest))
    await until(removing.begun.is_set)
    storing = asyncio.create_task(store(fleet, folder, "acme"))
    turn = fleet.packs._turn(digest)
    await until(lambda: storing.done() or bool(turn._waiters))
    removing.may_end.set()
    await deleting
    assert await storing == digest
    assert files_of(fleet).has(digest)
    assert remote.names() == [digest]
    assert (await fleet._supply.load(digest)).digest == digest


def test_an_upload_with_names_that_leave_its_folder_makes_no_folder(tmp_path: Path) -> None:
    _, folder = make(tmp_path)
    files = PackFiles(tmp_path / "state")
    files.prepare(set())
    manifest = (folder / "manifest.json").read_bytes().replace(b'"operators.parquet"', b'"../operators.parquet"')
    with pytest.raises(PackInvalid):
        files.begin(manifest)
    assert list(files._incoming.iterdir()) == []
    assert isinstance(files.begin((folder / "manifest.json").read_bytes()), Upload)


async def test_the_last_packs_stay_mapped_and_going_back_to_one_loads_nothing(
    fleet: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [await store(fleet, make(tmp_path, 1_000_000 * (1 + number))[1]) for number in range(RECENT + 1)]
    name = (await fleet.experiments.create("default", "e", Binding(default_pack_digest=digests[0]))).name
    mapped: list[str] = []
    load = packs.load_compiled

    def noted(folder: Path) -> packs.CompiledPack:
        mapped.append(f"sha256:{folder.name}")
        return load(folder)

    monkeypatch.setattr(packs, "load_compiled", noted)

    async def activate(digest: str) -> None:
        binding = Binding(default_pack_digest=digest)
        await fleet.experiments.activate(name, binding, 0, frozenset(), validate_only=False)

    for digest in digests[1:]:
        await activate(digest)
    assert mapped == digests[1:]
    # The first is the oldest of one too many, so it is loaded anew. The others are still there.
    for digest in (*digests[2:], digests[0]):
        await activate(digest)
    assert mapped == [*digests[1:], digests[0]]
    # One that is deleted is not kept, nor can anybody go back to it.
    await fleet.packs.delete("default", digests[2])
    await until(lambda: list(files_of(fleet)._recent) == [*digests[3:], digests[0]])
    with pytest.raises(PackNotFound):
        await activate(digests[2])


async def test_a_pack_deleted_while_it_is_activated_leaves_the_generation_as_it_was(
    fleet: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = [await store(fleet, make(tmp_path, latency_ns)[1]) for latency_ns in (1_000_000, 2_000_000)]
    live = await fleet.experiments.create("default", "e", Binding(default_pack_digest=one))
    prepare = fleet.experiments._followers.prepare

    async def delete_first(digests: Sequence[str]) -> None:
        # After the activation has looked for it, before its turn to be written.
        await fleet.packs.delete("default", other)
        await prepare(digests)

    monkeypatch.setattr(fleet.experiments._followers, "prepare", delete_first)
    binding = Binding(default_pack_digest=other)
    with pytest.raises(PackNotFound, match="has no pack"):
        await fleet.experiments.activate(live.name, binding, 0, frozenset(), validate_only=False)
    assert (live.snapshot.generation, live.current.generation) == (1, 1)
    assert await fleet.experiments._records.call(fleet._records.store.generation, "default", "e", 2) is None
