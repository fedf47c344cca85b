"""Every figure of the accuracy gates ends in one table, and in files and pictures where asked for."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accuracy.table import WIDTH, print_table
from gates import Gates, Record

# What each test measured, by its place in the session: processes run side by side, the table keeps the order.
_RECORDS = pytest.StashKey[dict[int, Record]]()
_WORKER_OUTPUT = "accuracy_records"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = {}


@pytest.fixture
def gates(request: pytest.FixtureRequest) -> Gates:
    """Where a test puts its figures, curves and points."""
    collected = Gates()
    place = request.session.items.index(request.node)
    request.config.stash[_RECORDS][place] = collected.record
    return collected


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    gates = getattr(item, "funcargs", {}).get("gates")
    if gates is not None:
        gates.assert_held()
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several hands what it measured to the one that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        records = session.config.stash[_RECORDS]
        output[_WORKER_OUTPUT] = json.dumps({place: record.document() for place, record in records.items()})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    output = getattr(node, "workeroutput", {}).get(_WORKER_OUTPUT, "{}")
    records = {int(place): Record.of(document) for place, document in json.loads(output).items()}
    node.config.stash[_RECORDS].update(records)


def pytest_terminal_summary(config: pytest.Config) -> None:
    record = Record()
    for _, part in sorted(config.stash[_RECORDS].items()):
        record.add(part)
    if not record.figures:
        return
    print_table(record.figures, Console(width=WIDTH))
    folder: Path | None = config.getoption("--accuracy-output")
    if folder is not None:
        from accuracy.files import write

        print("\n".join(["", *map(str, write(record, folder))]))
