"""Random damage to packs is refused or harmless, and never silently another pack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from builders import build_composed_pack, build_hybrid_pack, build_sampled_pack

TESTS = Path(__file__).parents[2]
KINDS = ("sampled", "composed", "hybrid")
COPIES = 300


@pytest.mark.parametrize("seed", [1, 2])
def test_random_damage_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    build_sampled_pack(tmp_path / "sampled")
    build_composed_pack(tmp_path / "composed", ratios=(0.9, 1.0, 1.1))
    build_hybrid_pack(tmp_path / "hybrid", ratios=(0.9, 1.0, 1.1))
    (tmp_path / "scratch").mkdir()
    packs = [str(tmp_path / kind) for kind in KINDS]
    done = subprocess.run(
        [sys.executable, str(TESTS / "fuzz_packs.py"), str(tmp_path / "scratch"), str(seed), str(COPIES), *packs],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "ARROW_IO_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["refused"] + counts["accepted"] == COPIES
    # A fuzzer that no longer reaches the packs would show here.
    assert counts["refused"] > 220
    assert counts["data"] > 110
    for kind in KINDS:
        assert counts[f"refused {kind}"] > 60
