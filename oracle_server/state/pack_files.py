"""Where packs lie: packs/<hex> as uploaded, compiled/<hex> for mapping, incoming/<random> while they arrive.

A folder counts only if the database has a row for its digest; everything else is left over from a crash and removed at
the next start. The row is written last and deleted first.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oracle_server import pack as packs
from oracle_server.errors import (
    InvalidArgument,
    OracleError,
    PackDigestMismatch,
    PackInvalid,
    QuotaExceeded,
    StoreFailed,
)
from oracle_server.state.snapshot import LoadedPack

PACKS = "packs"
COMPILED = "compiled"
INCOMING = "incoming"

# Packs that stay mapped without an experiment that answers from them.
RECENT = 4

MAX_CHUNK_BYTES = 1 << 20
MAX_PACK_BYTES = 512 << 20


class PackFiles:
    """Owns the three folders. Blocking calls; safe on any thread, one writer per digest (the caller sees to that)."""

    def __init__(self, state_dir: Path) -> None:
        self._packs = state_dir / PACKS
        self._compiled = state_dir / COMPILED
        self._incoming = state_dir / INCOMING
        self._loaded: weakref.WeakValueDictionary[str, LoadedPack] = weakref.WeakValueDictionary()
        # The last ones asked for, the newest at the end: going back to one is then no load.
        self._recent: dict[str, LoadedPack] = {}
        self._recent_lock = threading.Lock()

    def prepare(self, digests: set[str], *, may_lack: bool = False) -> list[str]:
        """Remove what a crash left, compile what is not compiled or of an older layout; the digests compiled anew.

        `may_lack`: packs that are not here, or damaged, can be brought from elsewhere, so they are no error.
        """
        for folder in (self._packs, self._compiled, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        kept = {folder_of(digest) for digest in digests}
        for folder in (self._packs, self._compiled, self._incoming):
            for entry in folder.iterdir():
                if folder is self._incoming or entry.name not in kept:
                    _remove(entry)
        compiled = []
        for digest in sorted(digests):
            if may_lack and not self.place(digest).exists():
                _remove(self._compiled / folder_of(digest))
                continue
            try:
                if self._ensure_compiled(digest):
                    compiled.append(digest)
            except _Damaged:
                if not may_lack:
                    raise
                self.remove(digest)
        return compiled

    def has(self, digest: str) -> bool:
        """True where the pack is here, as it came and for mapping: both folders appear whole or not at all."""
        return self.place(digest).exists() and (self._compiled / folder_of(digest)).exists()

    def place(self, digest: str) -> Path:
        """The folder of a pack as it came; `has` says whether it is here."""
        return self._packs / folder_of(digest)

    def make_room(self) -> Path:
        """An empty folder for a pack that is about to arrive whole."""
        with disk_failures():
            directory = self._incoming / uuid.uuid4().hex
            directory.mkdir()
        return directory

    def begin(self, manifest_bytes: bytes) -> Upload:
        """A place for the files of a pack that is about to arrive; PackInvalid, QuotaExceeded."""
        if len(manifest_bytes) > packs.MANIFEST_BYTES_LIMIT:
            raise QuotaExceeded(f"the manifest has {len(manifest_bytes)} bytes; allowed: {packs.MANIFEST_BYTES_LIMIT}")
        manifest = packs.parse_manifest(manifest_bytes)
        check_files(manifest)
        directory = self.make_room()
        with disk_failures():
            (directory / "manifest.json").write_bytes(manifest_bytes)
        return Upload(directory, manifest, packs.digest_of(manifest_bytes), manifest_bytes)

    def check(self, upload: Upload) -> packs.PackReport:
        """Check a complete upload in a child process and keep nothing."""
        with disk_failures():
            return packs.check_pack(upload.directory)

    def keep(self, directory: Path, digest: str) -> packs.PackReport:
        """Check and compile a whole pack that is not here in a child process and move its folder to its place."""
        with disk_failures():
            compiled = self._compiled / folder_of(digest)
            place = self.place(digest)
            _remove(place)
            report = packs.compile_pack(directory, compiled)
            if report.digest != digest:
                _remove(compiled)
                raise PackDigestMismatch(f"the folder holds the pack {report.digest}, not {digest}")
            _sync(directory)
            directory.rename(place)
            _sync(self._packs)
            _sync(self._compiled)
        return report

    def loaded(self, digest: str) -> LoadedPack | None:
        """The pack where it is mapped and warm already; blocks for nothing."""
        loaded = self._loaded.get(digest)
        if loaded is not None:
            with self._recent_lock:
                self._recent.pop(digest, None)
                self._recent[digest] = loaded
                if len(self._recent) > RECENT:
                    del self._recent[next(iter(self._recent))]
        return loaded

    def load(self, digest: str) -> LoadedPack:
        """The pack mapped and warm; the same object while anybody holds it."""
        loaded = self.loaded(digest)
        if loaded is None:
            compiled = packs.load_compiled(self._compiled / folder_of(digest))
            if compiled.digest != digest:
                raise PackInvalid(f"the compiled form of {digest} is that of {compiled.digest}; restart the server")
            loaded = LoadedPack(digest, compiled.manifest, packs.open_oracle(compiled))
            loaded.oracle.warm()
            self._loaded[digest] = loaded
            self.loaded(digest)
        return loaded

    def remove(self, digest: str) -> None:
        """Free the disk; a snapshot that has it mapped goes on answering."""
        with self._recent_lock:
            self._recent.pop(digest, None)
        with disk_failures():
            _remove(self.place(digest))
            _remove(self._compiled / folder_of(digest))

    def read(self, digest: str, chunk_bytes: int = MAX_CHUNK_BYTES) -> Iterator[tuple[str, bytes]]:
        """(file name, bytes) of a stored pack, manifest first, then in the order of the manifest."""
        place = self.place(digest)
        with disk_failures():
            manifest_bytes = (place / "manifest.json").read_bytes()
            yield "manifest.json", manifest_bytes
            for entry in packs.parse_manifest(manifest_bytes).files:
                with (place / entry.name).open("rb") as file:
                    while chunk := file.read(chunk_bytes):
                        yield entry.name, chunk

    def _ensure_compiled(self, digest: str) -> bool:
        compiled = self._compiled / folder_of(digest)
        try:
            packs.load_compiled(compiled)
        except (OracleError, OSError):
            pass
        else:
            return False
        place = self.place(digest)
        with disk_failures():
            try:
                report = packs.compile_pack(place, compiled)
            except PackInvalid as error:
                raise _Damaged(
                    f"the stored pack {place} is damaged: {error.message}; restore it from a copy, or delete the "
                    "folder's row from oracle.db"
                ) from error
        if report.digest != digest:
            raise _Damaged(f"the folder {place} holds the pack {report.digest}; restore it from a copy")
        return True


class _Damaged(StoreFailed):
    """A stored pack is not what it was."""


class Upload:
    """A pack that is arriving, file by file in the order of the manifest. Owned by one RPC; blocking calls."""

    def __init__(self, directory: Path, manifest: packs.Manifest, digest: str, manifest_bytes: bytes) -> None:
        self.directory = directory
        self.manifest = manifest
        self.digest = digest
        self.manifest_bytes = manifest_bytes
        self.size_bytes = sum(entry.size_bytes for entry in manifest.files)
        self._index = 0
        self._written = 0
        self._file: int | None = None

    def write(self, name: str, data: bytes) -> None:
        """Append to the file whose turn it is."""
        if len(data) > MAX_CHUNK_BYTES:
            raise InvalidArgument(f"a chunk has {len(data)} bytes; allowed: {MAX_CHUNK_BYTES}", field="chunk.data")
        self._advance()
        if self._index == len(self.manifest.files):
            raise InvalidArgument(f"a chunk of {name[:80]!r} follows the last file of the manifest", field="chunk.file")
        entry = self.manifest.files[self._index]
        if name != entry.name:
            raise InvalidArgument(
                f"a chunk of {name[:80]!r} came where {entry.name} is at {self._written} of {entry.size_bytes} bytes; "
                "send the files in the order of the manifest",
                field="chunk.file",
            )
        if self._written + len(data) > entry.size_bytes:
            raise PackInvalid(f"{name} is longer than the {entry.size_bytes} bytes of the manifest", where=name)
        with disk_failures():
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                self._file = os.open(self.directory / name, flags, 0o644)
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
        self._written += len(data)

    def finish(self) -> None:
        """Raise PackInvalid unless every file is there to its last byte."""
        self._advance()
        if self._index < len(self.manifest.files):
            entry = self.manifest.files[self._index]
            raise PackInvalid(
                f"the upload ended with {self._written} of the {entry.size_bytes} bytes of {entry.name}",
                where=entry.name,
            )

    def abandon(self) -> None:
        """Remove what is left of it; no error where there is nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def _advance(self) -> None:
        while self._index < len(self.manifest.files) and self._written == self.manifest.files[self._index].size_bytes:
            if self._file is not None:
                with disk_failures():
                    os.fsync(self._file)
                    os.close(self._file)
                self._file = None
            self._index += 1
            self._written = 0


def check_files(manifest: packs.Manifest) -> None:
    """PackInvalid where a manifest names files that could leave the folder; QuotaExceeded where they are too large."""
    names = [entry.name for entry in manifest.files]
    for name in names:
        if "/" in name or "\0" in name or name.startswith(".") or name == packs.MANIFEST_FILE:
            raise PackInvalid(f"the file name {name!r} is not allowed", where="files")
    if len(set(names)) != len(names):
        raise PackInvalid("the manifest names a file twice", where="files")
    size_bytes = sum(entry.size_bytes for entry in manifest.files)
    if size_bytes > MAX_PACK_BYTES:
        raise QuotaExceeded(f"the pack has {size_bytes} bytes; allowed: {MAX_PACK_BYTES}")


@contextmanager
def disk_failures() -> Iterator[None]:
    """Turns OSError into StoreFailed."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"the disk refused: {error}; nothing was changed") from error


def folder_of(digest: str) -> str:
    """Name of a pack's folder."""
    return digest.removeprefix("sha256:")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Make the entries of a directory, and the files in it, survive a power cut."""
    for path in [*(p for p in directory.iterdir() if p.is_file()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
