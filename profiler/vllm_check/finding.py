"""What a check says of one release."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One difference. `where` is the file of ours that relies on it."""

    part: str
    severity: Literal["breaks", "handled"]
    what: str
    where: str
