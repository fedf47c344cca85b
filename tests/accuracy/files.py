"""What a session leaves behind: the figures as JSON, the table and the cases behind it as text, the pictures."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from accuracy.pictures import KINDS, draw
from accuracy.table import WIDTH, print_table
from gates import Record

_LISTING = "_rows.txt"


def write(record: Record, folder: Path) -> list[Path]:
    """Replaces what lies in `folder` of an earlier session; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    figures, table = folder / "figures.json", folder / "table.txt"
    for stale in (path for kind in KINDS for path in folder.glob(f"{kind}_*.png")):
        stale.unlink()
    for stale in folder.glob(f"*{_LISTING}"):
        stale.unlink()
    figures.write_text(json.dumps(record.document(), indent=1) + "\n")
    with table.open("w") as file:
        print_table(record.figures, Console(width=WIDTH, file=file))
    listings = []
    for name, lines in record.listings.items():
        listings.append(folder / f"{name}{_LISTING}")
        listings[-1].write_text("\n".join([*lines, ""]))
    return [figures, table, *listings, *draw(record, folder)]
