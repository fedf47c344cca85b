"""Checks many spoiled copies of packs, each in a process of its own with the checker's limits, as the server does.

    python tests/fuzz_packs.py SCRATCH SEED COUNT PACK...

Each copy has one to three random changes in one file, which is then signed anew. A process that dies of a signal is a
refusal, as it is to the server: damaged Parquet can end the library that reads it. Prints JSON: how many were refused,
accepted and died, of how many changes to data and to manifests, and of each pack. Ends with status 1 and a sentence
where a data file was accepted whose numbers had changed, or where the checker failed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from oracle_server.pack.check import Limits
from oracle_server.pack.child import limit_process, report_on
from oracle_server.pack.manifest import parse_manifest
from oracle_server.pack.reader import read_files
from pack_edits import replace_file

# What a process says that fell over a pack without judging it.
FAILED_STATUS = 70


def main(arguments: list[str]) -> int:
    scratch, choose = Path(arguments[0]), random.Random(int(arguments[1]))
    packs = [Path(argument) for argument in arguments[3:]]
    original = {pack: judge(pack)["numbers"] for pack in packs}
    counts: Counter[str] = Counter()
    for _ in range(int(arguments[2])):
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
        verdict = in_child(partial(judge, copy))
        shutil.rmtree(copy)
        if "failure" in verdict:
            sys.stdout.write(f"the checker failed on {name} of {pack.name}: {verdict['failure']}")
            return 1
        if "signal" in verdict or "error" in verdict:
            kind = verdict.get("error", {"kind": "PackInvalid"})["kind"]
            if kind not in ("PackInvalid", "PackDigestMismatch"):
                sys.stdout.write(f"refused with {verdict['error']}")
                return 1
            counts["refused"] += 1
            counts[f"refused {pack.name}"] += 1
            counts["died"] += "signal" in verdict
            continue
        if name != "manifest.json" and verdict["numbers"] != original[pack]:
            sys.stdout.write(f"{name} of {pack.name} was accepted with other numbers")
            return 1
        counts["accepted"] += 1
    sys.stdout.write(json.dumps(counts))
    return 0


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a limited process, or {"signal"} or {"failure"}.

    Forked from a process that has read the valid packs and so has everything imported: new interpreters, as the server
    starts them, would take most of the time.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = FAILED_STATUS
        try:
            limits = asdict(Limits())
            limit_process({name: limits[name] for name in ("memory_bytes", "cpu_seconds", "output_bytes")})
            answer, status = work(), 0
        except BaseException:  # noqa: BLE001  told to the parent
            answer = {"failure": traceback.format_exc()}
        os.write(writing, json.dumps(answer).encode())
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        return {"signal": -status}
    if status != 0 and not data:
        return {"failure": f"status {status}"}
    answer = json.loads(data)
    return dict(answer)


def judge(pack: Path) -> dict[str, Any]:
    """The checker's report on a pack, cut to its refusal or to a digest of what it holds."""
    report = report_on(pack)
    return {"error": report["error"]} if "error" in report else {"numbers": numbers(pack)}


def numbers(pack: Path) -> str:
    """One digest over all columns of all files."""
    digest = hashlib.sha256()
    files = read_files(pack, parse_manifest((pack / "manifest.json").read_bytes()))
    for name in sorted(files):
        for column in sorted(files[name]):
            values = files[name][column]
            digest.update(f"{name} {column} {values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
