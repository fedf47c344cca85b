"""The checker's child process may die in any way; the parent says why and goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from builders import build_sampled_pack
from oracle_server.errors import PackInvalid, StoreFailed
from oracle_server.pack import Limits, check_pack, compile_pack


def replace_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -SEGV $$", "signal SIGSEGV"),
        ("kill -KILL $$", "signal SIGKILL"),
        ("kill -ABRT $$", "signal SIGABRT"),
        ("kill -XCPU $$", "more than 60 seconds of CPU time"),
        ("echo 'Traceback' >&2; echo 'RuntimeError: no' >&2; exit 1", "failed with status 1: RuntimeError: no"),
        ("echo garbage", "gave no report"),
        ("true", "gave no report"),
        ("echo '{}'", "gave no report"),
        ("echo '[]'", "gave no report"),
    ],
)
def test_a_dead_child_is_a_refusal_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    build_sampled_pack(tmp_path / "pack")
    replace_interpreter(monkeypatch, tmp_path, script)
    with pytest.raises(PackInvalid, match=reason) as refusal:
        compile_pack(tmp_path / "pack", tmp_path / "compiled")
    assert refusal.value.where == "pack"
    assert not (tmp_path / "compiled").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_sampled_pack(tmp_path / "pack")
    replace_interpreter(monkeypatch, tmp_path, "exec sleep 60")
    with pytest.raises(PackInvalid, match=r"did not end within 0\.05 seconds"):
        check_pack(tmp_path / "pack", Limits(wall_seconds=0.05))


def test_memory_is_limited(tmp_path: Path) -> None:
    # The libraries map about 350 MiB; a million rows need about 100 more.
    build_sampled_pack(tmp_path / "pack")
    with pytest.raises(PackInvalid):
        check_pack(tmp_path / "pack", Limits(memory_bytes=150 << 20))
    check_pack(tmp_path / "pack", Limits(memory_bytes=700 << 20))


def test_a_disk_that_refuses_is_not_the_packs_fault(tmp_path: Path) -> None:
    build_sampled_pack(tmp_path / "pack")
    # A file larger than the limit on files is refused by the kernel as a full disk would be, in the child.
    with pytest.raises(StoreFailed, match="could not be written"):
        compile_pack(tmp_path / "pack", tmp_path / "compiled", Limits(output_bytes=100))
    # And a parent that is no directory, in this process.
    with pytest.raises(StoreFailed, match="could not be written"):
        compile_pack(tmp_path / "pack", tmp_path / "pack" / "manifest.json" / "compiled")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack"]


def test_importing_the_package_loads_neither_a_compiler_nor_a_reader() -> None:
    # The serving process has no Parquet reader until it writes a pack, and the child no compiler.
    code = "import sys, oracle_server.pack; print([m for m in ('numba', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
