"""Tests of tests/contract as they stand, run for the table: how many passed, and what they printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from guarantees.row import Row, judged

_ROOT = Path(__file__).parents[2]


def row_of_tests(guarantee: str, done: str, bound: str, *tests: str, prints: str = "") -> Row:
    """`tests` are paths below tests/contract, with a name where one is meant; `prints` is found in their output."""
    words = [f"tests/contract/{test}" for test in tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", *words],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env=environment,
    )
    passed = sum(int(count) for count in re.findall(r"(\d+) passed", ran.stdout))
    wrong = sum(int(count) for count in re.findall(r"(\d+) (?:failed|error|skipped)", ran.stdout))
    said = re.search(prints, ran.stdout) if prints else None
    figure = f"{passed} tests passed, {wrong} not" + (f"; {said[0]}" if said else "")
    if ran.returncode:
        figure += f": {ran.stdout[-300:]}"
    return judged(
        guarantee,
        f"{done} (tests/contract/{tests[0].partition('::')[0]})",
        figure,
        bound,
        holds=ran.returncode == 0 and passed > 0 and not wrong and (not prints or said is not None),
    )
