"""The credentials that are valid now, and the open streams that hang on each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from oracle_server.errors import Starting, Unauthenticated
from oracle_server.state.principal import Principal

SCHEME = "bearer"


@dataclass(frozen=True, slots=True)
class Admission:
    """Who may call, and the tenants whose steps are refused because they are over their rate. Travels to the shards."""

    principals: tuple[Principal, ...] = ()
    over_rate: frozenset[str] = frozenset()


class Credentials:
    """Tells a secret's principal by its hash, and ends what was opened with one that is valid no more.

    Event loop only. Nothing is asked per step: a call is looked up once, when it begins.
    """

    def __init__(self) -> None:
        # None: nobody has said yet who may call.
        self._principals: dict[bytes, Principal] | None = None
        self._held: dict[bytes, set[asyncio.Task[object]]] = {}

    def replace(self, principals: Iterable[Principal]) -> None:
        """Take these from now on; streams opened with others end, as soon as the loop comes to them."""
        known = self._principals = {principal.credential: principal for principal in principals}
        for credential in [held for held in self._held if held not in known]:
            # Forgotten at once: a task is cancelled once, and ends undisturbed.
            for task in self._held.pop(credential):
                task.cancel()

    def find(self, authorization: str) -> Principal:
        """The principal of an `authorization` header; Unauthenticated, Starting."""
        if self._principals is None:
            raise Starting("the server is starting; retry, or wait for its health to be SERVING")
        scheme, _, secret = authorization.partition(" ")
        if scheme.lower() != SCHEME or not secret:
            what = "no bearer token" if not authorization else "an authorization that is no bearer token"
            raise Unauthenticated(
                f"the call has {what}; give the file of one in STEP_ORACLE_TOKEN_FILE (`step-oracle tenant token "
                "issue` makes one)"
            )
        # Looked up by its hash: how long that takes says nothing about a secret.
        principal = self._principals.get(hash_of(secret))
        if principal is None:
            raise Unauthenticated("the token is not valid (any more); give the file of a valid one")
        return principal

    def is_valid(self, principal: Principal) -> bool:
        """False once its credential has been revoked."""
        return principal.credential in (self._principals or ())

    @contextmanager
    def holding(self, principal: Principal) -> Iterator[None]:
        """The current task is cancelled when the credential is revoked meanwhile; CancelledError where it was."""
        task = asyncio.current_task()
        if task is None or not self.is_valid(principal):
            raise asyncio.CancelledError
        tasks = self._held.setdefault(principal.credential, set())
        tasks.add(task)
        try:
            yield
        finally:
            tasks.discard(task)
            if not tasks and self._held.get(principal.credential) is tasks:
                del self._held[principal.credential]


def hash_of(secret: str) -> bytes:
    """What is kept of a secret. It has 256 random bits, so a plain hash needs no salt and no stretching."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
