"""What our code costs, beside what it could cost and what is promised: `make bench`, short with ARGS="--quick".

Sections run one after the other; within one, what is compared is measured in turn, so that both see the same machine.
Ends with a table of all promises, and with figures.json and figures.png in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numba
import numpy as np
from google import protobuf
from rich.console import Console

from performance import (
    cpu_per_step,
    growth,
    hot_swap,
    kernels,
    paced_engines,
    promises,
    readiness,
    shards,
    with_vllm,
)
from performance.figures import draw
from performance.load.client import NoCompiler, build_client
from performance.measure import NotMeasured, plain
from performance.servers import has_two_cores
from performance.tables import show

Section = Callable[[Path, bool], dict[str, Any]]
SECTIONS: dict[str, Section] = {
    "cpu_per_step": lambda folder, quick: cpu_per_step.measure(folder, rounds=3 if quick else 9, quick=quick),
    "paced_engines": lambda folder, quick: paced_engines.measure(folder, seconds=3 if quick else 10, quick=quick),
    "kernels": lambda folder, quick: kernels.measure(folder, rounds=3 if quick else 9),
    "growth": lambda folder, quick: growth.measure(folder, rounds=2 if quick else 5, quick=quick),
    "hot_swap": lambda folder, quick: hot_swap.measure(folder, pairs=10 if quick else 12, seconds=2 if quick else 4),
    "readiness": lambda folder, quick: readiness.measure(folder, loads=10 if quick else 30, starts=3 if quick else 7),
    "shards": lambda folder, quick: shards.measure(folder, rounds=3 if quick else 9, engines=64),
    # These start vLLM; the first run on a machine builds its environment (2.7 GB).
    "engine_thread": lambda folder, quick: with_vllm.measure_engine_thread(),
    "held_step": lambda folder, quick: with_vllm.measure_held_step(
        folder, seconds=3 if quick else 8, rounds=1 if quick else 5
    ),
    "lease_share": lambda folder, quick: with_vllm.measure_lease_share(folder, seconds=60 if quick else 600),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="run these sections")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder of figures.json, figures.png")
    options = parser.parse_args()
    if not has_two_cores():
        print("bench: two cores are needed, one for the server and one for the load", file=sys.stderr)
        return 2
    try:
        build_client()
    except NoCompiler as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    console = Console(width=max(120, Console().width if Console().is_terminal else 0))
    figures: dict[str, Any] = {"machine": machine(), "quick": options.quick}
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        begin = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryDirectory(prefix="step-oracle-bench-") as folder:
                figures[name] = plain(SECTIONS[name](Path(folder), options.quick))
            figures[name]["took_seconds"] = round(time.monotonic() - begin, 1)
            show(console, name, figures[name])
        except NotMeasured as why:
            figures[name] = {"not_measured": str(why)}
            console.print(f"{name}: not measured: {why}")
        figures["promises"] = promises.promises(figures)
        # After each section: one that fails costs none of those before.
        (options.output / "figures.json").write_text(json.dumps(figures, indent=1))
    console.print(promises.table_of(figures["promises"]))
    picture = options.output / "figures.png"
    # One of an earlier run would pass for this one's.
    picture.unlink(missing_ok=True)
    draw(figures, picture)
    written = [options.output / "figures.json", *([picture] if picture.exists() else [])]
    console.print(f"written: {', '.join(map(str, written))}")
    return 0


def machine() -> dict[str, Any]:
    """Where the figures are from, and how busy it was before."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "protobuf": protobuf.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
    }


def _cpuinfo() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines()


if __name__ == "__main__":
    sys.exit(main())
