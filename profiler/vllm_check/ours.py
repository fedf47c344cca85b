"""Everything our source relies on, read once for all releases."""

from __future__ import annotations

import ast
from functools import cached_property

from profiler.vllm_check.declared import BEHAVIORS, CHOSEN_BASES, NEEDED
from profiler.vllm_check.own_source import Name, OwnClass, OwnSource
from profiler.vllm_check.uses import uses_of


class Ours:
    """Uses, overridden classes and behaviours of the parts that are there."""

    def __init__(self, source: OwnSource) -> None:
        self.source = source
        parts = set(source.parts)
        self.uses = [*uses_of(source), *(use for use in NEEDED if use.part in parts)]
        self.behaviors = [behavior for behavior in BEHAVIORS if behavior.part in parts]

    @cached_property
    def derived(self) -> list[tuple[OwnClass, Name]]:
        """Our classes with the class of vLLM's each derives from, one row per possible base."""
        rows = list(self.source.derived())
        for name, bases in CHOSEN_BASES.items():
            if (own := self.source.classes.get(name)) is not None:
                rows += [(own, base) for base in bases]
        return rows

    @cached_property
    def called(self) -> set[str]:
        """Attributes our source reads of anything but `super()`."""
        return {
            node.attr
            for file in self.source.files
            for node in ast.walk(file.tree)
            if isinstance(node, ast.Attribute) and not _is_super(node.value)
        }

    def strings(self, module: str, name: str) -> set[str]:
        """String constants in the value our module gives a name."""
        for file in self.source.files:
            if file.module == module:
                for node in file.tree.body:
                    if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == name for t in node.targets):
                        return {
                            n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                        }
        return set()

    def methods(self, module: str, name: str) -> set[str]:
        own = self.source.classes.get((module, name))
        return set() if own is None else set(own.members())


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"
