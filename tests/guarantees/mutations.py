"""Damaged packs and damaged messages: refused with a reason or harmless, and never silently something else."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from builders import build_composed_pack
from guarantees.fuzzed_server import FuzzedServer
from guarantees.hot_swaps import build_packs
from guarantees.row import Guarantee, Row, judged

RSS_BOUND_BYTES = 3 << 29
_TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sizes:
    packs: int
    messages: int
    processes: int = 2
    seed: int = 6


LONG = Sizes(packs=20_000, messages=100_000)
QUICK = Sizes(packs=200, messages=3_000)


def run(folder: Path, sizes: Sizes) -> list[Row]:
    return [_packs(folder, sizes), *_messages(folder, sizes)]


def _packs(folder: Path, sizes: Sizes) -> Row:
    """Each copy is checked in a process with the checker's limits; ru_maxrss is the largest of them."""
    packs = build_packs(folder / "packs")
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "ARROW_IO_THREADS": "1", "OMP_NUM_THREADS": "1"}

    def fuzz(number: int) -> subprocess.CompletedProcess[str]:
        scratch = folder / f"scratch-{number}"
        scratch.mkdir()
        count = sizes.packs // sizes.processes + (number < sizes.packs % sizes.processes)
        words = [str(scratch), str(sizes.seed + number), str(count), *map(str, packs)]
        script = str(_TESTS / "fuzz_packs.py")
        return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)

    with ThreadPoolExecutor(sizes.processes) as pool:
        finished = list(pool.map(fuzz, range(sizes.processes)))
    counts: Counter[str] = Counter()
    failures = [f"{each.stdout}{each.stderr}"[-300:] for each in finished if each.returncode]
    for each in finished:
        if not each.returncode:
            counts.update(json.loads(each.stdout))
    rss = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    judged_packs = counts["refused"] + counts["accepted"]
    return judged(
        "mutated packs are refused, or hold what they held",
        f"{judged_packs:,} of {sizes.packs:,} packs, one file of each changed and signed anew; seeds {sizes.seed} to "
        f"{sizes.seed + sizes.processes - 1}",
        f"{counts['refused']:,} refused (of them {counts['died']:,} by the death of the checking child), "
        f"{counts['accepted']:,} accepted with equal numbers or another manifest, {len(failures)} wrong; "
        f"largest process {rss / 2**20:.0f} MiB" + (f": {'; '.join(failures)}" if failures else ""),
        "0 wrong, 1.5 GiB",
        holds=not failures and judged_packs == sizes.packs and rss <= RSS_BOUND_BYTES,
    )


def _messages(folder: Path, sizes: Sizes) -> list[Row]:
    build_composed_pack(folder / "pack", ratios=[0.9, 1.0, 1.1])
    with FuzzedServer(folder, folder / "pack", random.Random(sizes.seed)) as fuzzed:
        for _ in range(sizes.messages):
            fuzzed.send_one()
        report = fuzzed.recompute()
    counts, problems = fuzzed.counts, fuzzed.problems
    done = f"{sizes.messages:,} messages to {len(fuzzed.methods)} methods over a real channel, seed {sizes.seed}"
    return [
        judged(
            "mutated messages are answered, or refused with an ErrorInfo",
            done,
            f"{counts['answered']:,} answered, {counts['refused']:,} refused with {len(fuzzed.reasons)} reasons, "
            f"{counts['undecodable']:,} are no messages and ended by gRPC; {len(problems)} problems, "
            f"{fuzzed.crashes} crashes; RSS {fuzzed.largest_rss / 2**20:.0f} MiB"
            + (f": {'; '.join(sorted(set(problems))[:3])}" if problems else ""),
            "0 problems, 1.5 GiB",
            holds=not problems and not fuzzed.crashes and fuzzed.largest_rss <= RSS_BOUND_BYTES,
        ),
        judged(
            "what is answered to mutated steps recomputes",
            done,
            f"{report.equal:,} answers equal, {report.different} different, {report.skipped} left out"
            + (f": {report.examples[0]}" if report.examples else ""),
            "all equal",
            holds=report.equal > 0 and not report.different + report.skipped,
        ),
    ]


GUARANTEE = Guarantee(run, LONG, QUICK)
