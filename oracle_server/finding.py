"""One line of `step-oracle doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What a check found; `mend` says what to do and is empty where nothing is wrong."""

    check: str
    status: Literal["ok", "warning", "problem"]
    message: str
    mend: str = ""


def ok(check: str, message: str) -> Finding:
    return Finding(check, "ok", message)


def warning(check: str, message: str, mend: str) -> Finding:
    return Finding(check, "warning", message, mend)


def problem(check: str, message: str, mend: str) -> Finding:
    return Finding(check, "problem", message, mend)
