"""What our own source uses of vLLM: names imported, attributes read along typed paths, calls made, methods overridden.

A type comes from an annotation, an import or an assignment; where none is known nothing is claimed. What this cannot
see stands in `declared.py`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from profiler.vllm_check.own_source import Name, OwnClass, OwnFile, OwnSource
from profiler.vllm_check.signatures import Arguments, arguments_of

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOTTED_CLASS = re.compile(r"vllm(\.[a-z_0-9]+)+\.[A-Z]\w+")

# Parameters that hold the same in all our files, also where they are annotated with Any.
_NAMED_AFTER_THEIR_CLASS: dict[str, Name] = {
    "vllm_config": ("vllm.config", "VllmConfig"),
    "scheduler_output": ("vllm.v1.core.sched.output", "SchedulerOutput"),
    "kv_cache_config": ("vllm.v1.kv_cache_interface", "KVCacheConfig"),
}


@dataclass(frozen=True)
class Use:
    """One thing of vLLM's that a line of ours relies on: a name, and from there a path of attributes.

    The path ends in what has to exist; "()" calls and "[]" takes an element.
    """

    part: str
    where: str
    root: Name
    path: tuple[str, ...] = ()
    # A default stands by where it is missing.
    optional: bool = False
    # How the end of the path is called, if it is.
    arguments: Arguments | None = None
    types_only: bool = False

    def __str__(self) -> str:
        return ".".join((self.root[1], *self.path)).replace(".[]", "[]").replace(".()", "()")


@dataclass(frozen=True)
class _Ref:
    """A value of vLLM's or ours: an instance reached from a class by a path, or the class itself."""

    owner: Literal["vllm", "own"]
    name: Name
    path: tuple[str, ...] = ()
    many: bool = False
    is_class: bool = False


def uses_of(source: OwnSource) -> list[Use]:
    """Every use, one for each file and line."""
    found: dict[Use, None] = {}
    # Twice: what one file assigns to self is read by another.
    for _ in range(2):
        found.clear()
        for file in source.files:
            found.update(dict.fromkeys([*_imports(file), *_dotted(file)]))
            reader = _Reader(source, file)
            reader.block(file.tree.body, {}, None)
            found.update(dict.fromkeys(reader.found))
    return list(found)


def _imports(file: OwnFile) -> Iterator[Use]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
            for alias in node.names:
                types_only = (alias.asname or alias.name) in file.typing_only
                yield Use(
                    file.part,
                    f"{file.path}:{node.lineno}",
                    (node.module, alias.name),
                    optional=node.lineno in file.guarded,
                    types_only=types_only,
                )


def _dotted(file: OwnFile) -> Iterator[Use]:
    """Classes of vLLM's that our source names in a string, for vLLM to resolve."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _DOTTED_CLASS.fullmatch(node.value):
            module, _, name = node.value.rpartition(".")
            yield Use(file.part, f"{file.path}:{node.lineno}", (module, name))


_Values = tuple[_Ref, ...]
_Names = dict[str, _Values]


class _Reader:
    """Walks one file, statement by statement, with what each local name is known to be."""

    def __init__(self, source: OwnSource, file: OwnFile) -> None:
        self._source = source
        self._file = file
        self.found: list[Use] = []

    def block(self, body: list[ast.stmt], names: _Names, own: OwnClass | None) -> None:
        for node in body:
            self._statement(node, names, own)

    def _statement(self, node: ast.stmt, names: _Names, own: OwnClass | None) -> None:
        if isinstance(node, ast.ClassDef):
            self.block(node.body, dict(names), self._file.classes[node.name])
        elif isinstance(node, _FUNCTIONS):
            self._function(node, names, own)
        elif isinstance(node, ast.Assign):
            self._expression(node.value, names, own)
            for target in node.targets:
                self._bind(target, node.value, names, own)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._expression(node.value, names, own)
            self._bind_values(node.target, self._annotation(node.annotation), names, own)
        elif isinstance(node, ast.For):
            self._expression(node.iter, names, own)
            self._bind_values(node.target, _elements(self._values(node.iter, names, own)), names, own)
            self.block([*node.body, *node.orelse], names, own)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self._statement(child, names, own)
                elif isinstance(child, ast.expr):
                    self._expression(child, names, own)
                else:
                    inner = [part for part in ast.walk(child) if isinstance(part, ast.stmt)]
                    self.block(inner, names, own)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, names: _Names, own: OwnClass | None) -> None:
        inner = dict(names)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            inner[argument.arg] = self._annotation(argument.annotation)
            if not inner[argument.arg] and argument.arg in _NAMED_AFTER_THEIR_CLASS:
                inner[argument.arg] = (_Ref("vllm", _NAMED_AFTER_THEIR_CLASS[argument.arg]),)
        if own is not None and arguments and arguments[0].arg in ("self", "cls"):
            inner[arguments[0].arg] = (
                _Ref("own", (own.file.module, own.node.name), is_class=arguments[0].arg == "cls"),
            )
        self.block(node.body, inner, own)

    def _bind(self, target: ast.expr, value: ast.expr, names: _Names, own: OwnClass | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._bind(one, its, names, own)
            return
        self._bind_values(target, self._values(value, names, own), names, own)

    def _bind_values(self, target: ast.expr, values: _Values, names: _Names, own: OwnClass | None) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = values
        elif isinstance(target, ast.Tuple):
            for one in target.elts:
                self._bind_values(one, (), names, own)
        elif isinstance(target, ast.Attribute):
            if own is not None and getattr(target.value, "id", "") == "self":
                own.bound.setdefault(target.attr, values)
                if values:
                    own.bound[target.attr] = values
            self._expression(target, names, own)

    def _expression(self, node: ast.expr, names: _Names, own: OwnClass | None) -> None:
        """Notes the uses in an expression."""
        scope = names
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            scope = dict(names)
            for generator in node.generators:
                self._expression(generator.iter, scope, own)
                self._bind_values(generator.target, _elements(self._values(generator.iter, scope, own)), scope, own)
        if isinstance(node, ast.Attribute):
            self._note(node, self._values(node, names, own))
        elif isinstance(node, ast.Call):
            self._call(node, names, own)
        for child in ast.walk(node) if isinstance(node, ast.Lambda) else ast.iter_child_nodes(node):
            if isinstance(child, ast.expr) and child is not node:
                self._expression(child, scope, own)
            elif isinstance(child, ast.comprehension):
                for condition in child.ifs:
                    self._expression(condition, scope, own)
            elif isinstance(child, ast.keyword):
                self._expression(child.value, scope, own)

    def _call(self, node: ast.Call, names: _Names, own: OwnClass | None) -> None:
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[value, ast.Constant(value=str(name)), *_]):
                refs = tuple(replace(ref, path=(*ref.path, name)) for ref in self._values(value, names, own))
                self._note(node, refs, optional=True)
            case _:
                self._note(node, self._values(node.func, names, own), arguments=arguments_of(node))

    def _note(
        self, node: ast.expr, refs: _Values, *, optional: bool = False, arguments: Arguments | None = None
    ) -> None:
        for ref in refs:
            if ref.owner == "vllm" and (ref.path or arguments is not None):
                where = f"{self._file.path}:{node.lineno}"
                self.found.append(Use(self._file.part, where, ref.name, ref.path, optional, arguments))

    def _values(self, node: ast.expr, names: _Names, own: OwnClass | None) -> _Values:
        """What an expression may be, as far as it is known."""
        match node:
            case ast.Name(id=name):
                if name in names:
                    return names[name]
                return self._named(name)
            case ast.Attribute(value=value, attr=attribute):
                return tuple(
                    found for ref in self._values(value, names, own) for found in self._attribute(ref, attribute)
                )
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_]):
                return tuple(replace(ref, path=(*ref.path, name)) for ref in self._values(value, names, own))
            case ast.Call(func=function):
                return tuple(found for ref in self._values(function, names, own) for found in self._called(ref))
            case ast.Subscript(value=value):
                return _elements(self._values(value, names, own))
            case ast.IfExp(body=first, orelse=second):
                return self._values(first, names, own) + self._values(second, names, own)
            case ast.BoolOp(values=values):
                return tuple(found for value in values for found in self._values(value, names, own))
            case ast.NamedExpr(target=target, value=value):
                names[target.id] = self._values(value, names, own)
                return names[target.id]
        return ()

    def _named(self, name: str) -> _Values:
        imported = self._file.imports.get(name, (self._file.module, name))
        if imported[0].split(".")[0] == "vllm":
            return (_Ref("vllm", imported, is_class=True),)
        return (_Ref("own", imported, is_class=True),) if imported in self._source.classes else ()

    def _attribute(self, ref: _Ref, attribute: str) -> _Values:
        if ref.owner == "vllm":
            return (replace(ref, path=(*ref.path, attribute), many=False, is_class=False),)
        lineage, theirs = self._source.lineage(self._source.classes[ref.name])
        for own in lineage:
            for node in own.node.body:
                if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == attribute:
                    return _Reader(self._source, own.file)._annotation(node.annotation)
                if isinstance(node, _FUNCTIONS) and node.name == attribute:
                    is_property = any(getattr(d, "id", "") == "property" for d in node.decorator_list)
                    returned = _Reader(self._source, own.file)._annotation(node.returns)
                    return returned if is_property else ()
            if attribute in own.bound:
                return own.bound[attribute]  # type: ignore[return-value]
            if attribute in own.members():
                return ()
        return (_Ref("vllm", theirs, (attribute,)),) if theirs is not None else ()

    def _called(self, ref: _Ref) -> _Values:
        if ref.is_class and not ref.path:
            return (replace(ref, is_class=False),)
        return (replace(ref, path=(*ref.path, "()")),) if ref.owner == "vllm" else ()

    def _annotation(self, node: ast.expr | None) -> _Values:
        match node:
            case ast.Constant(value=str(text)):
                return self._annotation(ast.parse(text, mode="eval").body)
            case ast.Name(id=name):
                return tuple(replace(ref, is_class=False) for ref in self._named(name))
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self._annotation(left) + self._annotation(right)
            case ast.Subscript(value=ast.Name(id="list" | "Sequence" | "tuple" | "Iterable"), slice=inner):
                first = inner.elts[0] if isinstance(inner, ast.Tuple) and inner.elts else inner
                return tuple(replace(ref, many=True) for ref in self._annotation(first))
        return ()


def _elements(refs: _Values) -> _Values:
    return tuple(
        replace(ref, many=False) if ref.many else replace(ref, path=(*ref.path, "[]"))
        for ref in refs
        if ref.many or ref.owner == "vllm"
    )
