"""Modules of vLLM that a replay imports compiled to C; `compiler.py` makes the folder, the worker imports from it.

Whatever is wrong with such a module ends the process with a sentence: it never runs as Python in silence, nor stands
for a file of vLLM that is no longer the one it was made from.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final

from oracle_server.errors import FailedPrecondition, OracleError

MANIFEST: Final = "modules.json"


@dataclass(frozen=True, slots=True)
class CompiledModule:
    """One module: its file in the folder, and the SHA-256 of the source it was made from."""

    file: str
    source_sha256: str


def write_manifest(folder: Path, modules: Mapping[str, CompiledModule]) -> None:
    content = {name: asdict(module) for name, module in modules.items()}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def install(folder: Path) -> None:
    """From now on this process imports the folder's modules in place of vLLM's own; none may be imported yet."""
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    finder = _CompiledFinder(folder, {name: CompiledModule(**fields) for name, fields in content.items()})
    early = sorted(finder.modules.keys() & sys.modules.keys())
    if early:
        raise FailedPrecondition(f"{early[0]} was imported before its compiled form could be")
    sys.meta_path.insert(0, finder)


def imported() -> list[str]:
    """Names of the modules that this process runs compiled."""
    return sorted(
        name
        for name, module in sys.modules.items()
        if isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _CompiledLoader)
    )


class _CompiledFinder:
    """Finder of `sys.meta_path`; read only."""

    def __init__(self, folder: Path, modules: Mapping[str, CompiledModule]) -> None:
        self.modules = modules
        self._folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        module = self.modules.get(fullname)
        if module is None:
            return None
        plain = PathFinder.find_spec(fullname, path)
        source = Path(plain.origin).read_bytes() if plain is not None and plain.origin else b""
        if hashlib.sha256(source).hexdigest() != module.source_sha256:
            raise FailedPrecondition(f"{fullname} has changed since it was compiled; start the replay again")
        file = self._folder / module.file
        return spec_from_file_location(fullname, file, loader=_CompiledLoader(fullname, str(file)))


class _CompiledLoader(ExtensionFileLoader):
    """Raises what vLLM does not take for a module that may be missing: no ImportError."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        try:
            return super().create_module(spec)
        except Exception as error:
            raise self._refusal(error) from error

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except OracleError:
            raise
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> FailedPrecondition:
        return FailedPrecondition(
            f"the compiled {self.name} cannot be loaded ({type(error).__name__}: {error}); remove "
            f"{Path(self.path).parent} and it is compiled again, or replay without --compile"
        )
