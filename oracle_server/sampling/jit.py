"""The one way a kernel is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call: cached on disk, without the GIL.

    No fastmath and the default error model: every addition and multiplication is the IEEE one, in the order written, so
    that the interpreted twin of a kernel gives the same bits and a lease agrees with the server.
    """
    return cast("Callable[P, R]", numba.njit(cache=True, nogil=True)(function))
