"""Pages of list calls: the token is the last key of the page before, in base64 so that nobody builds one by hand."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from itertools import islice
from typing import Protocol, TypeVar

from oracle_server.errors import InvalidArgument

DEFAULT_SIZE = 100
MAX_SIZE = 1000
# Peers refuse messages above 4 MiB by default; manifests and length tables travel in full.
MAX_BYTES = 2 << 20


class _Sized(Protocol):
    def ByteSize(self) -> int: ...


_Message = TypeVar("_Message", bound=_Sized)


def size_of(page_size: int) -> int:
    """The number of items of a page: 100 where none is asked, at most 1000."""
    return min(page_size or DEFAULT_SIZE, MAX_SIZE)


def fill(messages: Iterable[_Message], page_size: int) -> list[_Message]:
    """The messages of a page: as many as are asked for, fewer where they are large, at least one if there is one."""
    page: list[_Message] = []
    total = 0
    for message in islice(messages, size_of(page_size)):
        total += message.ByteSize()
        if page and total > MAX_BYTES:
            break
        page.append(message)
    return page


def token_after(key: str) -> str:
    """Token of the page behind `key`."""
    return base64.urlsafe_b64encode(key.encode()).decode()


def key_of(page_token: str) -> str:
    """The key a page begins behind; empty for the first page. InvalidArgument for a token no page gave."""
    try:
        return base64.b64decode(page_token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError) as error:
        raise InvalidArgument(
            f"page_token is {page_token[:80]!r}; give next_page_token of the page before, or none", field="page_token"
        ) from error
