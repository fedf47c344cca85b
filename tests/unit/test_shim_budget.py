"""The shim stays small: it is what runs inside somebody else's engine."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

from environments import REPOSITORY

# Lines with code on them; comments, docstrings and empty lines are free.
CODE_LINES_ALLOWED = 1_400
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def test_the_shim_keeps_its_budget_of_code_lines() -> None:
    counts = {file.name: code_lines(file) for file in (REPOSITORY / "vllm_shim").rglob("*.py")}

    assert sum(counts.values()) <= CODE_LINES_ALLOWED, counts


def test_only_lines_with_code_count(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Doc\n\nstring."""\n\n# A comment.\nx = (\n    1\n)  # with a comment\n\n\ndef f():\n    """Doc."""\n'
    )

    assert code_lines(file) == 4


def code_lines(file: Path) -> int:
    source = file.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)
