"""Requests to one OCI registry: oras-py for its names, uploads and tokens, with bounds that it does not have.

oras 0.2.43 by itself waits without limit, repeats a failed request for two minutes, reads ~/.docker/config.json and the
helper programs it names, follows an upload to any host with the credentials, and takes whatever bytes a blob has. Here
a request has a time limit and is made once; credentials come from one file and go to this registry, and to the token
service it names by https, alone; what is read has a limit of bytes. Digests are the reader's business.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from oras.auth.utils import parse_auth_header
from oras.container import Container
from oras.provider import Registry
from oras.utils import append_url_params
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from oracle_server.errors import PackRegistryUnavailable, StoreFailed

CONNECT_SECONDS = 5.0
# Between two pieces of an answer. A registry writes a blob to its storage before it answers.
READ_SECONDS = 10.0
# From the first byte to the last of all requests of one push or fetch.
TOTAL_SECONDS = 300.0
ANSWER_BYTES = 256 << 10
_CHUNK_BYTES = 1 << 18
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
_CREDENTIALS_BYTES = 4096


class Transport(Registry):  # type: ignore[misc]  # oras has no types
    """One push, fetch or deletion: made for it and closed after it, on one thread.

    A subclass because everything oras asks a registry goes through `do_request`. Every method raises
    PackRegistryUnavailable where the registry cannot be asked now, StoreFailed where it refuses for good.
    """

    def __init__(
        self,
        authority: str,
        *,
        plaintext: bool,
        credentials: Path | None,
        ca: Path | None,
        monotonic: Callable[[], float],
        is_closing: Callable[[], bool],
    ) -> None:
        super().__init__(hostname=authority, insecure=plaintext, tls_verify=True if ca is None else str(ca))
        # Neither proxies nor .netrc nor REQUESTS_CA_BUNDLE: what is used is what was configured.
        self.session.trust_env = False
        self._authority = authority
        self._plaintext = plaintext
        self._credentials_file = credentials
        self._credentials = _read_credentials(credentials)
        _check_ca(ca)
        self._authorization = ""
        self._monotonic = monotonic
        self._end = monotonic() + TOTAL_SECONDS
        self._is_closing = is_closing
        for scheme in ("https://", "http://"):
            self.session.mount(scheme, _BoundedAdapter(self.check_time))

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.close()

    def check_time(self) -> None:
        """PackRegistryUnavailable where all of it takes too long, or the process is stopping."""
        if self._monotonic() > self._end:
            raise self.unavailable(f"did not get to an end within {TOTAL_SECONDS:g} s")
        if self._is_closing():
            raise self.unavailable("is asked no more, the server is stopping")

    def do_request(
        self,
        url: str,
        method: str = "GET",
        data: Any = None,
        headers: dict[str, str] | None = None,
        json: Any = None,
        stream: bool = False,
    ) -> requests.Response:
        """One request, once more with credentials where the registry asks for them. Its status is the caller's."""
        if not self._is_here(url):
            raise StoreFailed(f"the registry {self._authority} points to {_shown(url)} for an upload; not followed")
        headers = {**(headers or {}), "Accept-Encoding": "identity"}
        response = self._send(method, url, data, headers, json, stream)
        if response.status_code == 401 and self._authenticate(response):
            if hasattr(data, "seek"):
                data.seek(0)
            response = self._send(method, url, data, headers, json, stream)
        if response.status_code in (401, 403):
            given = f"those in {self._credentials_file}" if self._credentials_file else "give a file of credentials"
            raise self.unavailable(f"refuses the credentials ({_said(response)}); check {given}", answered=True)
        if response.status_code == 429 or response.status_code >= 500:
            raise self.unavailable(f"answers {_said(response)}")
        return response

    def put_upload(self, blob: str, container: Container, layer: dict[str, Any]) -> requests.Response:
        """As oras has it, but a file is sent as it is read, not held in memory."""
        with Path(blob).open("rb") as file:
            return self.put_blob(file, container, layer)

    def put_blob(self, data: Any, container: Container, layer: dict[str, Any]) -> requests.Response:
        """Upload bytes, or an open file, in one piece."""
        begun = self.do_request(
            f"{self.prefix}://{container.upload_blob_url()}", "POST", headers={"Content-Length": "0"}
        )
        self.expect(begun, 202)
        place = self._follow(f"{self.prefix}://{self._authority}/", begun)
        headers = {"Content-Length": str(layer["size"]), "Content-Type": "application/octet-stream"}
        return self.do_request(append_url_params(place, {"digest": layer["digest"]}), "PUT", data, headers)

    def expect(self, response: requests.Response, *allowed: int) -> None:
        """StoreFailed unless the registry answered with one of these."""
        if response.status_code not in allowed:
            raise StoreFailed(
                f"the registry {self._authority} refuses {response.request.method} {_shown(response.url or '')}: "
                f"{_said(response)}; nothing was changed"
            )

    def read(self, response: requests.Response) -> Iterator[bytes]:
        """The body of an answer that was asked for with `stream`, in pieces, within the time there is."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise StoreFailed(f"the registry {self._authority} sends an encoded body that was not asked for")
        try:
            for piece in response.iter_content(_CHUNK_BYTES):
                self.check_time()
                yield piece
        except (requests.RequestException, HTTPError) as error:
            raise self.unavailable(f"broke off its answer ({_why(error)})") from error

    def unavailable(self, what: str, *, answered: bool = False) -> PackRegistryUnavailable:
        """The error, in words: `what` follows "the registry HOST:PORT"."""
        return PackRegistryUnavailable(
            f"the registry {self._authority} {what}; retry later, nothing was changed", answered=answered
        )

    def _send(
        self, method: str, url: str, data: Any, headers: dict[str, str], json: Any, stream: bool
    ) -> requests.Response:
        sent = {**headers, **({"Authorization": self._authorization} if self._authorization else {})}
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                response: requests.Response = self.session.request(
                    method, url, data=data, headers=sent, json=json, stream=stream, verify=self._tls_verify,
                    allow_redirects=False,
                )  # fmt: skip
            except (OSError, ValueError) as error:
                # requests' own errors are OSErrors; a place to go to that is no URL is a ValueError.
                raise self.unavailable(f"cannot be asked ({_why(error)})") from error
            if method not in ("GET", "HEAD") or response.status_code not in _REDIRECTS:
                return response
            # To the storage behind the registry, which gets no credentials.
            url = self._follow(url, response)
            if urlsplit(url).scheme != "https" and not (self._plaintext and self._is_here(url)):
                raise StoreFailed(f"the registry {self._authority} redirects to {_shown(url)}; only https is followed")
            sent = headers
        raise StoreFailed(f"the registry {self._authority} redirects more than {_MAX_REDIRECTS} times")

    def _follow(self, url: str, response: requests.Response) -> str:
        """Where the answer to a request of `url` points to."""
        location = response.headers.get("Location", "")
        try:
            return urljoin(url, location)
        except ValueError as error:
            raise StoreFailed(
                f"the registry {self._authority} points to {location[:100]!r}, which is no URL"
            ) from error

    def _is_here(self, url: str) -> bool:
        """True for a URL of this registry, its port given or left out."""
        own = urlsplit(f"//{self._authority}")
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            return False
        return (parts.scheme, parts.hostname, port) == (self.prefix, own.hostname, own.port)

    def _authenticate(self, response: requests.Response) -> bool:
        """True where there is now something to present: asked of the token service, or the credentials themselves."""
        challenge = response.headers.get("WWW-Authenticate", "")
        if challenge.lower().startswith("basic"):
            if not self._credentials:
                return False
            self._authorization = f"Basic {self._credentials}"
            return True
        realm = parse_auth_header(challenge).realm or ""
        if not realm.startswith("https://") and not (self._plaintext and self._is_here(realm)):
            service = _shown(realm) or "(none)"
            raise self.unavailable(f"names the token service {service}; only one by https is asked", answered=True)
        # Each challenge has its own scope: a token that may pull may not push.
        self.auth.token = None
        if self._credentials:
            self.auth._basic_auth = self._credentials
        try:
            headers, changed = self.auth.authenticate_request(response, {})
        except OSError as error:
            raise self.unavailable(f"has a token service that cannot be asked ({_why(error)})") from error
        except PackRegistryUnavailable:
            raise
        except Exception as error:
            raise self.unavailable(f"has a token service that gave no token ({type(error).__name__})") from error
        self._authorization = str(headers.get("Authorization", ""))
        return bool(changed)


class _BoundedAdapter(HTTPAdapter):
    """Gives every request a time limit, and what is not streamed a limit of bytes."""

    def __init__(self, check_time: Callable[[], None]) -> None:
        super().__init__()
        self._check_time = check_time

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: Any = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        self._check_time()
        response = super().send(request, stream, (CONNECT_SECONDS, READ_SECONDS), verify, cert, proxies)
        if not stream:
            body = b""
            try:
                for piece in response.iter_content(_CHUNK_BYTES):
                    body += piece
                    if len(body) > ANSWER_BYTES:
                        raise requests.RequestException(f"an answer of more than {ANSWER_BYTES} bytes")
                    self._check_time()
            finally:
                response.close()
            response._content = body
        return response


def _read_credentials(path: Path | None) -> str:
    """The one line USER:PASSWORD of a file, as HTTP carries it; empty without a file."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            line = file.read(_CREDENTIALS_BYTES).strip()
    except OSError as error:
        raise PackRegistryUnavailable(f"the registry's credentials {path} cannot be read: {error.strerror}") from error
    user, separator, _ = line.partition(b":")
    if not user or not separator or b"\n" in line:
        raise PackRegistryUnavailable(f"the registry's credentials {path} are not one line USER:PASSWORD")
    return base64.b64encode(line).decode()


def _check_ca(path: Path | None) -> None:
    if path is None:
        return
    try:
        ssl.create_default_context(cafile=str(path))
    except OSError as error:
        # SSLError is one too.
        raise PackRegistryUnavailable(
            f"the CA of the registry {path} cannot be used: {error.strerror or error}; give a PEM file"
        ) from error


def _said(response: requests.Response) -> str:
    """Status and what the registry says, short; its words are a stranger's."""
    words = response._content
    if not isinstance(words, bytes):
        # It was to be streamed, and may have no end.
        try:
            words = next(response.iter_content(200), b"")
        except requests.RequestException:
            words = b""
    text = words[:200].decode(errors="replace")
    return f"{response.status_code} {''.join(c if c.isprintable() else ' ' for c in text)}".strip()


def _why(error: Exception) -> str:
    """The innermost reason, short."""
    text = str(error)
    return f"{type(error).__name__}: {text[-200:]}"


def _shown(url: str) -> str:
    """A URL without its query, which may hold a signature."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(no URL)"
    return f"{parts.scheme}://{parts.netloc}{parts.path}"[:300] if parts.netloc else ""
