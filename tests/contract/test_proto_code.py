"""The generated code is what its .proto files say and loads wherever a shim runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import proto_code
from environments import REPOSITORY, VllmEnvironment

IMPORT_ALL = """
import importlib, pathlib, sys
folder = pathlib.Path(sys.argv[1], "step_oracle", "v1")
names = [f"step_oracle.v1.{file.stem}" for file in sorted(folder.glob("*_pb2*.py"))]
assert len(names) > 10, names
for name in names:
    importlib.import_module(name)
"""


@pytest.mark.slow
def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    fresh = {path.relative_to(tmp_path): path.read_text() for path in proto_code.generate(tmp_path)}

    committed = {
        path.relative_to(proto_code.PROTO): path.read_text()
        for path in proto_code.PROTO.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }

    assert fresh.keys() == committed.keys()
    assert [str(name) for name in fresh if fresh[name] != committed[name]] == []


@pytest.mark.vllm
def test_generated_code_loads_without_a_warning_beside_vllm(vllm: VllmEnvironment) -> None:
    command = [str(vllm.python), "-W", "error", "-c", IMPORT_ALL, str(REPOSITORY / "proto")]

    done = subprocess.run(command, env={"PYTHONPATH": str(REPOSITORY / "proto")}, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
