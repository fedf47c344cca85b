"""Compiles vLLM's scheduler to C, once per environment: its own modules, unchanged, without the bytecode interpreter.

Cython runs here, beside this command; of vLLM's environment only the sources are read and the headers of its Python.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from oracle_server.errors import FailedPrecondition, InvalidArgument
from profiler.replay.compiled import CompiledModule, write_manifest
from profiler.replay.launch import OnEvent, cache_folder

# Where a replay spends its time (0.18.1 to 0.33.0); what a version does not have is left out. The engine core's loop
# is the second longest to compile and gains little (README). The largest come first.
MODULES: Final = (
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.single_type_kv_cache_manager",
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.core.kv_cache_coordinator",
    "vllm.v1.core.kv_cache_manager",
    "vllm.v1.core.block_pool",
    "vllm.v1.core.sched.request_queue",
    "vllm.v1.request",
    "vllm.v1.core.sched.utils",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.utils.hashing",
    "vllm.utils.math_utils",
    "vllm.v1.core.sched.interface",
    "vllm.v1.utils",
)
# Another number wherever what is built changes in a way that flags and sources do not tell.
_RECIPE: Final = 1
# Annotations stay what they are to the interpreter: notes.
_CYTHON_FLAGS: Final = ("-3", "-X", "annotation_typing=False", "-X", "binding=True")
# NDEBUG: Python's headers are full of asserts, which Python's own build leaves out, too.
_C_FLAGS: Final = ("-O2", "-DNDEBUG", "-fPIC", "-shared", "-fwrapv", "-w")
# Its macros take the places of these calls in Cython's C; where Cython writes others, all is as without.
_ATTRIBUTE_CACHE: Final = Path(__file__).with_name("attribute_cache.h")
_CACHED_CALLS: Final = {
    " = __Pyx_PyObject_GetAttrStr(": " = STEP_ORACLE_GET_ATTRIBUTE(",
    " = __Pyx_PyObject_FastCallMethod(": " = STEP_ORACLE_CALL_METHOD(",
}
# A compiler takes half a gigabyte for the largest module.
_AT_ONCE: Final = 2
_ERROR_LINES: Final = 12
_WITHOUT: Final = "or replay without --compile"

_TELL_TARGET: Final = """
import importlib.metadata, importlib.util, json, sys, sysconfig
spec = importlib.util.find_spec("vllm")
try:
    version = importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    version = ""
print(json.dumps({
    "python_version": sys.version,
    "extension_suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "include": sysconfig.get_paths()["include"],
    "packages": list(spec.submodule_search_locations or []) if spec else [],
    "vllm_version": version,
}))
"""


@dataclass(frozen=True)
class Target:
    """vLLM's environment, as its Python tells it."""

    # Of the interpreter, with its compiler and build.
    python_version: str
    # Ends the name of an extension module; names the ABI and the machine.
    extension_suffix: str
    include: str
    vllm_version: str
    # Folders of the package `vllm`.
    packages: tuple[str, ...]

    def sources(self) -> dict[str, Path]:
        """Those of MODULES this version has."""
        found = {}
        for name in MODULES:
            relative = Path(*name.split(".")[1:]).with_suffix(".py")
            for package in self.packages:
                if (source := Path(package, relative)).is_file():
                    found[name] = source
                    break
        return found


def compiled_folder(python: Path, on_event: OnEvent) -> Path:
    """The folder with the compiled modules of this environment, for `compiled.install`; the first call makes it.

    `on_event` sees `{"event": "compiling", "done": ..., "modules": ...}` while it is made. Raises FailedPrecondition
    where Cython, a C compiler or Python's headers are missing, and where a module does not compile.
    """
    cython = _cython_version()
    target = read_target(python)
    sources = {name: source.read_bytes() for name, source in target.sources().items()}
    if not sources:
        raise FailedPrecondition(
            f"vLLM {target.vllm_version} of {python} has none of the modules --compile knows; replay without it"
        )
    folder = cache_folder() / f"compiled-{cache_key(target, cython, sources)}"
    if not folder.is_dir():
        compiler = _c_compiler()
        _check_headers(target)
        folder.parent.mkdir(parents=True, exist_ok=True)
        on_event({"event": "compiling", "done": 0, "modules": len(sources)})
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                _build(folder, target, compiler, sources, on_event)
    return folder


def read_target(python: Path) -> Target:
    """Asks the environment's Python, with the paths the worker will have."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(python), "-P", "-c", _TELL_TARGET], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise FailedPrecondition(f"{python} does not say what it is: {_last_lines(done.stderr)}")
    fields = json.loads(done.stdout)
    if not fields["packages"]:
        raise InvalidArgument(f"{python} has no vLLM", field="vllm")
    return Target(**{**fields, "packages": tuple(fields["packages"])})


def cache_key(target: Target, cython: str, sources: dict[str, bytes]) -> str:
    """Equal keys, interchangeable modules."""
    digests = {name: hashlib.sha256(source).hexdigest() for name, source in sources.items()}
    told = [target.python_version, target.extension_suffix, target.vllm_version]
    cache = [hashlib.sha256(_ATTRIBUTE_CACHE.read_bytes()).hexdigest(), _CACHED_CALLS]
    parts = [_RECIPE, told, cython, _CYTHON_FLAGS, _C_FLAGS, cache, digests]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _build(folder: Path, target: Target, compiler: str, sources: dict[str, bytes], on_event: OnEvent) -> None:
    """The whole folder or nothing under its name. Under the folder's lock."""
    partial = folder.with_name(f".{folder.name}")
    # Of a build that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    paths = target.sources()
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        futures = [pool.submit(_compile, name, paths[name], partial, target, compiler) for name in sources]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            on_event({"event": "compiling", "done": done, "modules": len(sources)})
        modules = {
            name: CompiledModule(f"{name}{target.extension_suffix}", hashlib.sha256(source).hexdigest())
            for name, source in sources.items()
        }
        write_manifest(partial, modules)
        partial.rename(folder)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(partial, ignore_errors=True)


def _compile(name: str, source: Path, folder: Path, target: Target, compiler: str) -> None:
    c_file, module = folder / f"{name}.c", folder / f"{name}{target.extension_suffix}"
    # Paths below vLLM's folder, which is what a traceback shows then.
    root = source.parents[name.count(".")]
    relative = str(source.relative_to(root))
    # -P: what lies in that folder is no module of Cython.
    cython = [sys.executable, "-P", "-m", "cython", *_CYTHON_FLAGS, "--module-name", name, "-o", str(c_file), relative]
    c = [compiler, *_C_FLAGS, f"-I{target.include}", "-include", str(_ATTRIBUTE_CACHE), "-o", str(module), str(c_file)]
    for tool, command in (("Cython", cython), (compiler, c)):
        done = subprocess.run(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise FailedPrecondition(
                f"{tool} does not compile {name} of vLLM {target.vllm_version}; replay without --compile. Its last "
                f"words:\n{_last_lines(done.stdout)}"
            )
        if command is cython:
            _cache_attributes(c_file)
    c_file.unlink()


def _cache_attributes(c_file: Path) -> None:
    """Has Cython's C ask the attribute cache."""
    text = c_file.read_text(encoding="utf-8")
    for call, cached in _CACHED_CALLS.items():
        text = text.replace(call, cached)
    c_file.write_text(text, encoding="utf-8")


def _cython_version() -> str:
    try:
        return importlib.metadata.version("cython")
    except importlib.metadata.PackageNotFoundError:
        raise FailedPrecondition(f"--compile needs Cython: pip install 'step-oracle[compile]', {_WITHOUT}") from None


def _c_compiler() -> str:
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FailedPrecondition(f"--compile needs a C compiler: install gcc or clang, {_WITHOUT}")
    return compiler


def _check_headers(target: Target) -> None:
    if not Path(target.include, "Python.h").is_file():
        version = ".".join(target.python_version.split(" ")[0].split(".")[:2])
        raise FailedPrecondition(
            f"--compile needs the headers of the Python that has vLLM, and there is no Python.h in {target.include}: "
            f"install them (Debian, Ubuntu: python{version}-dev), {_WITHOUT}"
        )


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-_ERROR_LINES:])
