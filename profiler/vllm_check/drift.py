"""What moved between two releases, of the interfaces we touch: two snapshots, compared line by line."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping

from profiler.vllm_check.declared import BEHAVIORS, CHOSEN_BASES, READ_FUNCTIONS, WHOLE
from profiler.vllm_check.fit import form_of
from profiler.vllm_check.interfaces import Member, Place, VllmSource
from profiler.vllm_check.ours import Ours
from profiler.vllm_check.rules import called_workers

Snapshot = Mapping[str, str]
_BODY = "body "


def snapshot_of(vllm: VllmSource, ours: Ours) -> Snapshot:
    """One line per interface: its name, and what it looks like."""
    lines: dict[str, str] = {}
    for root in WHOLE:
        place = vllm.find(*root)
        if place is not None:
            lines |= _whole(vllm, place)
    for use in ours.uses:
        place = vllm.find(*use.root)
        if place is None:
            continue
        lines.setdefault(use.root[1], f"in {place.module}")
        if use.root in WHOLE or any(step in ("()", "[]") for step in use.path[:-1]):
            continue
        current: Place | None = place if isinstance(place.node, ast.ClassDef) else None
        for step in use.path:
            member = vllm.member(current, step) if current is not None else None
            if member is None or current is None:
                break
            lines.setdefault(f"{member.owner.name}.{step}", _told(member))
            current = vllm.annotated_class(member.owner.module, member.annotation)[0]
    for own, base in ours.derived:
        place = vllm.find(*base)
        theirs = vllm.members(place) if place is not None else {}
        for name in own.members():
            if name in theirs:
                lines.setdefault(f"{theirs[name].owner.name}.{name}", _told(theirs[name]))
    for owner in (("vllm.v1.executor.abstract", "Executor"), ("vllm.v1.engine.core", "EngineCore")):
        place = vllm.find(*owner)
        for member in vllm.members(place).values() if place is not None else ():
            lines |= {f"worker call {call}": "" for call in called_workers(member.node)}
    for behavior in BEHAVIORS:
        function = vllm.function(behavior.function)
        form = form_of(function, behavior) if function is not None else None
        lines[behavior.about] = form.label if form is not None else "unknown"
    for path in READ_FUNCTIONS:
        function = vllm.function(path)
        if function is not None:
            lines[f"{_BODY}{path.rpartition(':')[2]}"] = _digest(function)
    return lines


def moves(before: Snapshot, after: Snapshot) -> list[str]:
    """Lines with a sign: + new, - gone, ~ changed; a changed body is only named."""
    found = []
    for name in sorted(set(before) | set(after)):
        if name.startswith(_BODY):
            if name in before and name in after and before[name] != after[name]:
                found.append(f"~ {name.removeprefix(_BODY)}: body")
        elif name not in before:
            found.append(f"+ {name}{_said(after[name])}")
        elif name not in after:
            found.append(f"- {name}{_said(before[name])}")
        elif before[name] != after[name]:
            found.append(f"~ {name}: {before[name]} -> {after[name]}")
    return found


def touched_classes() -> list[str]:
    """Names of the classes that are reported whole, for the documentation."""
    bases = {name for names in CHOSEN_BASES.values() for _, name in names}
    return sorted({name for _, name in WHOLE} | bases)


def _whole(vllm: VllmSource, place: Place) -> dict[str, str]:
    # An inherited member stands under the class that defines it.
    return {
        f"{member.owner.name}.{name}": _told(member)
        for name, member in vllm.members(place).items()
        if not name.startswith("_") or member.abstract
    }


def _told(member: Member) -> str:
    if member.kind == "field":
        return "field" if member.has_default else "required field"
    words = (
        f"{member.kind}{member.signature}"
        if member.signature is not None and member.kind != "property"
        else member.kind
    )
    return f"abstract {words}" if member.abstract else words


def _said(told: str) -> str:
    return f" ({told})" if told and not told.startswith("in ") else (f" {told}" if told else "")


def _digest(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The body without docstring, comments, names of arguments' types and layout."""
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return hashlib.sha256("".join(ast.dump(node) for node in body).encode()).hexdigest()
