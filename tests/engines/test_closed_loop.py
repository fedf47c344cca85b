"""The closed loop as `make closed-loop` runs it, in a short form: what it prints and writes, not how close it comes.

With the steady device: all that is in the loop without it, and the device.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from environments import REPOSITORY, cpu_vllm_environment

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_a_real_engine_and_its_emulation_serve_the_same_requests(tmp_path: Path) -> None:
    cpu_vllm_environment()
    deltas, figures = tmp_path / "per_rate_deltas.csv", tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "deploy.closed_loop.closed_loop",
        "--quick",
        "--steady",
        "--seconds",
        "3",
        "--explain",
    ]
    paths = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests")))
    done = subprocess.run(
        [*command, "--csv", str(deltas), "--json", str(figures)],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    document = json.loads(figures.read_text())

    assert document["steady_ms"] == 24
    assert re.search(r"the steady device of the real engine: \d+ of [1-9]\d* steps took longer", done.stdout)
    # One engine, captured in one part of the plan, then before, between and behind two workloads, twice. The pack has
    # all of them, and nothing of the runs, which are captured for the explanation.
    captured = [int(steps) for steps in re.findall(r"part \d+, .* minutes: (\d+) steps", done.stdout)]
    assert len(captured) == 7
    packed = re.search(r"(\d+) steps of 1 runs; left out: (\d+) of the warm-up, (\d+) not asked for\n", done.stdout)
    assert packed is not None, done.stdout
    assert int(packed[1]) == sum(captured)
    assert int(packed[3]) > 0
    (whole,) = re.findall(r"run-001: (\d+) steps", done.stdout)
    assert int(whole) == sum(map(int, packed.groups()))
    assert all(0.5 < float(speed) < 2.0 for speed in re.findall(r"took ([\d.]+) times as long", done.stdout))
    assert "not in every rank's file" not in done.stdout
    assert [entry["workload"]["name"] for entry in document["comparisons"]] == ["Poisson 50 %", "closed loop 8"]
    for entry in document["comparisons"]:
        for figure in entry["figures"]:
            assert len(figure["real"]) == len(figure["emulated"]) == 2
            assert all(math.isfinite(value) and value > 0 for value in (*figure["real"], *figure["emulated"]))
    assert len(deltas.read_text().splitlines()) == 3
    assert "± real" in done.stdout
    assert [len(each["repeats"]) for each in document["explanations"]] == [2, 2]
    # The lines of the verdict begin with a workload's name too.
    explained = done.stdout.partition("time between tokens, at the engine")[2].partition("error = pack")[0].splitlines()
    for name in ("Poisson 50 %", "closed loop 8"):
        (row,) = (line for line in explained if line.strip().startswith(name))
        _, _, error, *_, first, second = map(float, row.partition(name)[2].split())
        (repeats,) = (each["repeats"] for each in document["explanations"] if each["workload"] == name)
        errors = [100 * (repeat["emulated_ms"] / repeat["real_ms"] - 1) for repeat in repeats]
        # Of two runs on a machine that others use one may be far from the other.
        assert [repeat["total_percent"] for repeat in repeats] == pytest.approx(errors)
        assert error == pytest.approx(sum(errors) / 2, abs=0.051)
        assert [first, second] == pytest.approx([repeat["pack_percent"] for repeat in repeats], abs=0.051)
    assert "means are beyond their bound" in done.stdout
