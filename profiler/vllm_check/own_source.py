"""Our own source as the check sees it: which files rely on vLLM, their imports and classes."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from profiler.vllm_check.signatures import Signature, signature_of

# The parts a verdict is given for, and the packages each consists of. A package that is not there is left out.
PARTS: Mapping[str, tuple[str, ...]] = {
    "shim": ("vllm_shim",),
    "replay": ("profiler.replay",),
    "capture": ("profiler.capture",),
}
Name = tuple[str, str]


@dataclass(frozen=True)
class OwnMember:
    """A member of one of our classes. `signature` is None for plain attributes."""

    name: str
    kind: str
    line: int
    signature: Signature | None


@dataclass
class OwnClass:
    """One of our classes; bases by (module, name), those of vLLM among them."""

    file: OwnFile
    node: ast.ClassDef
    # What `self.x = ...` binds, filled while uses are read.
    bound: dict[str, tuple[object, ...]] = field(default_factory=dict)

    @property
    def bases(self) -> list[Name]:
        names = [base.id for base in self.node.bases if isinstance(base, ast.Name)]
        return [self.file.imports.get(name, (self.file.module, name)) for name in names]

    def members(self) -> dict[str, OwnMember]:
        """Methods, and names the class body assigns; `staticmethod(lambda ...)` counts as a method."""
        found: dict[str, OwnMember] = {}
        for node in self.node.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kind = _kind(node)
                signature = signature_of(node, drop_first=kind != "staticmethod")
                found[node.name] = OwnMember(node.name, kind, node.lineno, signature)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        found[target.id] = _assigned(target.id, node)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = OwnMember(node.target.id, "attribute", node.lineno, None)
        return found


@dataclass
class OwnFile:
    """One source file: its module, its part, and what it imports under which name."""

    part: str
    module: str
    path: str
    tree: ast.Module
    imports: dict[str, Name]
    # Names imported for types alone: the module need not have them while running.
    typing_only: set[str]
    # Lines of imports that a `try` with a handler for their failure surrounds.
    guarded: set[int]
    classes: dict[str, OwnClass] = field(default_factory=dict)


class OwnSource:
    """All files of the parts that are there, and their classes by (module, name)."""

    def __init__(self, parts: Mapping[str, tuple[str, ...]] = PARTS, root: Path | None = None) -> None:
        self.files = [_read(part, module, path) for part, module, path in _files(parts, root)]
        self.classes: dict[Name, OwnClass] = {}
        for file in self.files:
            for node in ast.walk(file.tree):
                if isinstance(node, ast.ClassDef):
                    file.classes[node.name] = OwnClass(file, node)
                    self.classes[file.module, node.name] = file.classes[node.name]
        self.parts = tuple(dict.fromkeys(file.part for file in self.files))

    def lineage(self, own: OwnClass) -> tuple[list[OwnClass], Name | None]:
        """The class and its bases among ours, nearest first, and the first base of vLLM's."""
        found, waiting, theirs = [own], list(own.bases), None
        while waiting:
            name = waiting.pop(0)
            if name[0].split(".")[0] == "vllm":
                theirs = theirs or name
            elif (base := self.classes.get(name)) is not None and base not in found:
                found.append(base)
                waiting += base.bases
        return found, theirs

    def derived(self) -> Iterator[tuple[OwnClass, Name]]:
        """Our classes that derive from one of vLLM's, directly or through another of ours."""
        for own in self.classes.values():
            _, theirs = self.lineage(own)
            if theirs is not None:
                yield own, theirs


def _files(parts: Mapping[str, tuple[str, ...]], root: Path | None) -> Iterator[tuple[str, str, Path]]:
    for part, packages in parts.items():
        for package in packages:
            folder = _folder(package) if root is None else root / package.replace(".", "/")
            if folder is None or not folder.is_dir():
                continue
            for path in sorted(folder.rglob("*.py")):
                words = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
                module = ".".join(words[:-1] if words[-1] == "__init__" else words)
                yield part, module, path


def _folder(package: str) -> Path | None:
    # A package beside this one; `find_spec` of a nested name would import its parent.
    top, _, rest = package.partition(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    return (
        Path(next(iter(spec.submodule_search_locations)), *rest.split("."))
        if rest
        else Path(spec.submodule_search_locations[0])
    )


def _read(part: str, module: str, path: Path) -> OwnFile:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports: dict[str, Name] = {}
    typing_only: set[str] = set()
    guarded: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                imports[alias.asname or alias.name] = (node.module, alias.name)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    typing_only |= {alias.asname or alias.name for alias in inner.names}
        elif isinstance(node, ast.Try) and any(
            "Import" in ast.unparse(h.type or ast.Tuple([])) or "ModuleNotFound" in ast.unparse(h.type or ast.Tuple([]))
            for h in node.handlers
        ):
            guarded |= {
                inner.lineno
                for statement in node.body
                for inner in ast.walk(statement)
                if isinstance(inner, ast.ImportFrom)
            }
    short = (
        "/".join([*module.split(".")[:-1], path.name])
        if path.name != "__init__.py"
        else f"{module.replace('.', '/')}/__init__.py"
    )
    return OwnFile(part, module, short, tree, imports, typing_only, guarded)


def _kind(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    names = {getattr(decorator, "id", getattr(decorator, "attr", "")) for decorator in node.decorator_list}
    for kind in ("property", "classmethod", "staticmethod"):
        if kind in names:
            return kind
    return "method"


def _assigned(name: str, node: ast.Assign) -> OwnMember:
    match node.value:
        case ast.Call(func=ast.Name(id="staticmethod"), args=[ast.Lambda() as function]):
            return OwnMember(name, "staticmethod", node.lineno, signature_of(function, drop_first=False))
    return OwnMember(name, "attribute", node.lineno, None)
