"""The database keeps whole changes or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from oracle_server.errors import ExperimentExists, GenerationConflict, StoreFailed
from oracle_server.state.binding import Binding, LengthClass, LengthTable, Overlay, Rule
from oracle_server.state.postgres_database import PostgresDatabase
from oracle_server.state.store import EnginePlace, EngineRow, GenerationRow, PackRow, Store, TenantRow
from postgres_server import PostgresServer

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


OpenStore = Callable[[], Store]


@pytest.fixture(params=["sqlite", "postgres"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the same database at each call: a file, or one of a PostgreSQL."""
    opened: list[Store] = []
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.new_database()

    def open_it() -> Store:
        if request.param == "sqlite":
            opened.append(Store.open(tmp_path / "oracle.db"))
        else:
            opened.append(Store(PostgresDatabase(lambda: url, alone=False)))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> Store:
    return open_store()


def test_a_new_database_has_the_default_tenant_without_limits(store: Store) -> None:
    assert store.tenants("", 10) == [TenantRow("default")]
    assert store.tenant("nobody") is None


def test_what_was_written_is_there_after_reopening(store: Store, open_store: OpenStore) -> None:
    pack = PackRow("default", "sha256:a", b"{}", 17, 5)
    store.add_pack(pack)
    store.create_experiment("default", "e", BINDING, 6)
    store.add_generation("default", "e", GenerationRow(2, BINDING, 7, "activate"), {})
    store.close()
    again = open_store()
    assert again.packs("default", "", 10) == [pack]
    (row,) = again.experiments()
    assert (row.create_time_ns, row.current) == (6, GenerationRow(2, BINDING, 7, "activate"))
    assert again.generation("default", "e", 1) == GenerationRow(1, BINDING, 6, "create")


def test_packs_that_a_tenant_lacks_are_named_in_their_order(store: Store) -> None:
    store.write_tenant(TenantRow("acme"))
    digests = [f"sha256:{number}" for number in range(1200)]
    for digest in (digests[0], digests[499], digests[500], digests[1199]):
        store.add_pack(PackRow("default", digest, b"{}", 1, 1))
    store.add_pack(PackRow("acme", digests[7], b"{}", 1, 1))
    here = {0, 499, 500, 1199}
    assert store.lacking("default", digests) == [each for number, each in enumerate(digests) if number not in here]
    assert store.lacking("default", [digests[500]]) == store.lacking("default", []) == []


def test_a_write_that_fails_half_way_changes_nothing(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    store.attach_engine("default", "e", "x", "sha256:a")
    before = (store.experiments(), store.engine("default", "e", "x"))

    class Exploding(dict[str, str]):
        def items(self) -> object:  # type: ignore[override]
            raise StoreFailed("disk I/O error")

    with pytest.raises(StoreFailed, match="disk I/O error"):
        store.add_generation("default", "e", GenerationRow(2, BINDING, 2, "activate"), Exploding())
    assert (store.experiments(), store.engine("default", "e", "x")) == before
    assert store.generation("default", "e", 2) is None
    store.add_generation("default", "e", GenerationRow(2, BINDING, 2, "activate"), {"x": "sha256:b"})
    assert store.engine("default", "e", "x") == EngineRow(1, "sha256:b")


def test_a_generation_is_never_written_twice(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    for generation in (1, 3):
        with pytest.raises(GenerationConflict, match="is not the current one"):
            store.add_generation("default", "e", GenerationRow(generation, Binding(), 2, "activate"), {})
    assert store.experiments()[0].current.binding == BINDING


def test_a_pack_of_no_tenant_is_refused(store: Store) -> None:
    with pytest.raises(StoreFailed, match=r"(?i)foreign key.*; nothing was changed"):
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


def test_a_reader_sees_the_database_of_a_running_server(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "oracle.db")
    store.create_experiment("default", "e", BINDING, 1)
    reader = Store.open(tmp_path / "oracle.db", read_only=True)
    assert len(reader.experiments()) == 1
    with pytest.raises(StoreFailed, match="readonly"):
        reader.delete_experiment("default", "e")
    reader.close()
    store.close()


def test_a_living_experiment_is_not_created_over(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    with pytest.raises(ExperimentExists, match="tenants/default/experiments/e exists"):
        store.create_experiment("default", "e", Binding(), 2)
    assert store.experiments()[0].current == GenerationRow(1, BINDING, 1, "create")


def test_names_are_in_the_order_of_their_bytes(store: Store) -> None:
    for tenant in ("b", "a-b", "ab", "a0"):
        store.write_tenant(TenantRow(tenant))
    assert [row.tenant for row in store.tenants("", 10)] == ["a-b", "a0", "ab", "b", "default"]
    assert [row.tenant for row in store.tenants("a0", 1)] == ["ab"]


def test_who_knows_a_revision_reads_what_is_newer_and_nothing_else(store: Store) -> None:
    store.write_tenant(TenantRow("a"))
    store.create_experiment("a", "old", BINDING, 1)
    before = store.revision()
    assert store.changes_after(before).revision == before
    assert not store.changes_after(before).tenants

    store.write_tenant(TenantRow("b", max_engines=3))
    store.create_experiment("a", "new", BINDING, 2)
    store.create_experiment("a", "gone", BINDING, 3)
    store.delete_experiment("a", "gone")
    store.attach_engine("a", "new", "x", "sha256:a", "here", b"who")
    token = store.add_token("b", "engine", b"h" * 32, "", 4)
    changes = store.changes_after(before)

    assert changes.revision == store.revision() == before + 6
    assert changes.tenants == (TenantRow("b", max_engines=3),)
    assert changes.tokens == (token,)
    assert [row.experiment for row in changes.experiments] == ["new"]
    assert changes.deleted_experiments == (("a", "gone"),)
    assert changes.engines == (EnginePlace("a", "new", "x", 1, "sha256:a", "here", b"who", before + 5),)
    assert {row.experiment for row in store.changes_after(-1).experiments} == {"old", "new"}
    store.delete_tenant("b", 5)
    assert store.changes_after(changes.revision).deleted_tenants == ("b",)
    assert [t.revoke_time_ns for t in store.changes_after(changes.revision).tokens] == [5]


def test_what_fails_counts_no_revision(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    before = store.revision()
    with pytest.raises(GenerationConflict):
        store.add_generation("default", "e", GenerationRow(7, BINDING, 2, "activate"), {})
    assert store.revision() == before


def test_an_older_incarnation_never_replaces_a_newer_one(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    for _ in range(3):
        store.attach_engine("default", "e", "x", "sha256:a", "here", b"1")
    store.accept_engine("default", "e", "x", EngineRow(2, "sha256:b"))
    assert store.engine("default", "e", "x") == EngineRow(3, "sha256:a")
    store.accept_engine("default", "e", "x", EngineRow(3, "sha256:b"))
    assert store.engine("default", "e", "x") == EngineRow(3, "sha256:b")


def test_a_server_that_lost_an_engine_late_does_not_take_it_from_the_one_that_has_it(store: Store) -> None:
    store.create_experiment("default", "e", BINDING, 1)
    store.attach_engine("default", "e", "x", "sha256:a", "first", b"attached")
    key = ("default", "e", "x", 1, "sha256:a")
    store.place_engines([EnginePlace(*key, "second", b"stream")], [])
    store.place_engines([], [EnginePlace(*key, "first", b"")])
    (place,) = store.changes_after(0).engines
    assert (place.server, place.presence) == ("second", b"stream")
    store.place_engines([EnginePlace("default", "e", "x", 2, "sha256:a", "third", b"of another life")], [])
    assert store.changes_after(0).engines[0].server == "second"
    store.place_engines([], [EnginePlace(*key, "second", b"")])
    assert store.changes_after(0).engines[0].presence == b""


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "oracle.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreFailed, match="not a database"):
        Store.open(tmp_path / "oracle.db")
