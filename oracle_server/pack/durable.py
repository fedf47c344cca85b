"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from oracle_server.errors import PackInvalid

_SUFFIX: Final = ".partial"


@contextmanager
def partial_directory(target: Path) -> Iterator[Path]:
    """A new directory beside `target` that is removed if the block fails. `publish` turns it into `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent))
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, target: Path) -> None:
    """Make `partial`, whose files are synced already, durable under the name `target`, which must not exist."""
    partial.chmod(0o755)
    sync_directory(partial)
    partial.rename(target)
    sync_directory(target.parent)


def remove_partial_directories(parent: Path) -> int:
    """Remove what a crash left in `parent`; only while nobody writes there. Returns how many."""
    left = [path for path in parent.glob(f".*{_SUFFIX}") if path.is_dir() and not path.is_symlink()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return len(left)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and its bytes to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular_file(path: Path, limit: int) -> bytes:
    """Bytes of a regular file, which is no link and has at most `limit` bytes; raises PackInvalid."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PackInvalid(f"cannot be opened: {error.strerror} (links are not followed)", where=path.name) from None
    # fdopen takes no directory, so the kind comes first.
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise PackInvalid("not a regular file", where=path.name)
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise PackInvalid(f"{status.st_size} bytes; at most {limit} are allowed", where=path.name)
        data = file.read(limit + 1)
    if len(data) > limit:
        raise PackInvalid(f"more than {limit} bytes", where=path.name)
    return data
