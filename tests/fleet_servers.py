"""Real servers that share a PostgreSQL and a folder of packs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from oracle_process import OracleProcess
from postgres_server import file_of


class FleetServers:
    """Servers of one fleet over a folder: `a`, `b`, ... Owned by whoever made it; use as a context manager."""

    def __init__(self, url: str, folder: Path, number: int = 2, *, arguments: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database = file_of(url, folder / "database")
        shared = ("--database", str(self.database), "--pack-folder", str(folder / "packs"))
        names = "abcdefgh"[:number]
        self.processes = [OracleProcess(folder / name, arguments=(*shared, *arguments)) for name in names]

    def __enter__(self) -> FleetServers:
        for process in self.processes:
            process.start(wait=False)
        for process in self.processes:
            process.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.stop()

    @property
    def targets(self) -> tuple[str, ...]:
        """The first address of each."""
        return tuple(process.target for process in self.processes)
