"""Loading a pack, 100 packs in memory, and how soon a started server answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from oracle_calls import Calls
from oracle_process import OracleProcess
from oracle_server.pack import compile_pack
from oracle_server.pack.load import load_compiled, open_oracle
from performance.measure import SERVER_CORE, Spread, on_core, resident_bytes
from performance.packs import SAMPLES, build_large_sampled_pack, build_leasable_pack

RESIDENT_PACKS = 100


def measure(folder: Path, *, loads: int, starts: int) -> dict[str, Any]:
    """Milliseconds per load, bytes of 100 packs, seconds from the start of the process to SERVING."""
    build_large_sampled_pack(folder / "sampled")
    build_leasable_pack(folder / "composed")
    compiled = folder / "compiled"
    compile_pack(folder / "sampled", compiled)
    return {
        "samples": SAMPLES,
        "load_ms": Spread.of([load_ms(compiled) for _ in range(loads)]),
        "ready_seconds": Spread.of(ready_seconds(folder, starts)),
        **resident(folder, compiled),
    }


def load_ms(compiled: Path) -> float:
    """From a compiled pack to an oracle whose kernels are there."""
    begin = time.perf_counter()
    open_oracle(load_compiled(compiled)).warm()
    return (time.perf_counter() - begin) * 1e3


def ready_seconds(folder: Path, starts: int) -> list[float]:
    """Starts with numba's cache, over a state with a large and a composed pack in use."""
    found = []
    with on_core(SERVER_CORE):
        process = OracleProcess(folder / "state", listen=(f"unix:{folder}/s",))
        with process, Calls(process.target) as calls:
            calls.create(calls.upload(folder / "sampled"), "a")
            calls.create(calls.upload(folder / "composed"), "b")
        for _ in range(starts):
            begin = time.perf_counter()
            with process:
                found.append(time.perf_counter() - begin)
    return found


def resident(folder: Path, compiled: Path) -> dict[str, Any]:
    """Memory of a process that has opened 100 packs, copies in files of their own, and touched every page of them."""
    folders = [folder / f"copy-{number}" for number in range(RESIDENT_PACKS)]
    for copy in folders:
        shutil.copytree(compiled, copy)
    try:
        command = [sys.executable, __file__, *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        for copy in folders:
            shutil.rmtree(copy)
    before, after = map(int, done.stdout.split())
    return {"packs": len(folders), "bytes_before": before, "bytes_with_packs": after}


def _open_all(folders: list[str]) -> None:
    held = []
    before = 0
    for number, folder in enumerate(folders):
        pack = load_compiled(Path(folder))
        held.append((pack, open_oracle(pack)))
        for array in pack.arrays.values():
            array.sum()
        if number == 0:
            held[0][1].warm()
            before = resident_bytes()
    print(before, resident_bytes())


if __name__ == "__main__":
    _open_all(sys.argv[1:])
