"""Rows, coordinates and times of a bundle's CSV files, refused with file and line."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

from oracle_server.errors import InvalidArgument

_MOST_ROWS = 2_000_000
_LARGEST_COORDINATE = 1 << 31
_LARGEST_US = 600e6


def rows_of(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line number and the asked columns of each row."""
    if not path.is_file():
        raise InvalidArgument(f"the bundle has no {path.name} ({path})", field=path.name)
    rows = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            absent = [name for name in columns if name not in (reader.fieldnames or ())]
            if absent:
                raise InvalidArgument(
                    f"{path.name}, line 1: no column {', '.join(absent)}; found are {reader.fieldnames}",
                    field=path.name,
                )
            for row in reader:
                if any(row[name] is None for name in columns):
                    raise InvalidArgument(f"{path.name}, line {reader.line_num}: the row is cut", field=path.name)
                rows.append((reader.line_num, row))
                if len(rows) > _MOST_ROWS:
                    raise InvalidArgument(f"{path.name} has more than {_MOST_ROWS} rows", field=path.name)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidArgument(f"{path.name} is no CSV file: {error}", field=path.name) from error
    if not rows:
        raise InvalidArgument(f"{path.name} has no rows", field=path.name)
    return rows


def coordinate_of(where: str, name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text) or int(text) > _LARGEST_COORDINATE:
        raise InvalidArgument(
            f"{where}: {name} is {text!r}; a whole number from 0 to 2^31 is needed", field=where.partition(",")[0]
        )
    return int(text)


def time_us_of(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value <= _LARGEST_US:
        raise InvalidArgument(
            f"{where}: {name} is {text!r}; microseconds above 0 and up to 600 seconds are needed",
            field=where.partition(",")[0],
        )
    return value
