"""vLLM's source as names, classes and members; none of it is imported, and only the files asked for are read."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from profiler.vllm_check.signatures import Parameter, Signature, signature_of

Kind = Literal["field", "method", "classmethod", "staticmethod", "property", "attribute"]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Classes outside vLLM that add no member a check may miss.
_ENUMS = {"Enum", "IntEnum", "StrEnum", "IntFlag", "Flag"}
_PLAIN_BASES = _ENUMS | {"ABC", "Generic", "NamedTuple", "Protocol", "Struct", "TypedDict", "object", "str", "int"}
_WRAPPERS = {"Annotated", "ClassVar", "Final", "InitVar", "Optional", "SkipValidation", "type"}
_COLLECTIONS = {"Iterable", "Sequence", "deque", "frozenset", "list", "set", "tuple"}


@dataclass(frozen=True)
class Place:
    """A definition: the module it stands in, its name there and its syntax tree."""

    module: str
    name: str
    node: ast.AST

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Member:
    """One member of a class as its body (or an assignment to self) defines it."""

    name: str
    kind: Kind
    owner: Place
    node: ast.AST
    has_default: bool = True
    annotation: ast.expr | None = None
    signature: Signature | None = None
    abstract: bool = False


@dataclass
class VllmSource:
    """The syntax trees of one release.

    `read` gives the text of a file of the wheel, None where there is none; `files` the paths of all of them.
    """

    version: str
    read: Callable[[str], str | None]
    files: Callable[[], Collection[str]]
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)
    _found: dict[tuple[str, str], Place | None] = field(default_factory=dict)
    _lineages: dict[Place, tuple[list[Place], bool]] = field(default_factory=dict)
    _bodies: dict[Place, dict[str, Member]] = field(default_factory=dict)

    def tree(self, module: str) -> ast.Module | None:
        """The module's syntax tree, or None where the release has no such module."""
        if module not in self._trees:
            path = module.replace(".", "/")
            text = self.read(f"{path}.py")
            if text is None:
                text = self.read(f"{path}/__init__.py")
            self._trees[module] = None if text is None else ast.parse(text)
        return self._trees[module]

    def find(self, module: str, name: str) -> Place | None:
        """Where a module's name is defined; re-exports are followed inside vLLM."""
        if (module, name) not in self._found:
            # Two modules that import a name from each other end here.
            self._found[module, name] = None
            self._found[module, name] = self._find(module, name)
        return self._found[module, name]

    def _find(self, module: str, name: str) -> Place | None:
        tree = self.tree(module)
        if tree is None:
            return None
        imported: Place | None = None
        for node in _flat(tree.body):
            if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and node.name == name:
                return Place(module, name, node)
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
                return Place(module, name, node)
            if isinstance(node, ast.ImportFrom):
                imported = imported or self._imported(module, node, name)
        if imported is not None:
            return imported
        # Names a module makes on demand stand as strings in its __getattr__ or in the table that function reads.
        lazy = next((node for node in tree.body if isinstance(node, _FUNCTIONS) and node.name == "__getattr__"), None)
        if lazy is not None and any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree)):
            return Place(module, name, lazy)
        if self.tree(f"{module}.{name}") is not None:
            return Place(f"{module}.{name}", name, tree)
        return None

    def function(self, path: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """The function or method named `module:name` or `module:Class.name`."""
        module, _, qualname = path.partition(":")
        owner, _, name = qualname.rpartition(".")
        if not owner:
            place = self.find(module, name)
            return place.node if place is not None and isinstance(place.node, _FUNCTIONS) else None
        place = self.find(module, owner)
        member = self.member(place, name) if place is not None else None
        return member.node if member is not None and isinstance(member.node, _FUNCTIONS) else None

    def classes(self, place: Place) -> tuple[list[Place], bool]:
        """The class and its bases inside vLLM, nearest first, and whether that is all of them."""
        if place not in self._lineages:
            self._lineages[place] = self._lineage(place)
        return self._lineages[place]

    def _lineage(self, place: Place) -> tuple[list[Place], bool]:
        found, complete, waiting = [place], True, [place]
        while waiting:
            current = waiting.pop(0)
            if not isinstance(current.node, ast.ClassDef):
                continue
            for base in current.node.bases:
                target = base.value if isinstance(base, ast.Subscript) else base
                name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
                resolved = self.find(current.module, name) if isinstance(target, ast.Name) else None
                if resolved is not None and isinstance(resolved.node, ast.ClassDef):
                    if resolved not in found:
                        found.append(resolved)
                        waiting.append(resolved)
                elif name not in _PLAIN_BASES:
                    complete = False
        return found, complete

    def lacks(self, place: Place, name: str) -> bool:
        """Whether a class certainly has no such member; one with a base outside vLLM may have any."""
        owners, complete = self.classes(place)
        bases = {
            ast.unparse(base) for owner in owners if isinstance(owner.node, ast.ClassDef) for base in owner.node.bases
        }
        of_enum = name in ("name", "value") and any(base.rpartition(".")[2] in _ENUMS for base in bases)
        return complete and not of_enum and not name.startswith("__") and self.member(place, name) is None

    def member(self, place: Place, name: str) -> Member | None:
        """The member a class has under this name, its own or inherited."""
        for owner in self.classes(place)[0]:
            if found := self._body(owner).get(name):
                return found
        return None

    def members(self, place: Place) -> dict[str, Member]:
        """All members, bases first, as the constructor of a dataclass takes its fields."""
        merged: dict[str, Member] = {}
        for owner in reversed(self.classes(place)[0]):
            # A field that is defined anew keeps its place.
            merged |= self._body(owner)
        return merged

    def _body(self, owner: Place) -> dict[str, Member]:
        if owner not in self._bodies:
            self._bodies[owner] = _members(owner)
        return self._bodies[owner]

    def constructor(self, place: Place) -> Signature | None:
        """What calling the class takes: its __init__, or the fields of a dataclass, NamedTuple or Struct."""
        initializer = self.member(place, "__init__")
        if initializer is not None:
            return initializer.signature
        fields = [member for member in self.members(place).values() if member.kind == "field"]
        if not fields:
            return None
        keyword_only = "kw_only=True" in _decorators(place)
        return Signature(
            tuple(Parameter(member.name, not member.has_default, keyword_only) for member in fields),
            more_positional=False,
            more_keywords=False,
        )

    def annotated_class(self, module: str, annotation: ast.expr | None) -> tuple[Place | None, bool]:
        """The vLLM class an annotation names and whether it names a collection of them; None for anything else."""
        match annotation:
            case ast.Constant(value=str(text)):
                return self.annotated_class(module, ast.parse(text, mode="eval").body)
            case ast.Name(id=name):
                place = self.find(module, name)
                return (place if place is not None and isinstance(place.node, ast.ClassDef) else None), False
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                found, many = self.annotated_class(module, left)
                return (found, many) if found is not None else self.annotated_class(module, right)
            case ast.Subscript(value=ast.Name(id=name), slice=inner):
                first = inner.elts[0] if isinstance(inner, ast.Tuple) and inner.elts else inner
                found, many = self.annotated_class(module, first)
                if name in _COLLECTIONS:
                    return found, True
                return (found, many) if name in _WRAPPERS else (None, False)
        return None, False

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Place | None:
        source = _absolute(self, module, node)
        if not source.startswith("vllm"):
            return None
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return self.find(source, alias.name)
            if alias.name == "*":
                found = self.find(source, name)
                if found is not None:
                    return found
        return None


def _absolute(source: VllmSource, module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = source.read(f"{module.replace('.', '/')}/__init__.py") is not None
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, those inside if, try and with included."""
    for node in body:
        yield node
        match node:
            case ast.If(body=inner, orelse=other):
                yield from _flat([*inner, *other])
            case ast.Try(body=inner, handlers=handlers, orelse=other, finalbody=last):
                yield from _flat([*inner, *(stmt for handler in handlers for stmt in handler.body), *other, *last])
            case ast.With(body=inner):
                yield from _flat(inner)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _decorators(place: Place) -> str:
    found = []
    for owner in (place.node,):
        if isinstance(owner, ast.ClassDef):
            found += [ast.unparse(decorator) for decorator in owner.decorator_list]
            found += [ast.unparse(keyword) for keyword in owner.keywords]
    return " ".join(found)


def _members(owner: Place) -> dict[str, Member]:
    """What the class body defines, then what its methods assign to self."""
    if not isinstance(owner.node, ast.ClassDef):
        return {}
    found: dict[str, Member] = {}
    for node in _flat(owner.node.body):
        if isinstance(node, _FUNCTIONS):
            if "overload" not in _names(node) and (member := _function_member(owner, node)).name not in found:
                found[node.name] = member
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            is_class_variable = "ClassVar" in ast.unparse(node.annotation)
            found[node.target.id] = Member(
                node.target.id,
                "attribute" if is_class_variable else "field",
                owner,
                node,
                has_default=_has_default(node.value),
                annotation=node.annotation,
            )
        elif isinstance(node, ast.Assign):
            for name in _targets(node):
                found[name] = Member(name, "attribute", owner, node)
    for name, node in _assigned_to_self(owner.node):
        annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
        found.setdefault(name, Member(name, "attribute", owner, node, annotation=annotation))
    return found


def _function_member(owner: Place, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Member:
    names = _names(node)
    kind: Kind = "method"
    if "property" in names or "cached_property" in names:
        kind = "property"
    elif "classmethod" in names:
        kind = "classmethod"
    elif "staticmethod" in names:
        kind = "staticmethod"
    return Member(
        node.name,
        kind,
        owner,
        node,
        annotation=node.returns,
        signature=signature_of(node, drop_first=kind != "staticmethod"),
        abstract="abstractmethod" in names,
    )


def _names(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    names = set()
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        names.add(target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", ""))
    return names


def _has_default(value: ast.expr | None) -> bool:
    if not isinstance(value, ast.Call):
        return value is not None
    name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
    if name not in ("field", "Field"):
        return True
    # A bare ellipsis is pydantic's "required".
    given = {keyword.arg for keyword in value.keywords}
    positional = bool(value.args) and not (isinstance(value.args[0], ast.Constant) and value.args[0].value is ...)
    return positional or bool(given & {"default", "default_factory", "init"})


def _assigned_to_self(node: ast.ClassDef) -> Iterator[tuple[str, ast.Assign | ast.AnnAssign]]:
    for function in node.body:
        if not isinstance(function, _FUNCTIONS):
            continue
        for statement in ast.walk(function):
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in targets:
                    if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                        yield target.attr, statement
