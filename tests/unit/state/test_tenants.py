"""Tenants and their tokens: what is kept, what is refused, who is let in when."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from oracle_server.errors import (
    InvalidArgument,
    PermissionDenied,
    QuotaExceeded,
    StoreFailed,
    TenantExists,
    TenantInUse,
    TenantNotFound,
    TokenNotFound,
    Unauthenticated,
)
from oracle_server.state.binding import Binding
from oracle_server.state.credentials import hash_of
from oracle_server.state.node import Node
from oracle_server.state.principal import CALLER, Principal
from oracle_server.state.store import TenantRow

AddPack = Callable[..., Awaitable[str]]


async def issue(node: Node, secret: str, tenant: str = "acme", scope: str = "engine") -> int:
    return (await node.tenants.issue(tenant, scope, hash_of(secret), "")).number


async def test_a_tenant_lives_and_a_new_one_of_its_name_goes_on_counting(node: Node, tmp_path: Path) -> None:
    quota = TenantRow("acme", max_engines=2, max_steps_per_second=5, max_streams=3, over_rate="detach")
    assert await node.tenants.create(quota) == quota
    with pytest.raises(TenantExists, match="tenants/acme exists"):
        await node.tenants.create(TenantRow("acme"))
    assert await node.tenants.update(replace(quota, max_engines=9)) == await node.tenant("acme")
    assert [row.tenant for row in await node.tenants.page("", 10)] == ["acme", "default"]
    assert await issue(node, "one") == 1

    await node.tenants.delete("acme")
    with pytest.raises(TenantNotFound):
        await node.tenant("acme")
    with pytest.raises(TenantNotFound):
        await node.tenants.update(quota)
    with pytest.raises(Unauthenticated):
        node.credentials.find("Bearer one")
    await node.tenants.create(TenantRow("acme"))
    # A token's name is in histories: no other token ever has it.
    assert await issue(node, "two") == 2
    assert [(t.number, t.revoke_time_ns > 0) for t in await node.tenants.tokens("acme", 0, 10)] == [
        (1, True),
        (2, False),
    ]


async def test_a_tenant_with_experiments_or_packs_is_not_deleted_and_which_is_said(node: Node, digest: str) -> None:
    with pytest.raises(TenantInUse, match=f"experiments tenants/default/experiments/default and the packs {digest}"):
        await node.tenants.delete("default")
    await node.experiments.delete("tenants/default/experiments/default")
    with pytest.raises(TenantInUse, match=f"tenants/default has the packs {digest}"):
        await node.tenants.delete("default")
    await node.packs.delete("default", digest)
    await node.tenants.delete("default")
    with pytest.raises(TenantNotFound):
        await node.experiments.create("default", "late", Binding(default_pack_digest=digest))


@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "a" * 64, "ä", "a\n"])
async def test_a_tenant_id_that_cannot_be_in_a_name_is_refused(name: str, node: Node) -> None:
    with pytest.raises(InvalidArgument, match="allowed: 1 to 63"):
        await node.tenants.create(TenantRow(name))


async def test_two_tokens_of_a_scope_are_valid_at_once_and_the_third_is_refused(node: Node) -> None:
    await node.tenants.create(TenantRow("acme"))
    first = await issue(node, "a")
    await issue(node, "b")
    await issue(node, "c", scope="admin")
    with pytest.raises(QuotaExceeded, match="tokens/1, tenants/acme/tokens/2"):
        await issue(node, "d")
    assert {node.credentials.find(f"Bearer {secret}").name for secret in "abc"} == {
        f"tenants/acme/tokens/{number}" for number in (1, 2, 3)
    }
    revoked = await node.tenants.revoke("acme", first)
    assert await node.tenants.revoke("acme", first) == revoked
    assert await issue(node, "d") == 4
    with pytest.raises(TokenNotFound, match="no token tenants/acme/tokens/9"):
        await node.tenants.revoke("acme", 9)
    with pytest.raises(InvalidArgument, match="allowed: engine, admin"):
        await issue(node, "e", scope="operator")


@pytest.mark.parametrize("node", ["sqlite"], indirect=True)
async def test_no_secret_is_on_the_disk_and_tokens_survive_a_restart(node: Node, tmp_path: Path) -> None:
    await issue(node, "the-secret", tenant="default")
    await node.close()
    for path in (tmp_path / "state").rglob("*"):
        assert not path.is_file() or b"the-secret" not in path.read_bytes()
    with closing(sqlite3.connect(tmp_path / "state" / "oracle.db")) as db:
        assert db.execute("SELECT secret_sha256 FROM token").fetchone()[0] == hash_of("the-secret")
    again = Node(tmp_path / "state")
    await again.open((hash_of("operator"),))
    assert again.credentials.find("Bearer the-secret").tenant == "default"
    assert again.credentials.find("bearer operator").scope == "operator"
    # The fixture closes `node`; its store is closed already, so hand it the living one.
    node.close = again.close  # type: ignore[method-assign]


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic the", "the", "Bearer other", "Bearer the secret"])
async def test_what_is_no_valid_bearer_token_is_unauthenticated(header: str, node: Node) -> None:
    await issue(node, "the", tenant="default")
    with pytest.raises(Unauthenticated):
        node.credentials.find(header)


async def test_what_hangs_on_a_revoked_token_is_cancelled_once_and_nothing_else(node: Node) -> None:
    numbers = {secret: await issue(node, secret, tenant="default") for secret in ("old", "new")}
    ended: list[str] = []

    async def hold(secret: str) -> None:
        caller = node.credentials.find(f"Bearer {secret}")
        try:
            with node.credentials.holding(caller):
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            # What comes after is not disturbed by later changes.
            await issue(node, "newer", tenant="default")
            assert not node.credentials.is_valid(caller)
            ended.append(secret)
            raise

    held = {secret: asyncio.create_task(hold(secret)) for secret in numbers}
    await asyncio.sleep(0)
    await node.tenants.revoke("default", numbers["old"])
    await asyncio.wait([held["old"]])

    assert ended == ["old"]
    assert not held["new"].done()
    held["new"].cancel()
    await asyncio.wait(held.values())


async def test_a_token_revoked_before_its_call_began_holds_nothing(node: Node) -> None:
    number = await issue(node, "old", tenant="default")
    caller = node.credentials.find("Bearer old")
    await node.tenants.revoke("default", number)
    with pytest.raises(asyncio.CancelledError), node.credentials.holding(caller):
        pass


async def test_a_caller_sees_its_own_tenant_and_no_word_tells_others_from_absent(node: Node) -> None:
    await node.tenants.create(TenantRow("acme"))
    caller = CALLER.set(Principal("tenants/acme/tokens/1", "admin", "acme"))
    try:
        assert (await node.tenant("acme")).tenant == "acme"
        messages = []
        for other in ("default", "nobody0"):
            with pytest.raises(PermissionDenied) as caught:
                await node.tenant(other)
            messages.append(caught.value.message.replace(other, "X"))
        assert len(set(messages)) == 1
    finally:
        CALLER.reset(caller)


async def test_a_pack_two_tenants_have_survives_the_deletion_by_one_at_any_moment(
    node: Node, digest: str, tmp_path: Path
) -> None:
    """Also where the other deletes it between the check and the row: the deletion waits its turn."""
    await node.tenants.create(TenantRow("acme"))
    await node.experiments.delete("tenants/default/experiments/default")
    directory = tmp_path / "pack-10000000"
    checked = node.packs._files.check

    def check(upload: object) -> object:
        report = checked(upload)  # type: ignore[arg-type]
        deleting.append(asyncio.run_coroutine_threadsafe(node.packs.delete("default", digest), loop))
        return report

    deleting: list[Future[None]] = []
    loop = asyncio.get_running_loop()
    node.packs._files.check = check  # type: ignore[method-assign, assignment]
    async with node.packs.upload("acme", (directory / "manifest.json").read_bytes()) as upload:
        for entry in upload.manifest.files:
            await node.packs.write(upload, entry.name, (directory / entry.name).read_bytes())
        _, _, existed = await node.packs.keep("acme", upload, check_only=False)
    await asyncio.wrap_future(deleting[0])

    assert not existed
    assert await node.packs.find("default", digest) is None
    files = {name: data async for name, data in node.packs.read("acme", digest)}
    assert files == {path.name: path.read_bytes() for path in directory.iterdir()}
    live = await node.experiments.create("acme", "e", Binding(default_pack_digest=digest))
    assert live.snapshot.packs[digest].digest == digest


async def test_steps_of_an_experiment_that_is_there_do_not_wait_for_the_store(
    node: Node, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the database gone the control plane fails and the data plane does not notice."""

    async def fails(*_: object, **__: object) -> None:
        raise StoreFailed("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(node._records, "call", fails)
        await node.tenant_of("tenants/default/experiments/default")
        with pytest.raises(StoreFailed):
            await node.tenants.create(TenantRow("acme"))


async def test_a_tenant_of_calls_of_engines_ends_with_its_deletion(node: Node, add_pack: AddPack) -> None:
    name = "tenants/acme/experiments/e"
    with pytest.raises(TenantNotFound, match="tenants/acme"):
        await node.tenant_of(name)
    await node.tenants.create(TenantRow("acme"))
    # The experiment is told apart from the tenant: the caller looks it up.
    await node.tenant_of(name)
    await node.tenants.delete("acme")
    with pytest.raises(TenantNotFound, match="tenants/acme"):
        await node.tenant_of(name)


async def test_calls_of_engines_are_refused_another_tenants_experiment_that_is_there(node: Node, digest: str) -> None:
    reset = CALLER.set(Principal("tenants/acme/tokens/1", "engine", "acme"))
    try:
        with pytest.raises(PermissionDenied, match="tenants/default is named"):
            await node.tenant_of("tenants/default/experiments/default")
    finally:
        CALLER.reset(reset)
