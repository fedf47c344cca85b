"""Rules about vLLM's engine that no import or attribute of ours shows: plugins, worker calls, futures, clocks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from concurrent.futures import Future

from profiler.vllm_check.declared import CLOCK_PATHS, HARMLESS_CLOCKS, PLUGIN_GROUPS, UNANSWERED_CALLS
from profiler.vllm_check.finding import Finding
from profiler.vllm_check.interfaces import VllmSource
from profiler.vllm_check.ours import Ours

_FUTURE = {name for name in dir(Future) if not name.startswith("_")}
_CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}


def plugins(vllm: VllmSource) -> Iterator[Finding]:
    tree = vllm.tree("vllm.plugins")
    values = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} if tree is not None else set()
    for group in PLUGIN_GROUPS:
        if group not in values:
            yield Finding("shim", "breaks", f"vllm.plugins does not name the group {group}", "pyproject.toml")


def worker_calls(vllm: VllmSource, ours: Ours) -> Iterator[Finding]:
    """Each worker call vLLM makes by itself is answered, silent, or known to need no answer."""
    mine = ours.methods("vllm_shim.executor", "StepOracleExecutor")
    silent = ours.strings("vllm_shim.executor", "_CALLS_WITHOUT_EFFECT")
    places = [
        vllm.find("vllm.v1.executor.abstract", "Executor"),
        vllm.find("vllm.v1.engine.core", "EngineCore"),
    ]
    for place in places:
        for member in vllm.members(place).values() if place is not None else ():
            if place is not None and place.name == "Executor" and member.name in mine:
                continue
            for call in sorted(called_workers(member.node)):
                if f"_rpc_{call}" not in mine and call not in silent and call not in UNANSWERED_CALLS:
                    what = f"{member.owner.name}.{member.name} asks the worker for {call}, which nobody answers"
                    yield Finding("shim", "breaks", what, "vllm_shim/executor.py")


def called_workers(node: ast.AST) -> set[str]:
    found = set()
    for call in ast.walk(node):
        match call:
            case ast.Call(func=ast.Attribute(attr="collective_rpc"), args=[ast.Constant(value=str(name)), *_]):
                found.add(name)
    return found


def futures(vllm: VllmSource, ours: Ours) -> Iterator[Finding]:
    """The engine core asks a step's Future nothing ours does not answer."""
    mine = ours.methods("vllm_shim.timeline", "DeadlineFuture") - {"__init__"}
    for name in ("step", "step_with_batch_queue"):
        function = vllm.function(f"vllm.v1.engine.core:EngineCore.{name}")
        if function is None:
            yield Finding("shim", "breaks", f"vllm.v1.engine.core.EngineCore has no {name}", "vllm_shim/timeline.py")
            continue
        asked = {
            node.func.attr
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _FUTURE
        }
        for method in sorted(asked - mine):
            what = f"EngineCore.{name} calls {method}() of a step's Future, which ours does not define"
            yield Finding("shim", "breaks", what, "vllm_shim/timeline.py")


def clocks(vllm: VllmSource, ours: Ours) -> Iterator[Finding]:
    """Modules replay gives a virtual clock have it as `time`, and no other on a request's path reads one."""
    where = "profiler/replay/clock.py"
    replaced = ours.strings("profiler.replay.clock", "_STAMPING_MODULES")
    for module in sorted(replaced):
        tree = vllm.tree(module)
        if tree is None:
            yield Finding("replay", "breaks", f"{module} is gone, which stamps requests", where)
        elif _imports_clock_functions(tree):
            yield Finding(
                "replay", "breaks", f"{module} imports clock functions by name: replacing `time` misses them", where
            )
    for path in sorted(vllm.files()):
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if not path.startswith(CLOCK_PATHS) or module in replaced or module in HARMLESS_CLOCKS:
            continue
        tree = vllm.tree(module)
        if tree is not None and (_reads_clock(tree) or _imports_clock_functions(tree)):
            yield Finding(
                "replay", "breaks", f"{module} reads the clock on a request's path, which replay leaves alone", where
            )


def _imports_clock_functions(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "time"
        and any(alias.name in _CLOCKS for alias in node.names)
        for node in ast.walk(tree)
    )


def _reads_clock(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _CLOCKS
        and getattr(node.func.value, "id", "") == "time"
        for node in ast.walk(tree)
    )
