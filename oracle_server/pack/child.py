"""The child process that reads a pack: limits on itself first, then the check, then (asked to) the compiled arrays.

    python -m oracle_server.pack.child LIMITS DIRECTORY [OUT]

LIMITS is JSON {memory_bytes, cpu_seconds, output_bytes}. Prints one JSON object: {"digest", "manifest", "warnings",
"rows"} or {"error": {"kind", "message", "where"}}.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from oracle_server.errors import OracleError, PackInvalid, StoreFailed


def main(arguments: list[str]) -> int:
    """Entry point; the exit status is 0 whenever a report was printed."""
    limit_process(json.loads(arguments[0]))
    report = report_on(Path(arguments[1]), Path(arguments[2]) if len(arguments) > 2 else None)
    sys.stdout.write(json.dumps(report))
    return 0


def report_on(directory: Path, out: Path | None = None) -> dict[str, Any]:
    """The report on a pack, as this process prints it."""
    try:
        return _inspect(directory, out)
    except MemoryError:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0] >> 20
        return _failure("PackInvalid", f"reading it needs more than {limit} MiB of memory, the limit", "")
    except OracleError as error:
        return _failure(type(error).__name__, error.message, getattr(error, "where", ""))


def limit_process(limits: dict[str, int]) -> None:
    """Limit this process; it cannot be undone."""
    for kind, amount, grace in (
        (resource.RLIMIT_AS, limits["memory_bytes"], 0),
        (resource.RLIMIT_CPU, limits["cpu_seconds"], 1),
        (resource.RLIMIT_FSIZE, limits["output_bytes"], 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, hard = resource.getrlimit(kind)
        most = amount + grace if hard == resource.RLIM_INFINITY else min(amount + grace, hard)
        resource.setrlimit(kind, (min(amount, most), most))


def _inspect(directory: Path, out: Path | None) -> dict[str, Any]:
    # Imported under the limits already set.
    from oracle_server.pack import compile as compiling
    from oracle_server.pack.columns import check_columns
    from oracle_server.pack.durable import read_regular_file
    from oracle_server.pack.manifest import (
        MANIFEST_BYTES_LIMIT,
        MANIFEST_FILE,
        digest_of,
        parse_manifest,
        unknown_fields,
    )
    from oracle_server.pack.reader import read_files

    if not directory.is_dir():
        raise PackInvalid(f"{directory} is not a directory", where=directory.name)
    manifest_json = read_regular_file(directory / MANIFEST_FILE, MANIFEST_BYTES_LIMIT)
    manifest = parse_manifest(manifest_json)
    digest = digest_of(manifest_json)
    files = read_files(directory, manifest)
    warnings = [*check_columns(manifest, files)]
    arrays = compiling.build_arrays(manifest, files)
    warnings += [
        f"{MANIFEST_FILE}: unknown field {name[:80]!r} is kept and ignored" for name in unknown_fields(manifest_json)
    ]
    known = {MANIFEST_FILE, *files}
    warnings += [
        f"{path.name} is not named by the manifest and is ignored"
        for path in directory.iterdir()
        if path.name not in known
    ]
    if out is not None:
        try:
            compiling.write_arrays(out, digest, manifest_json, arrays)
        except OSError as error:
            raise StoreFailed(f"the compiled pack could not be written to {out.parent}: {error}") from None
    return {
        "digest": digest,
        "manifest": manifest_json.decode(),
        "warnings": sorted(warnings)[:100],
        "rows": {file.name: file.rows for file in manifest.files},
    }


def _failure(kind: str, message: str, where: str) -> dict[str, Any]:
    return {"error": {"kind": kind, "message": message, "where": where}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
