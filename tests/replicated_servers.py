"""Several identical servers as engines see replicas: one target, alike answers.

They share a PostgreSQL and a folder of packs. Or each has a folder of its own, and what has to be the same in all of
them is done to each in the same order: then one can be made to lag.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from oracle_calls import EXPERIMENT, Calls
from oracle_process import OracleProcess
from oracle_server.rpc.recompute import Report, recompute_from
from postgres_server import file_of

_CALLS = re.compile(r"^step_oracle_rpc_total\{(?P<labels>[^}]*)\} (?P<count>\S+)$", re.MULTILINE)


class ReplicatedServers:
    """Owned by the test that made them; use as a context manager."""

    def __init__(self, folder: Path, count: int, *, arguments: Sequence[str] = (), database_url: str = "") -> None:
        """`database_url`: of the PostgreSQL they share; empty: each has its own state."""
        folder.mkdir(parents=True, exist_ok=True)
        self._database = file_of(database_url, folder / "database") if database_url else None
        if self._database is not None:
            shared = ("--database", str(self._database), "--pack-folder", str(folder / "packs"))
            arguments = (*shared, *arguments)
        self.servers = [
            OracleProcess(folder / f"replica-{number}", metrics="127.0.0.1:0", arguments=arguments)
            for number in range(count)
        ]

    def __enter__(self) -> ReplicatedServers:
        with ExitStack() as stack:
            for server in self.servers:
                stack.callback(server.stop)
                server.start(wait=False)
            for server in self.servers:
                server.wait_ready()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self.servers:
            server.stop()

    @property
    def target(self) -> str:
        """All of them, for an engine."""
        return ",".join(server.target for server in self.servers)

    def create(self, pack: Path, experiment_id: str = "default", **binding: Any) -> None:
        """The same experiment in each."""
        for server in self.servers[: 1 if self._database else None]:
            with Calls(server.target) as calls:
                calls.create(calls.upload(pack), experiment_id, **binding)

    def recompute(self, traces: Path) -> Report:
        """What the answers in a folder of traces are by the history that the first has."""
        return recompute_from(self.servers[0].state_dir, sorted(traces.iterdir()), self._database)

    def activate(self, number: int, digest: str, name: str = EXPERIMENT, **binding: Any) -> None:
        """The next generation in one of them: the others lag until they have it too."""
        with Calls(self.servers[number].target) as calls:
            calls.activate(digest, name, **binding)


def stream_ends(server: OracleProcess) -> dict[str, int]:
    """How many streams of a server ended, by reason, or by code where there is none ("OK")."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(server.metrics_url, timeout=10).read().decode()
    ends: dict[str, int] = {}
    for found in _CALLS.finditer(text):
        labels = dict(pair.split("=", 1) for pair in found["labels"].replace('"', "").split(","))
        if labels["method"] == "StreamSteps":
            why = labels.get("reason") or labels["code"]
            ends[why] = ends.get(why, 0) + int(float(found["count"]))
    return ends
