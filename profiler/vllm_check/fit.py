"""One release against our source: what breaks, and what differs and is handled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from profiler.vllm_check import rules
from profiler.vllm_check.declared import ABSENCES, CHOSEN_BASES, OLDER_HOOKS, Behavior, Form
from profiler.vllm_check.finding import Finding
from profiler.vllm_check.interfaces import Member, Place, VllmSource
from profiler.vllm_check.ours import Ours
from profiler.vllm_check.own_source import Name, OwnClass, OwnMember
from profiler.vllm_check.signatures import Signature, call_problem, override_problem, signature_of
from profiler.vllm_check.uses import Use

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def findings_of(vllm: VllmSource, ours: Ours) -> list[Finding]:
    """Every difference of a release, worst first; an empty list is a perfect fit."""
    found: dict[Finding, None] = {}
    for use in ours.uses:
        if (finding := _use(vllm, use)) is not None:
            found[finding] = None
    for own, base in ours.derived:
        found.update(dict.fromkeys(_derived(vllm, ours, own, base)))
    for behavior in ours.behaviors:
        found.update(dict.fromkeys(_behavior(vllm, behavior)))
    if "shim" in ours.source.parts:
        found.update(dict.fromkeys([*rules.plugins(vllm), *rules.worker_calls(vllm, ours), *rules.futures(vllm, ours)]))
    if "replay" in ours.source.parts:
        found.update(dict.fromkeys(rules.clocks(vllm, ours)))
    return sorted(found, key=lambda finding: (finding.severity, finding.part, finding.where, finding.what))


def _use(vllm: VllmSource, use: Use) -> Finding | None:
    place = vllm.find(*use.root)
    if place is None:
        sentence = f"{use.root[0]} has no {use.root[1]}"
        return _absent(use.part, use.root[1], sentence, use.where, optional=use.optional)
    end = resolve(vllm, place, use)
    if isinstance(end, Missing):
        return _absent(use.part, f"{end.owner}.{end.name}", str(end), use.where, optional=use.optional)
    if use.arguments is None or end is None:
        return None
    problem = call_problem(end, use.arguments)
    return None if problem is None else Finding(use.part, "breaks", f"{use}{end} {problem}", use.where)


def _absent(part: str, name: str, sentence: str, where: str, *, optional: bool) -> Finding:
    if name in ABSENCES:
        return Finding(part, "handled", f"no {name}: {ABSENCES[name].reason}", ABSENCES[name].where)
    if optional:
        return Finding(part, "handled", f"no {name}: a default stands in", where.rpartition(":")[0] or where)
    return Finding(part, "breaks", sentence, where)


@dataclass(frozen=True)
class Missing:
    """A member a path needs and its class lacks."""

    owner: str
    name: str
    module: str

    def __str__(self) -> str:
        return f"{self.module}.{self.owner} has no {self.name}"


def resolve(vllm: VllmSource, place: Place, use: Use) -> Missing | Signature | None:
    """The signature at the end of a path, the first member that is missing, or None where types are not known."""
    current: Place | None = place if isinstance(place.node, ast.ClassDef) else None
    many, member = False, None
    if isinstance(place.node, ast.AnnAssign):
        current, many = vllm.annotated_class(place.module, place.node.annotation)
    elif isinstance(place.node, _FUNCTIONS) and use.path:
        current, many = vllm.annotated_class(place.module, place.node.returns)
    for step in use.path:
        if step in ("()", "[]"):
            current, many = (current if step == "()" or many else None), many and step == "()"
            continue
        if current is None or many:
            return None
        member = vllm.member(current, step)
        if member is None:
            return Missing(current.name, step, current.module) if vllm.lacks(current, step) else None
        current, many = _type_of(vllm, current, member)
    if use.arguments is None:
        return None
    if member is not None:
        return member.signature
    if isinstance(place.node, _FUNCTIONS):
        return signature_of(place.node, drop_first=False)
    return vllm.constructor(place) if isinstance(place.node, ast.ClassDef) and not use.path else None


def _type_of(vllm: VllmSource, owner: Place, member: Member) -> tuple[Place | None, bool]:
    if member.annotation is not None:
        return vllm.annotated_class(member.owner.module, member.annotation)
    if not isinstance(member.node, ast.Assign):
        return None, False
    # `self.x = parameter.y` in a method whose parameter is annotated.
    match member.node.value:
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            holder = _parameter(vllm, member, name)
            inner = vllm.member(holder, attribute) if holder is not None else None
            return _type_of(vllm, owner, inner) if inner is not None and inner is not member else (None, False)
        case ast.Name(id=name):
            return _parameter(vllm, member, name), False
    return None, False


def _parameter(vllm: VllmSource, member: Member, name: str) -> Place | None:
    initializer = vllm.member(member.owner, "__init__")
    if initializer is None or not isinstance(initializer.node, _FUNCTIONS):
        return None
    for argument in initializer.node.args.args:
        if argument.arg == name:
            return vllm.annotated_class(initializer.owner.module, argument.annotation)[0]
    return None


def _derived(vllm: VllmSource, ours: Ours, own: OwnClass, base: Name) -> Iterator[Finding]:
    """Overridden methods take what vLLM passes; nothing abstract is left; nothing overridden has gone."""
    part, where = own.file.part, own.file.path
    place = vllm.find(*base)
    if place is None:
        yield Finding(part, "breaks", f"{base[0]} has no {base[1]}, the base of {own.node.name}", where)
        return
    lineage = ours.source.lineage(own)[0]
    mine: dict[str, OwnMember] = {}
    for one in reversed(lineage):
        mine.update(one.members())
    theirs = vllm.members(place)
    for name, member in theirs.items():
        if member.abstract and name not in mine and base not in _chosen():
            yield Finding(part, "breaks", f"{base[1]}.{name} is abstract and {own.node.name} does not define it", where)
    for name, own_member in own.members().items():
        if name in theirs:
            problem = _override(theirs[name], own_member)
            if problem is not None:
                what = f"{base[1]}.{name}{theirs[name].signature or ''} {problem}"
                yield Finding(part, "breaks", what, f"{where}:{own_member.line}")
        elif f"{base[1]}.{name}" in OLDER_HOOKS:
            continue
        elif f"{base[1]}.{name}" in ABSENCES:
            handled = ABSENCES[f"{base[1]}.{name}"]
            yield Finding(part, "handled", f"no {base[1]}.{name}: {handled.reason}", handled.where)
        elif own_member.signature is not None and not name.startswith("_") and name not in ours.called:
            # Public, and nobody of ours calls it: it was there for vLLM to call.
            yield Finding(
                part,
                "breaks",
                f"{base[1]} has no {name}: {own.node.name}.{name} is never called",
                f"{where}:{own_member.line}",
            )


def _chosen() -> set[Name]:
    return {base for bases in CHOSEN_BASES.values() for base in bases}


def _override(theirs: Member, mine: OwnMember) -> str | None:
    if theirs.kind in ("field", "attribute") or mine.signature is None or theirs.signature is None:
        return None
    if (theirs.kind == "property") != (mine.kind == "property"):
        return f"is a {theirs.kind}, ours is a {mine.kind}"
    return override_problem(theirs.signature, mine.signature)


def _behavior(vllm: VllmSource, behavior: Behavior) -> Iterator[Finding]:
    function = vllm.function(behavior.function)
    if function is None:
        sentence = f"{behavior.function.replace(':', '.')} is gone ({behavior.about})"
        yield Finding(behavior.part, "breaks", sentence, behavior.where)
        return
    form = form_of(function, behavior)
    if form is None:
        known = " or ".join(form.label for form in behavior.forms)
        yield Finding(
            behavior.part, "breaks", f"{behavior.about}: neither {known} ({behavior.function})", behavior.where
        )
    elif form is not behavior.forms[0]:
        yield Finding(behavior.part, "handled", f"{behavior.about}: {form.label}", behavior.where)


def form_of(function: ast.AST, behavior: Behavior) -> Form | None:
    """The first form whose words are all there and whose others are not."""
    words = _words(function)
    return next((form for form in behavior.forms if form.has <= words and not form.lacks & words), None)


def _words(function: ast.AST) -> set[str]:
    """Names, attributes, `name.attribute` pairs, strings that are names, and format specifications of a function."""
    words: set[str] = set()
    for node in ast.walk(function):
        match node:
            case ast.FunctionDef(name=name) | ast.Name(id=name) | ast.arg(arg=name):
                words.add(name)
            case ast.Attribute(value=value, attr=name):
                words.add(name)
                inner = value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")
                words.add(f"{inner}.{name}")
            case ast.Constant(value=str(text)) if text.isidentifier():
                words.add(text)
            case ast.FormattedValue(format_spec=ast.JoinedStr(values=[ast.Constant(value=str(text))])):
                words.add(text)
    return words
