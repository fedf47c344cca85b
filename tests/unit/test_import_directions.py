"""The import directions of the design, over every import statement, lazy ones included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from environments import REPOSITORY

WIRE = "step_oracle"
ERRORS, PACK, SAMPLING = "oracle_server.errors", "oracle_server.pack", "oracle_server.sampling"
STATE, RPC, REST = "oracle_server.state", "oracle_server.rpc", "oracle_server"
# What each part may import of ours, apart from itself. A name stands for what lies below it, unless a longer one fits.
ALLOWED: dict[str, set[str]] = {
    WIRE: set(),
    ERRORS: set(),
    SAMPLING: {ERRORS},
    PACK: {ERRORS, SAMPLING},
    STATE: {ERRORS, PACK, SAMPLING},
    RPC: {ERRORS, PACK, SAMPLING, STATE, WIRE},
    "oracle_server.cli": {ERRORS, PACK, REST, RPC, STATE, WIRE},
    "oracle_server.doctor": {ERRORS, REST, WIRE, "oracle_server.vllm_env", "oracle_server.vllm_install"},
    "oracle_server.health": {REST},
    "oracle_server.vllm_env": set(),
    "oracle_server.vllm_install": {REST, "oracle_server.vllm_env"},
    # server, config and the other modules beside the sub-packages.
    REST: {
        ERRORS, PACK, SAMPLING, STATE, RPC, WIRE, "oracle_server.cli", "oracle_server.vllm_env",
        "oracle_server.vllm_install",
    },
    "vllm_shim": {WIRE},
    "vllm_shim.step_shape": {"vllm_shim", WIRE},
    "profiler": {
        ERRORS, PACK, SAMPLING, "oracle_server.cli", "oracle_server.doctor", "oracle_server.health",
        "oracle_server.vllm_env", "oracle_server.vllm_install", "vllm_shim.step_shape", "profiler.replay",
        "profiler.capture",
    },
    # Capture runs inside real engines, with the shim's view of a step and of a configuration.
    "profiler.capture": {ERRORS, PACK, SAMPLING, WIRE, "vllm_shim", "vllm_shim.step_shape", "profiler"},
    # Replay runs the shim itself, in a process of its own.
    "profiler.replay": {ERRORS, PACK, SAMPLING, WIRE, "vllm_shim", "vllm_shim.step_shape"},
}  # fmt: skip
ALLOWED["vllm_shim"].add("vllm_shim.step_shape")
# Beside the standard library: grpc, and what is in the engine's process because vLLM imports it itself.
SHIM_MAY_IMPORT = {"google", "grpc", "numpy", "step_oracle", "torch", "vllm", "vllm_shim"}
# What of a capture runs inside the engine, and what starts it there.
CAPTURE_IN_ENGINE = (
    *("__init__", "command", "device_times", "engine", "facts", "launch", "pause", "plan", "recording", "scheduler"),
    *("steps", "trace_file", "worker"),
)
BARE_CORE = (
    "config",
    "doctor",
    "doctor_install",
    "doctor_oracle",
    "finding",
    "health",
    "registry_reference",
    "venv_python",
    "vllm_env",
    "vllm_install",
    "vllm_requirements",
    "errors",
)


def test_no_import_goes_against_the_directions() -> None:
    against = [
        f"{module} imports {name}"
        for module, name in _imports("proto/step_oracle", "oracle_server", "vllm_shim", "profiler")
        if (target := _part(name)) and target != (own := _part(module)) and target not in ALLOWED[own]
    ]

    assert not against


def test_the_shim_imports_nothing_that_vllm_does_not_bring() -> None:
    allowed = SHIM_MAY_IMPORT | sys.stdlib_module_names
    strangers = {f"{module}: {name}" for module, name in _imports("vllm_shim") if name.partition(".")[0] not in allowed}

    assert not strangers


def test_a_capture_needs_nothing_beyond_vllm_and_the_core() -> None:
    allowed = (SHIM_MAY_IMPORT - {"numpy"}) | sys.stdlib_module_names
    ours = ("profiler.capture", "oracle_server.errors", "vllm_shim")
    strangers = {
        f"{module}: {name}"
        for module, name in _imports("profiler/capture")
        if module.rpartition(".")[2] in (*CAPTURE_IN_ENGINE, "capture")
        and name.partition(".")[0] not in allowed
        and not name.startswith(ours)
    }

    assert not strangers


def test_the_commands_of_the_bare_core_need_the_standard_library_only() -> None:
    allowed = sys.stdlib_module_names | {"grpc", "oracle_server", "step_oracle"}
    names = {
        f"{module}: {name}"
        for module, name in _imports("oracle_server")
        if module.removeprefix("oracle_server.") in BARE_CORE and name.partition(".")[0] not in allowed
    }

    assert not names


def _imports(*folders: str) -> Iterator[tuple[str, str]]:
    """(importing module, imported name) for every hand-written file; an imported module may be followed by a member."""
    for folder in folders:
        root = REPOSITORY / folder
        files = [file for file in root.rglob("*.py") if "_pb2" not in file.name]
        assert files, f"{root} holds no Python file"
        for file in files:
            module = _module(file)
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from ((module, alias.name) for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                    start = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
                    yield from ((module, f"{start}{node.module or ''}.{alias.name}") for alias in node.names)


def _module(file: Path) -> str:
    path = file.relative_to(REPOSITORY)
    parts = list(path.with_suffix("").parts[1 if path.parts[0] == "proto" else 0 :])
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(name: str) -> str:
    """The longest part of ALLOWED a dotted name lies in; "" for what is not ours."""
    parts = name.split(".")
    return next((part for end in range(len(parts), 0, -1) if (part := ".".join(parts[:end])) in ALLOWED), "")
