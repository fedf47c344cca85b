"""What is promised, shown in long form: `make guarantees`; short with ARGS="--quick", some with ARGS="--only NAME".

Ends with one table (guarantee, what was done, figure, bound, held or MISSED), writes it to guarantees.json in the
output folder, and has exit status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from guarantees.row import MISSED, Guarantee, Row, judged, table_of

NAMES = (
    "hot_swaps",
    "noisy_tenant",
    "one_against_shards",
    "one_against_replicas",
    "restarts",
    "rotation",
    "registry_stopped",
    "database_stopped",
    "soak",
    "mutations",
    "experimentation",
    "kill_nine",
)
# Goes on while those after it are shown, which assert no times but one: it takes long, and needs little.
BESIDE = "soak"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="smaller counts; says that it works, not how well it holds"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--output", type=Path, default=Path("build/guarantees"), help="folder of guarantees.json")
    options = parser.parse_args()
    console = Console(width=max(150, Console().width if Console().is_terminal else 0))
    options.output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    rows: list[Row] = []
    seconds: dict[str, float] = {}

    def add(name: str, found: list[Row], took: float) -> None:
        rows.extend(found)
        seconds[name] = took
        console.print(table_of(found, f"{name}, {took:.0f} s"))
        # After each: one that hangs costs none of those before.
        write(options.output / "guarantees.json", rows, seconds, quick=options.quick)

    # A process of its own: the times that the others measure are not to wait for this one's Python.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        beside = None
        for name in (name for name in NAMES if name in options.only):
            print(f"{name} ...", file=sys.stderr, flush=True)
            if name == BESIDE and len(set(options.only)) > 1:
                beside = pool.submit(timed, name, quick=options.quick)
            else:
                add(name, *timed(name, quick=options.quick))
        if beside is not None:
            add(BESIDE, *beside.result())
    write(options.output / "guarantees.json", rows, seconds, quick=options.quick)
    console.print(table_of(rows))
    console.print(f"written: {options.output / 'guarantees.json'}; {time.monotonic() - begin:.0f} s")
    return int(any(row.verdict == MISSED for row in rows))


def timed(name: str, *, quick: bool) -> tuple[list[Row], float]:
    """The rows of one guarantee, and how many seconds it took."""
    begin = time.monotonic()
    found = show(name, quick=quick)
    return found, round(time.monotonic() - begin, 1)


def show(name: str, *, quick: bool) -> list[Row]:
    """The rows of one guarantee; one that could not be shown is a row too, and missed."""
    guarantee: Guarantee[Any] = importlib.import_module(f"guarantees.{name}").GUARANTEE
    try:
        with tempfile.TemporaryDirectory(prefix="step-oracle-guarantee-") as folder:
            return list(guarantee.run(Path(folder), guarantee.quick if quick else guarantee.long))
    except Exception as error:  # noqa: BLE001 - the others are shown all the same
        traceback.print_exc()
        return [judged(name, "", f"could not be shown: {error!r}"[:500], "", holds=False)]


def write(path: Path, rows: list[Row], seconds: dict[str, float], *, quick: bool) -> None:
    """What the table says, as data, and where it is from."""
    machine = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "python": platform.python_version()}
    found = {"machine": machine, "quick": quick, "seconds": seconds, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
