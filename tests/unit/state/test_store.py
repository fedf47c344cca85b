"""The database keeps whole changes or none."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from oracle_server.errors import StoreFailed
from oracle_server.state.binding import Binding, LengthClass, LengthTable, Overlay, Rule
from oracle_server.state.store import EngineRow, GenerationRow, PackRow, Store, TenantRow

BINDING = Binding(
    rules=(Rule("sha256:a", {"k": "v"}, "m", 2, 0.25, "salt"),),
    default_pack_digest="sha256:b",
    seed=2**64 - 1,
    support_policy="refuse",
    length_table=LengthTable((LengthClass("", (0,), (1.0, 2.5), 2),), "trace"),
    draft_acceptance_rate=0.7,
    time_scale=0.1,
    overlays=(Overlay(1.5, {"a": "b"}),),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "oracle.db")


def test_a_new_database_has_the_default_tenant_without_limits(store: Store) -> None:
    assert store.tenants("", 10) == [TenantRow("default")]
    assert store.tenant("nobody") is None


def test_what_was_written_is_there_after_reopening(store: Store, tmp_path: Path) -> None:
    pack = PackRow("default", "sha256:a", b"{}", 17, 5)
    store.add_pack(pack)
    store.create_experiment("default", "e", BINDING, 6)
    store.add_generation("default", "e", GenerationRow(2, BINDING, 7, "activate"), {})
    store.close()
    again = Store.open(tmp_path / "oracle.db")
    assert again.packs("default", "", 10) == [pack]
    (row,) = again.experiments()
    assert (row.create_time_ns, row.current) == (6, GenerationRow(2, BINDING, 7, "activate"))
    assert again.generation("default", "e", 1) == GenerationRow(1, BINDING, 6, "create")


def test_a_write_that_fails_half_way_changes_nothing(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    store.attach_engine("default", "e", "x", "sha256:a")
    before = (store.experiments(), store.engine("default", "e", "x"))

    class Exploding(dict[str, str]):
        def items(self) -> object:  # type: ignore[override]
            raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(StoreFailed, match="disk I/O error; nothing was changed"):
        store.add_generation("default", "e", GenerationRow(2, BINDING, 2, "activate"), Exploding())
    assert (store.experiments(), store.engine("default", "e", "x")) == before
    assert store.generation("default", "e", 2) is None
    store.add_generation("default", "e", GenerationRow(2, BINDING, 2, "activate"), {"x": "sha256:b"})
    assert store.engine("default", "e", "x") == EngineRow(1, "sha256:b")


def test_a_generation_is_never_written_twice(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    with pytest.raises(StoreFailed):
        store.add_generation("default", "e", GenerationRow(1, Binding(), 2, "activate"), {})
    assert store.experiments()[0].current.binding == BINDING


def test_a_pack_of_no_tenant_is_refused(store: Store) -> None:
    with pytest.raises(StoreFailed, match="FOREIGN KEY"):
        store.add_pack(PackRow("nobody", "sha256:a", b"{}", 1, 1))
    assert store.digests() == set()


def test_a_name_goes_on_counting_after_a_deletion(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    store.add_generation("default", "e", GenerationRow(2, BINDING, 2, "activate"), {})
    store.delete_experiment("default", "e")
    assert store.experiments() == []
    assert store.create_experiment("default", "e", Binding(), 3).current.generation == 3
    assert [row.generation for row in store.generations_before("default", "e", 99, 10)] == [3]


def test_an_incarnation_grows_with_every_attach(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    assert [store.attach_engine("default", "e", "x", f"sha256:{i}") for i in range(3)] == [1, 2, 3]
    assert store.engine("default", "e", "x") == EngineRow(3, "sha256:2")
    assert store.attach_engine("default", "e", "y", "sha256:a") == 1


def test_history_is_read_in_both_directions(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    for generation in range(2, 6):
        store.add_generation("default", "e", GenerationRow(generation, BINDING, generation, "activate"), {})
    assert [r.generation for r in store.generations_before("default", "e", 5, 2)] == [4, 3]
    assert [r.generation for r in store.generations_after("default", "e", 2, 2)] == [3, 4]


def test_a_reader_sees_the_database_of_a_running_server(store: Store, tmp_path: Path) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    reader = Store.open(tmp_path / "oracle.db", read_only=True)
    assert len(reader.experiments()) == 1
    with pytest.raises(StoreFailed, match="readonly"):
        reader.delete_experiment("default", "e")
    reader.close()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "oracle.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreFailed, match="not a database"):
        Store.open(tmp_path / "oracle.db")
