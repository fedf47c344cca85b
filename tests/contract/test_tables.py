"""Steps and packs opened by pandas, polars and duckdb, without a line of this project: what the READMEs promise."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import captures
from environments import cached_venv
from profiler.capture.build import BuildRequest, build_pack
from profiler.capture.steps import read_capture
from profiler.capture.table import COLUMNS, write_table

pytestmark = pytest.mark.slow

TOOLS = ("pandas==3.1.1", "polars==2.1.0", "duckdb==2.0.1", "pyarrow==26.0.1")
SCRIPT = """
import json, sys
import duckdb, pandas, polars

def by_pandas(path):
    frame = pandas.read_parquet(path)
    return list(frame.columns), len(frame), int(frame["latency_ns"].sum())

def by_polars(path):
    frame = polars.read_parquet(path)
    return frame.columns, len(frame), int(frame["latency_ns"].sum())

def by_duckdb(path):
    found = duckdb.sql(f"select * from read_parquet('{path}')")
    return found.columns, len(found), int(duckdb.sql(f"select sum(latency_ns) from '{path}'").fetchall()[0][0])

print(json.dumps([[read(path) for read in (by_pandas, by_polars, by_duckdb)] for path in sys.argv[1:]]))
"""


def test_steps_and_samples_open_in_pandas_polars_and_duckdb(tmp_path: Path) -> None:
    made = captures.steps(120)
    captures.write_run(tmp_path / "capture", made)
    write_table(read_capture(tmp_path / "capture"), tmp_path / "steps.parquet")
    build_pack(BuildRequest(tmp_path / "capture", "sampled"), tmp_path / "pack")
    done = subprocess.run(
        [
            *(str(cached_venv("tables", TOOLS)), "-c", SCRIPT),
            *(str(tmp_path / "steps.parquet"), str(tmp_path / "pack" / "samples.parquet")),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    steps, samples = json.loads(done.stdout)
    total_ns = sum(step.latency_ns for step in made)

    assert steps == [[["run", *COLUMNS], 120, total_ns]] * 3
    assert {(rows, latency_ns) for _, rows, latency_ns in samples} == {(120, total_ns)}
    assert all("latency_ns" in columns for columns, *_ in samples)
