"""vLLM's modules compiled to C: what decides that they are compiled anew, what is refused, what never passes unseen.

The vLLM here is a made-up one of two modules in an environment of its own; Cython and the C compiler are real unless a
test brings a script for a compiler.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from environments import REPOSITORY
from oracle_server.errors import FailedPrecondition, InvalidArgument
from profiler.replay import compiler
from profiler.replay.compiled import MANIFEST, CompiledModule, write_manifest

pytest.importorskip("Cython", reason="the `compile` extra is not installed")

REQUEST = """import time


class Request:
    def __init__(self, number: int) -> None:
        self.number = number
        self.arrival_time = time.time()
"""
HASHING = "def twice(value: int) -> int:\n    return value * 2\n"
TARGET = compiler.Target("3.11.7 (main)", ".cpython-311-x86_64-linux-gnu.so", "/include", "0.33.0", ("/site/vllm",))
SOURCES = {"vllm.v1.request": b"import time\n"}


def fake_environment(folder: Path, *, request: str = REQUEST) -> Path:
    """The Python of an environment whose vLLM 9.9 has two of the modules and nothing else."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    files = {"v1/request.py": request, "utils/hashing.py": HASHING, "v1/__init__.py": "", "utils/__init__.py": ""}
    for name, content in {**files, "__init__.py": ""}.items():
        path = site / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (site / "vllm-9.9.dist-info").mkdir()
    (site / "vllm-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    return folder / "bin" / "python"


def source_of(python: Path, name: str) -> Path:
    (found,) = python.parent.parent.glob(f"lib/python*/site-packages/vllm/{name}")
    return found


def ignore(event: dict[str, Any]) -> None:
    """For who does not follow the build."""


def refuse(event: dict[str, Any]) -> None:
    pytest.fail(f"compiled again: {event}")


def cached(folder: Path) -> list[str]:
    """What there is beside locks."""
    return sorted(path.name for path in (folder / "replay").iterdir() if path.suffix != ".lock")


def use_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """A shell script for the C compiler, called as `cc FLAGS -o OUT IN`."""
    path = folder / "fake-cc"
    path.write_text(f'#!/bin/sh\nwhile [ "$1" != "-o" ]; do shift; done\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


def run_compiled(python: Path, folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A process of the environment that imports from the folder, as the worker does."""
    begin = "import sys\nfrom pathlib import Path\nfrom profiler.replay import compiled\n"
    command = [str(python), "-c", f"{begin}compiled.install(Path(sys.argv[1]))\n{program}", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEP_ORACLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


def test_the_modules_a_version_has_run_compiled_and_take_their_time_from_the_replay(tmp_path: Path) -> None:
    python = fake_environment(tmp_path / "vllm")
    events: list[dict[str, Any]] = []

    folder = compiler.compiled_folder(python, events.append)
    again = compiler.compiled_folder(python, refuse)
    done = run_compiled(
        python,
        folder,
        """
import json, types
from vllm.utils import hashing
from vllm.v1 import request
wall = request.Request(0).arrival_time
request.time = types.SimpleNamespace(time=lambda: 5.0)
virtual = request.Request(1).arrival_time
print(json.dumps([compiled.imported(), wall, virtual, hashing.twice(21), hashing.__file__]))
""",
    )

    assert done.returncode == 0, done.stderr
    names, wall, virtual, answer, file = json.loads(done.stdout)
    assert names == ["vllm.utils.hashing", "vllm.v1.request"]
    assert wall > 1e9
    assert virtual == 5.0
    assert answer == 42
    assert Path(file).parent == folder == again
    assert [(event["done"], event["modules"]) for event in events] == [(0, 2), (1, 2), (2, 2)]
    assert sorted(path.name.split(".cpython")[0] for path in folder.iterdir()) == sorted([MANIFEST, *names])


def test_a_module_that_cannot_be_loaded_is_no_import_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = fake_environment(tmp_path / "vllm")
    use_compiler(monkeypatch, tmp_path, 'echo "no machine code" > "$2"')
    folder = compiler.compiled_folder(python, ignore)

    done = run_compiled(
        python, folder, "try:\n    import vllm.v1.request\nexcept ImportError:\n    print('went on without')"
    )

    assert done.returncode == 1
    assert "went on" not in done.stdout
    assert "the compiled vllm.v1.request cannot be loaded (ImportError:" in done.stderr
    assert f"remove {folder} and it is compiled again, or replay without --compile" in done.stderr


def test_a_module_stands_for_the_source_it_was_made_from_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_environment(tmp_path / "vllm")
    use_compiler(monkeypatch, tmp_path, 'echo "never loaded" > "$2"')
    folder = compiler.compiled_folder(python, ignore)
    source_of(python, "v1/request.py").write_text(f"{REQUEST}\nCHANGED = True\n")

    done = run_compiled(python, folder, "import vllm.v1.request")

    assert done.returncode == 1
    assert "vllm.v1.request has changed since it was compiled" in done.stderr
    assert compiler.compiled_folder(python, ignore) != folder


def test_a_module_imported_too_early_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"json": CompiledModule("json.so", "")})

    done = run_compiled(Path(sys.executable), tmp_path, "")

    assert done.returncode == 1
    assert "json was imported before its compiled form could be" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda target, cython, sources: (replace(target, python_version="3.11.7 (other)"), cython, sources),
        lambda target, cython, sources: (replace(target, extension_suffix=".cpython-312.so"), cython, sources),
        lambda target, cython, sources: (replace(target, vllm_version="0.33.1"), cython, sources),
        lambda target, cython, sources: (target, "3.2.9", sources),
        lambda target, cython, sources: (target, cython, {"vllm.v1.request": b"import  time\n"}),
        lambda target, cython, sources: (target, cython, {"vllm.v1.requests": b"import time\n"}),
        lambda target, cython, sources: (target, cython, {**sources, "vllm.utils.hashing": b""}),
    ],
)
def test_whatever_decides_what_is_built_is_in_the_key(change: Callable[..., Any]) -> None:
    assert compiler.cache_key(*change(TARGET, "3.2.1", SOURCES)) != compiler.cache_key(TARGET, "3.2.1", SOURCES)


@pytest.mark.parametrize("name", ["_RECIPE", "_CYTHON_FLAGS", "_C_FLAGS", "_CACHED_CALLS"])
def test_the_recipe_is_in_the_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = compiler.cache_key(TARGET, "3.2.1", SOURCES)
    monkeypatch.setattr(compiler, name, "another")
    assert compiler.cache_key(TARGET, "3.2.1", SOURCES) != before


def test_where_an_environment_lies_is_not_in_the_key() -> None:
    moved = replace(TARGET, packages=("/elsewhere/vllm",), include="/other")
    assert compiler.cache_key(moved, "3.2.1", SOURCES) == compiler.cache_key(TARGET, "3.2.1", SOURCES)


def test_without_cython_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(FailedPrecondition, match=r"pip install 'step-oracle\[compile\]', or replay without --compile"):
        compiler.compiled_folder(fake_environment(tmp_path / "vllm"), ignore)


def test_without_a_c_compiler_it_is_asked_for(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = fake_environment(tmp_path / "vllm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="install gcc or clang, or replay without --compile"):
        compiler.compiled_folder(python, ignore)
    assert not cache.exists()


def test_without_headers_of_python_they_are_asked_for(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_environment(tmp_path / "vllm")
    found = compiler.read_target(python)
    monkeypatch.setattr(compiler, "read_target", lambda python: replace(found, include=str(tmp_path)))
    version = ".".join(map(str, sys.version_info[:2]))
    with pytest.raises(FailedPrecondition, match=rf"no Python.h in {tmp_path}.*python{version}-dev"):
        compiler.compiled_folder(python, ignore)
    assert not cache.exists()


def test_an_environment_without_vllm_is_none(tmp_path: Path) -> None:
    venv.create(tmp_path / "plain", symlinks=True)
    with pytest.raises(InvalidArgument, match="has no vLLM"):
        compiler.compiled_folder(tmp_path / "plain" / "bin" / "python", ignore)


def test_a_vllm_of_other_modules_is_refused(tmp_path: Path) -> None:
    python = fake_environment(tmp_path / "vllm")
    for name in ("v1/request.py", "utils/hashing.py"):
        source_of(python, name).unlink()
    with pytest.raises(FailedPrecondition, match="has none of the modules --compile knows"):
        compiler.compiled_folder(python, ignore)


@pytest.mark.parametrize(
    ("source", "script", "words"),
    [
        ("def broken(:\n", 'touch "$2"', r"Cython does not compile vllm\.v1\.request of vLLM 9\.9(.|\n)*def broken"),
        (REQUEST, 'touch "$2"; echo "out of memory"; exit 1', r"fake-cc does not compile (.|\n)*out of memory"),
    ],
)
def test_a_failed_build_says_why_and_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, source: str, script: str, words: str
) -> None:
    python = fake_environment(tmp_path / "vllm", request=source)
    use_compiler(monkeypatch, tmp_path, script)
    with pytest.raises(FailedPrecondition, match=words):
        compiler.compiled_folder(python, ignore)
    assert cached(cache) == []


def test_what_a_killed_build_left_is_no_part_of_the_next(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_environment(tmp_path / "vllm")
    use_compiler(monkeypatch, tmp_path, 'echo "whole" > "$2"')
    folder = compiler.compiled_folder(python, ignore)
    folder.rename(folder.with_name(f".{folder.name}"))
    (folder.with_name(f".{folder.name}") / "half").touch()

    assert compiler.compiled_folder(python, ignore) == folder
    assert cached(cache) == [folder.name]
    assert not (folder / "half").exists()


def test_two_builders_at_once_compile_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither has found a folder when the compiler is let go."""
    python = fake_environment(tmp_path / "vllm")
    go, log = tmp_path / "go", tmp_path / "compiled"
    use_compiler(
        monkeypatch, tmp_path, f'echo "$2" >> {log}; while [ ! -e {go} ]; do sleep 0.02; done; echo "whole" > "$2"'
    )
    both = Barrier(2, action=go.touch, timeout=60)

    def follow(event: dict[str, Any]) -> None:
        if event["done"] == 0:
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: compiler.compiled_folder(python, follow), range(2)))

    assert folders[0] == folders[1]
    assert cached(cache) == [folders[0].name]
    assert len(log.read_text().splitlines()) == 2
