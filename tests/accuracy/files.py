"""What a session leaves behind: the figures as JSON, the table as text, the pictures."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from accuracy.pictures import KINDS, draw
from accuracy.table import WIDTH, print_table
from gates import Record


def write(record: Record, folder: Path) -> list[Path]:
    """Replaces what lies in `folder` of an earlier session; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (path for kind in KINDS for path in folder.glob(f"{kind}_*.png")):
        stale.unlink()
    figures, table = folder / "figures.json", folder / "table.txt"
    figures.write_text(json.dumps(record.document(), indent=1) + "\n")
    with table.open("w") as file:
        print_table(record.figures, Console(width=WIDTH, file=file))
    return [figures, table, *draw(record, folder)]
