"""A binding is checked as a whole before anything is written."""

from __future__ import annotations

import msgspec
import pytest

from oracle_server.errors import InvalidArgument
from oracle_server.state.binding import MAX_BYTES, MAX_LABELS, MAX_RULES, MAX_TEXT, Binding, Rule, check

DIGEST = "sha256:" + "0" * 64


def wide(characters: int) -> Binding:
    """As many rules and labels as are allowed, with values of so many characters of four bytes."""
    labels = {f"k{i}": "\N{GRINNING FACE}" * characters for i in range(MAX_LABELS)}
    return Binding(rules=tuple(Rule(DIGEST, labels) for _ in range(MAX_RULES)))


def test_a_binding_up_to_the_limit_is_allowed() -> None:
    binding = wide(30)
    assert 0.9 * MAX_BYTES < len(msgspec.msgpack.encode(binding)) <= MAX_BYTES
    check(binding)


def test_a_binding_beyond_the_limit_is_refused_though_each_of_its_parts_is_allowed() -> None:
    with pytest.raises(InvalidArgument, match="allowed: at most 8,388,608") as caught:
        check(wide(MAX_TEXT))
    assert caught.value.field == "binding"
