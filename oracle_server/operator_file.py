"""The operator's token: read from its file, and again when it changes, without a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from oracle_server.errors import InvalidArgument
from oracle_server.state.credentials import hash_of

POLL_SECONDS = 0.5
MIN_LENGTH = 32
# The old one and the new one, while their holders change over.
MAX_TOKENS = 2

_log = logging.getLogger("step_oracle.operator")


class OperatorFile:
    """One token per line, two at most. Owned by the server; event loop only."""

    def __init__(self, path: Path) -> None:
        """InvalidArgument where the file cannot be used."""
        self._path = path
        self.hashes = self._read()
        self._refused = ""

    async def watch(self, trust: Callable[[tuple[bytes, ...]], Awaitable[None]]) -> None:
        """Call `trust` after each change. A file that cannot be used is told once and changes nothing."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                hashes = await asyncio.to_thread(self._read)
            except InvalidArgument as error:
                if error.message != self._refused:
                    self._refused = error.message
                    _log.warning("the operator's tokens stay as they are: %s", error.message)
                continue
            self._refused = ""
            if hashes != self.hashes:
                await trust(hashes)
                self.hashes = hashes

    def _read(self) -> tuple[bytes, ...]:
        where = f"the operator token file {self._path}"
        try:
            tokens = self._path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{where} cannot be read: {error}", field="operator_token_file") from error
        if not 1 <= len(tokens) <= MAX_TOKENS or min(map(len, tokens)) < MIN_LENGTH:
            shortest = f", the shortest of {min(map(len, tokens))} characters" if tokens else ""
            raise InvalidArgument(
                f"{where} has {len(tokens)} tokens{shortest}; allowed: 1 or {MAX_TOKENS}, each on a line of its own "
                f"and of at least {MIN_LENGTH} characters, for example from `openssl rand -hex 32`",
                field="operator_token_file",
            )
        return tuple(map(hash_of, tokens))
