"""A change once begun runs to its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from oracle_server.state.records import Records
from oracle_server.state.store import Store


async def test_a_change_outlives_its_caller(tmp_path: Path) -> None:
    """A client that hangs up between commit and flip must not leave memory behind disk."""
    records = Records(Store.open(tmp_path / "oracle.db"))
    begun, go = asyncio.Event(), asyncio.Event()
    done: list[str] = []

    async def change() -> None:
        begun.set()
        await go.wait()
        done.append("flipped")

    caller = asyncio.create_task(records.change(change()))
    await begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done == []
    go.set()
    await records.close()
    assert done == ["flipped"]


async def test_changes_never_overlap(tmp_path: Path) -> None:
    records = Records(Store.open(tmp_path / "oracle.db"))
    inside = 0

    async def change() -> None:
        nonlocal inside
        inside += 1
        assert inside == 1
        await records.call(records.store.digests)
        inside -= 1

    await asyncio.gather(*[records.change(change()) for _ in range(20)])
    await records.close()
