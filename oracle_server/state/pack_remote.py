"""Where packs lie for a whole fleet, beyond one server's disk."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class PackRemote(Protocol):
    """Keeps whole packs by their digests ("sha256:" + 64 hex digits). Any number of calls may run at once.

    Folders are packs as `pack/README.md` describes them: manifest.json and the files it names.

    Raises PackRegistryUnavailable where it cannot be asked now: it is down, does not answer in time, refuses the
    credentials.
    """

    async def push(self, digest: str, folder: Path) -> None:
        """Keep a pack that has been checked; at the return `fetch` gives it, everywhere. Once more is no error.

        A call that fails or is cut off leaves nothing that `fetch` would take for a pack.
        """

    async def fetch(self, digest: str, folder: Path) -> None:
        """Write the pack's files into an empty folder that exists; at the return their bytes are those of the digest.

        What is in them has still to be checked as that of an upload. StoreFailed where it is not kept, or where
        something else is kept under its name. After an error the folder may hold pieces; whoever made it removes it.
        """

    async def delete(self, digest: str) -> None:
        """Keep it no more; no error where it is not kept."""
