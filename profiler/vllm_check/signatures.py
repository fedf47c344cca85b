"""Parameters of functions and constructors as syntax trees show them, and whether one side fits the other."""

from __future__ import annotations

import ast
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """One named parameter; `keyword_only` ones take no position."""

    name: str
    required: bool
    keyword_only: bool = False


@dataclass(frozen=True)
class Signature:
    """Parameters without the first one of a method (self, cls)."""

    parameters: tuple[Parameter, ...]
    more_positional: bool = False
    more_keywords: bool = False

    def __str__(self) -> str:
        words, keyword_only = [], False
        for parameter in self.parameters:
            if parameter.keyword_only and not keyword_only and not self.more_positional:
                words.append("*")
                keyword_only = True
            words.append(parameter.name + ("" if parameter.required else "=..."))
        words += ["*args"] * self.more_positional + ["**kwargs"] * self.more_keywords
        return f"({', '.join(words)})"

    @property
    def positional(self) -> tuple[Parameter, ...]:
        return tuple(parameter for parameter in self.parameters if not parameter.keyword_only)


@dataclass(frozen=True)
class Arguments:
    """What a call of ours passes; `open` where * or ** hide some of it."""

    positional: int
    keywords: tuple[str, ...]
    open: bool = False


def signature_of(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, *, drop_first: bool) -> Signature:
    """The parameters of a definition; `drop_first` leaves self or cls out."""
    given = function.args
    names = [*given.posonlyargs, *given.args]
    required = [True] * (len(names) - len(given.defaults)) + [False] * len(given.defaults)
    parameters = [Parameter(arg.arg, needed) for arg, needed in zip(names, required, strict=True)]
    if drop_first:
        parameters = parameters[1:]
    parameters += [
        Parameter(arg.arg, default is None, keyword_only=True)
        for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    return Signature(tuple(parameters), given.vararg is not None, given.kwarg is not None)


def arguments_of(call: ast.Call) -> Arguments:
    """What a call passes."""
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    keywords = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
    return Arguments(len(call.args), keywords, starred or len(keywords) < len(call.keywords))


def call_problem(signature: Signature, arguments: Arguments) -> str | None:
    """Why a call would fail, or None."""
    positional = signature.positional
    if arguments.positional > len(positional) and not signature.more_positional and not arguments.open:
        return f"takes {len(positional)} positional arguments, we give {arguments.positional}"
    known = {parameter.name for parameter in signature.parameters}
    unknown = [name for name in arguments.keywords if name not in known]
    if unknown and not signature.more_keywords:
        return f"has no parameter {unknown[0]}, which we give"
    if arguments.open:
        return None
    given = {parameter.name for parameter in positional[: arguments.positional]} | set(arguments.keywords)
    missing = [
        parameter.name for parameter in signature.parameters if parameter.required and parameter.name not in given
    ]
    return f"needs {missing[0]}, which we do not give" if missing else None


def override_problem(theirs: Signature, ours: Signature) -> str | None:
    """Why a call written for vLLM's method would fail on ours, or None.

    A parameter of ours that begins with an underscore takes a position whatever it is called there.
    """
    mine = ours.positional
    for position, parameter in enumerate(theirs.positional):
        if position < len(mine):
            own = mine[position]
            if own.name != parameter.name and not own.name.startswith("_") and not ours.more_keywords:
                return f"parameter {position + 1} is {parameter.name}, ours is {own.name}"
        elif not ours.more_positional:
            return f"has a parameter {parameter.name}, ours has not"
    known = {parameter.name for parameter in ours.parameters}
    for parameter in theirs.parameters:
        if parameter.keyword_only and parameter.name not in known and not ours.more_keywords:
            return f"has a parameter {parameter.name}, ours has not"
    names = {parameter.name for parameter in theirs.parameters}
    for position, own in enumerate(ours.parameters):
        filled = not own.keyword_only and position < len(theirs.positional)
        if own.required and not filled and own.name not in names and not theirs.more_positional:
            return f"no longer passes {own.name}, which ours needs"
    return None
