"""A real OCI registry on loopback (Debian's docker-registry), and one in front of it that lies on demand."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

import yaml  # type: ignore[import-untyped]

from debian_packages import program

USER, PASSWORD = "fleet", "secret"
_BCRYPT = "$2b$04$RDbmQEkVtp.qLlOAFq.8/O0NFbQZVMHyjyB5uzxa61fmELoYCfpe2"


class RegistryProcess:
    """A registry over a folder, at one port for its whole life. Owned by whoever made it; use as a context manager."""

    def __init__(self, folder: Path, *, with_credentials: bool = False, tls: tuple[Path, Path] | None = None) -> None:
        """`tls`: certificate and key."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        settings: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}, "delete": {"enabled": True}},
            "http": {"addr": f"127.0.0.1:{self.port}", "secret": "of a test"},
        }
        if tls is not None:
            settings["http"]["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}  # type: ignore[index]
        if with_credentials:
            (folder / "htpasswd").write_text(f"{USER}:{_BCRYPT}\n")
            settings["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
        (folder / "config.yml").write_text(yaml.safe_dump(settings))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RegistryProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def authority(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def storage(self) -> Path:
        """Where its blobs are."""
        return self._folder / "storage"

    def start(self) -> RegistryProcess:
        """Start it, again after an end, and wait until it takes connections."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("docker-registry", "docker-registry"), "serve", str(self._folder / "config.yml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # No variables of the machine: REGISTRY_* would be settings.
                env={"PATH": os.environ["PATH"], "HOME": str(self._folder)},
            )
        end = time.monotonic() + 20
        while time.monotonic() < end:
            assert self._process.poll() is None, (self._folder / "log").read_text()[-2000:]
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return self
        raise AssertionError("the registry takes no connections")

    def stop(self) -> None:
        """End it; no error if it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(10)

    def pause(self) -> None:
        """SIGSTOP: connections are taken and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def blob(self, digest: str) -> Path:
        """The file of a blob."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.storage / f"docker/registry/v2/blobs/sha256/{hexadecimal[:2]}/{hexadecimal}/data"

    def tags(self, repository: str) -> list[str]:
        """The tags it answers for; none where the repository was never there."""
        folder = self.storage / f"docker/registry/v2/repositories/{repository}/_manifests/tags"
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(tag for tag in found if self.ask("HEAD", f"/v2/{repository}/manifests/{tag}") == 200)

    def ask(self, method: str, path: str) -> int:
        """The status of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})
        status = connection.getresponse().status
        connection.close()
        return status

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


@dataclass(frozen=True)
class Reply:
    """An answer of the registry on its way to the client; `length`: what is announced, None for nothing."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    length: int | None

    def saying(self, body: bytes, length: int | None = -1) -> Reply:
        """Another body; -1: announced as long as it is."""
        return replace(self, body=body, length=len(body) if length == -1 else length)


def refusal(status: int, **headers: str) -> Reply:
    """An answer without the registry."""
    body = b'{"errors":[{"code":"UNKNOWN","message":"as the test says"}]}'
    return Reply(status, tuple((name.replace("_", "-"), value) for name, value in headers.items()), body, len(body))


@dataclass
class LyingRegistry:
    """Passes everything on to a registry; `lie(method, path, reply)` gives what the client gets instead."""

    behind: int
    lie: Callable[[str, str, Reply], Reply] = lambda method, path, reply: reply
    # (method, path, Authorization) of every request, in order.
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def __enter__(self) -> LyingRegistry:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.authority = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        liar = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                liar.asked.append((self.command, self.path, self.headers.get("Authorization", "")))
                connection = http.client.HTTPConnection("127.0.0.1", liar.behind, timeout=10)
                # With the client's Host, so that places are told by the liar's address.
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                data = response.read()
                length = response.headers.get("Content-Length")
                kept = tuple(
                    (name, value)
                    for name, value in response.getheaders()
                    if name not in ("Content-Length", "Transfer-Encoding", "Connection")
                )
                connection.close()
                reply = Reply(response.status, kept, data, None if length is None else int(length))
                reply = liar.lie(self.command, self.path, reply)
                self.send_response_only(reply.status)
                for name, value in reply.headers:
                    self.send_header(name, value)
                if reply.length is not None:
                    self.send_header("Content-Length", str(reply.length))
                self.end_headers()
                if self.command != "HEAD":
                    try:
                        self.wfile.write(reply.body)
                    except ConnectionError:
                        # The client has read enough.
                        pass
                self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815 - the library's names

        return Handler
