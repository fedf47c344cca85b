"""Checks and compiles packs in a limited child process: what `check` does is what the server does with an upload."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from oracle_server.errors import OracleError, PackDigestMismatch, PackInvalid, StoreFailed
from oracle_server.pack.durable import partial_directory, publish, sync_directory
from oracle_server.pack.load import load_compiled
from oracle_server.pack.manifest import Manifest, parse_manifest


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may use. The defaults hold a pack of the largest allowed size; README.md says how that was
    measured."""

    memory_bytes: int = 3 << 30
    cpu_seconds: int = 60
    wall_seconds: float = 300.0
    # Per written file.
    output_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class PackReport:
    """A pack that the server takes."""

    digest: str
    manifest: Manifest
    # What a careful reader should know, one sentence each.
    warnings: tuple[str, ...]
    # File name -> rows.
    rows: Mapping[str, int]


_ERRORS: Final[dict[str, type[PackInvalid]]] = {"PackInvalid": PackInvalid, "PackDigestMismatch": PackDigestMismatch}
# One thread and the C library's allocator: address space is limited, so none may be reserved in advance.
_ENVIRONMENT: Final = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "ARROW_IO_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def check_pack(directory: Path, limits: Limits = Limits()) -> PackReport:
    """Read and check a whole pack; raises PackInvalid or PackDigestMismatch naming file, column, row or manifest
    field."""
    return _run_child(limits, directory, None)


def compile_pack(directory: Path, out: Path, limits: Limits = Limits()) -> PackReport:
    """Check a pack and write its arrays to the directory `out`, which appears whole or not at all.

    If `out` holds the same pack in the present layout already it is left as it is; anything else there is replaced.
    Raises as `check_pack` does, and StoreFailed where the disk refuses.
    """
    try:
        with partial_directory(out) as partial:
            report = _run_child(limits, directory, partial)
            if not _is_current(out, report.digest):
                try:
                    _replace(partial, out)
                except OSError:
                    # Two may compile one pack at once; the second finds the work done.
                    if not _is_current(out, report.digest):
                        raise
            return report
    except OSError as error:
        raise StoreFailed(f"the compiled pack could not be written to {out.parent}: {error}") from error


def _is_current(out: Path, digest: str) -> bool:
    try:
        return load_compiled(out).digest == digest
    except PackInvalid:
        return False


def _replace(partial: Path, out: Path) -> None:
    if out.exists():
        # Mapped files of the old directory live on until their last reader is gone.
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        out.rename(old / out.name)
        publish(partial, out)
        shutil.rmtree(old, ignore_errors=True)
        sync_directory(out.parent)
    else:
        publish(partial, out)


def _run_child(limits: Limits, directory: Path, out: Path | None) -> PackReport:
    own = {"memory_bytes": limits.memory_bytes, "cpu_seconds": limits.cpu_seconds, "output_bytes": limits.output_bytes}
    command = [sys.executable, "-P", "-m", "oracle_server.pack.child", json.dumps(own), str(directory.absolute())]
    if out is not None:
        command.append(str(out.absolute()))
    try:
        # No preexec_fn: it is not safe in a process with threads; the child limits itself before it reads anything.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, **_ENVIRONMENT},
            timeout=limits.wall_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PackInvalid(
            f"reading it did not end within {limits.wall_seconds:g} seconds", where=directory.name
        ) from None
    if done.returncode != 0:
        raise PackInvalid(_death(done.returncode, done.stderr, limits), where=directory.name)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
        if "error" in report:
            raise _error(report["error"], directory)
        return PackReport(
            report["digest"], parse_manifest(report["manifest"].encode()), tuple(report["warnings"]), report["rows"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise PackInvalid(f"the process that read it gave no report ({error!r})", where=directory.name) from None


def _death(status: int, stderr: bytes, limits: Limits) -> str:
    """Why a child ended without a report."""
    if status == -signal.SIGXCPU:
        return f"reading it needs more than {limits.cpu_seconds} seconds of CPU time, the limit"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = str(-status)
        return (
            f"the process that read it was ended by signal {name} (limits: {limits.memory_bytes >> 20} MiB of memory)"
        )
    last = stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
    return f"the process that read it failed with status {status}: {last}"


def _error(error: dict[str, str], directory: Path) -> OracleError:
    if error["kind"] == "StoreFailed":
        return StoreFailed(error["message"])
    kind = _ERRORS.get(error["kind"], PackInvalid)
    return kind(error["message"], where=error["where"] or directory.name)
