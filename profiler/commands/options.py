"""Options that several verbs share, and how they are read and printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Output = Annotated[Path, typer.Option("--output", "-o", help="Directory of the new pack; must not exist.")]


def sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(size) for size in text.split(",") if size}))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of sizes such as 1,2,4,8") from None


def print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))
