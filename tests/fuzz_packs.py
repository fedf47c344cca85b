"""Checks many spoiled copies of two packs in one process with the checker's own limits.

    python tests/fuzz_packs.py SAMPLED COMPOSED SCRATCH SEED COUNT

Each copy has one to three random changes in one file, which is then signed anew. Prints JSON: how many were refused and
how many accepted. Ends with status 1 and a sentence where a data file was accepted whose numbers had changed.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from oracle_server.pack.check import Limits
from oracle_server.pack.child import limit_process, report_on
from oracle_server.pack.manifest import parse_manifest
from oracle_server.pack.reader import read_files
from pack_edits import replace_file


def main(arguments: list[str]) -> int:
    packs = [Path(arguments[0]), Path(arguments[1])]
    scratch = Path(arguments[2])
    choose = random.Random(int(arguments[3]))
    limits = asdict(Limits())
    limit_process({name: limits[name] for name in ("memory_bytes", "cpu_seconds", "output_bytes")})
    original = {pack: numbers(pack) for pack in packs}
    counts = {"refused": 0, "accepted": 0, "manifest": 0, "data": 0}
    for _ in range(int(arguments[4])):
        pack = choose.choice(packs)
        copy = scratch / "copy"
        shutil.copytree(pack, copy)
        name = choose.choice(sorted(path.name for path in copy.iterdir()))
        data = spoil((copy / name).read_bytes(), choose)
        if name == "manifest.json":
            (copy / name).write_bytes(data)
        else:
            replace_file(copy, name, data)
        counts["manifest" if name == "manifest.json" else "data"] += 1
        report = report_on(copy)
        if "error" in report:
            if report["error"]["kind"] not in ("PackInvalid", "PackDigestMismatch"):
                sys.stdout.write(f"refused with {report['error']}")
                return 1
            counts["refused"] += 1
        else:
            if name != "manifest.json" and not same(numbers(copy), original[pack]):
                sys.stdout.write(f"{name} was accepted with other numbers")
                return 1
            counts["accepted"] += 1
        shutil.rmtree(copy)
    sys.stdout.write(json.dumps(counts))
    return 0


def spoil(data: bytes, choose: random.Random) -> bytes:
    """One to three changes: a bit, a byte, a stretch removed, doubled, zeroed or cut off."""
    for _ in range(choose.randint(1, 3)):
        at = choose.randrange(len(data))
        # Half of the changes hit the footer, where the structure is.
        if choose.random() < 0.5:
            at = max(0, len(data) - 1 - choose.randrange(min(len(data), 1200)))
        length = choose.choice((1, 1, 4, 30))
        kind = choose.randrange(6)
        piece = data[at : at + length]
        if kind == 0:
            data = data[:at] + bytes([data[at] ^ (1 << choose.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + bytes([choose.randrange(256)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + data[at + length :]
        elif kind == 3:
            data = data[:at] + piece + data[at:]
        elif kind == 4:
            data = data[:at] + bytes(len(piece)) + data[at + length :]
        else:
            data = data[: max(1, at)]
        data = data or b"\0"
    return data


def numbers(pack: Path) -> dict[str, dict[str, Any]]:
    return read_files(pack, parse_manifest((pack / "manifest.json").read_bytes()))


def same(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name][column], other[name][column]) for name in one for column in one[name]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
