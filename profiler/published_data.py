"""Fetches the published measurements from a mirror of the data folder; what counts is their SHA-256, not the host."""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

from oracle_server.errors import FailedPrecondition, InvalidArgument, Unavailable
from profiler.published_files import PUBLISHED_FILES, PublishedFile

_TIMEOUT_SECONDS = 60.0
_CHUNK_BYTES = 1 << 20


def files_below(prefix: str) -> tuple[PublishedFile, ...]:
    """Those whose path begins with `prefix`; raises InvalidArgument if there is none."""
    chosen = tuple(file for file in PUBLISHED_FILES if file.path.startswith(prefix))
    if not chosen:
        folders = ", ".join(sorted({file.path.split("/")[0] for file in PUBLISHED_FILES}))
        raise InvalidArgument(f"no published file begins with {prefix!r}; folders are {folders}", field="only")
    return chosen


def is_present(folder: Path, file: PublishedFile) -> bool:
    """Whether `folder` holds the file. Other bytes under its name are an error: they may be somebody's work."""
    path = folder / file.path
    if not path.exists():
        return False
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
            raise FailedPrecondition(f"{path} is there with other contents than were published; move it away")
    return True


def fetch(files: Sequence[PublishedFile], base_url: str, folder: Path) -> Iterator[PublishedFile]:
    """Fetch what `folder` does not hold yet from `base_url`/PATH; yields each file once it is there, complete.

    `base_url` is https, or http on this machine. A file appears under its name only with the bytes that were published.
    """
    _check_url(base_url)
    missing = [file for file in files if not is_present(folder, file)]
    local = urlsplit(base_url).scheme == "http"
    opener = urllib.request.build_opener(_SafeRedirects(), *([urllib.request.ProxyHandler({})] if local else []))
    for file in missing:
        _fetch_one(opener, f"{base_url.rstrip('/')}/{quote(file.path)}", folder / file.path, file)
        yield file


def _fetch_one(opener: urllib.request.OpenerDirector, url: str, path: Path, file: PublishedFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".partial") as partial:
        try:
            with opener.open(url, timeout=_TIMEOUT_SECONDS) as response:
                digest = _copy(response, partial.file, file.size_bytes)
        except urllib.error.HTTPError as error:
            raise Unavailable(f"{url}: {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{url}: {error}") from error
        if digest != file.sha256:
            raise FailedPrecondition(f"{url} is not what was published: SHA-256 {digest}, expected {file.sha256}")
        partial.file.flush()
        os.fsync(partial.file.fileno())
        Path(partial.name).chmod(0o644)
        # A link and not a rename: the name on disk is either free or refused, never replaced.
        try:
            os.link(partial.name, path)
        except FileExistsError:
            raise FailedPrecondition(f"{path} appeared meanwhile; run again") from None


def _copy(response: IO[bytes], target: IO[bytes], limit: int) -> str:
    """Copies at most one byte more than was published: the digest then tells, and a disk does not fill up."""
    digest = hashlib.sha256()
    left = limit + 1
    while left > 0 and (chunk := response.read(min(_CHUNK_BYTES, left))):
        digest.update(chunk)
        target.write(chunk)
        left -= len(chunk)
    return digest.hexdigest()


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where `base_url` could have pointed."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise InvalidArgument(f"{url!r} is no URL: {error}", field="base_url") from None
    if not host or parts.scheme not in ("http", "https") or (parts.scheme == "http" and not _is_loopback(host)):
        raise InvalidArgument(f"{url!r} is neither https:// nor http:// on this machine", field="base_url")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
