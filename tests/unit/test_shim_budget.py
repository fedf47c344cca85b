"""The shim stays small: it is what runs inside somebody else's engine."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

from environments import REPOSITORY

SHIM = REPOSITORY / "vllm_shim"
# Logical lines, so that the formatter has no say: one statement is one line however it is wrapped; docstrings, comments
# and empty lines are free.
LINES_ALLOWED = 1_440
# What vLLM's own interfaces hand the shim, beside vLLM, grpc and the wire.
IMPORTS_ALLOWED = {"grpc", "numpy", "step_oracle", "torch", "vllm", "vllm_shim"}
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}


def test_the_shim_keeps_its_budget_of_lines() -> None:
    counts = {file.name: logical_lines(file) for file in SHIM.rglob("*.py")}
    print(f"{sum(counts.values())} logical lines in the shim: {counts}")

    assert sum(counts.values()) <= LINES_ALLOWED, counts


def test_a_wrapped_statement_is_one_line_and_a_docstring_is_none(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    text = '"""Doc\n\nstring."""\n\n# A comment.\nx = (\n    1\n)  # with a comment\n\n\ndef f():\n    """Doc."""\n'
    file.write_text(text + "    pass\n")

    assert logical_lines(file) == 3


def test_the_shim_imports_the_standard_library_grpc_protobuf_and_vllm_only() -> None:
    for file in SHIM.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                root = name.partition(".")[0]
                assert root in IMPORTS_ALLOWED or root in sys.stdlib_module_names, f"{file.name} imports {name}"


def logical_lines(file: Path) -> int:
    """Statements of the file, as the tokenizer ends them; a line that is one string is a docstring."""
    lines = 0
    current: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NEWLINE:
            lines += [part.type for part in current] != [tokenize.STRING]
            current = []
        elif token.type not in _LAYOUT:
            current.append(token)
    return lines
