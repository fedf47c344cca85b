"""Output lengths: quantiles, bins and classes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from naive import output_tokens
from oracle_server.errors import InvalidArgument
from oracle_server.sampling.draws import request_draw
from oracle_server.sampling.lengths import LengthClass, LengthTables


def table(*classes: LengthClass) -> LengthTables:
    return LengthTables(classes or (LengthClass("", (0, 100), (1, 2, 3, 10, 20, 30), 3),))


def test_the_ends_and_the_middle_of_a_draw_are_the_quantiles() -> None:
    lengths = table()
    assert [lengths.draw(value, 5) for value in (0, 2**63, 2**64 - 1)] == [1, 2, 3]
    assert [lengths.draw(value, 100) for value in (0, 2**62, 2**63, 2**64 - 1)] == [10, 15, 20, 30]
    assert lengths.draw(2**63, 99) == 2


def test_one_quantile_is_a_constant_length() -> None:
    lengths = table(LengthClass("", (0,), (77.0,), 1))
    assert {lengths.draw(request_draw(1, f"r{i}"), i) for i in range(100)} == {77}


def test_an_unknown_class_is_answered_from_the_default_class() -> None:
    lengths = table(LengthClass("", (0,), (5,), 1), LengthClass("code", (0,), (9,), 1))
    assert [lengths.draw(0, 1, name) for name in ("", "code", "cide")] == [5, 9, 5]
    assert (lengths.has_class("code"), lengths.has_class("cide")) == (True, False)


def test_draws_follow_the_quantiles() -> None:
    # The mean of a uniform length on 1 to 101 is 51; its standard error over 10,000 draws is 0.29; five of them.
    lengths = table(LengthClass("", (0,), (1, 101), 2))
    draws = [lengths.draw(request_draw(3, f"request-{i}"), 10) for i in range(10_000)]
    assert abs(sum(draws) / len(draws) - 51) < 5 * 0.29


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((LengthClass("code", (0,), (5,), 1),), "no default class"),
        ((LengthClass("", (0,), (5,), 1), LengthClass("", (0,), (5,), 1)), "twice"),
        ((LengthClass("", (1,), (5,), 1),), "start at 0"),
        ((LengthClass("", (), (), 1),), "start at 0"),
        ((LengthClass("", (0, 5, 5), (5, 5, 5), 1),), "ascend"),
        ((LengthClass("", (0,), (5, 6), 3),), "not 1 bins of 3"),
        ((LengthClass("", (0,), (), 0),), "not 1 bins of 0"),
        ((LengthClass("", (0,), (6, 5), 2),), "ascend"),
        ((LengthClass("", (0,), (0.5, 5), 2),), "between 1"),
        ((LengthClass("", (0,), (1, float("nan")), 2),), "between 1"),
        ((LengthClass("", (0,), (1, float("inf")), 2),), "between 1"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(classes: tuple[LengthClass, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LengthTables(classes)


@given(
    st.lists(st.lists(st.floats(1, 1e6, width=32), min_size=4, max_size=4).map(sorted), min_size=1, max_size=5),
    st.integers(0, 2**64 - 1),
    st.integers(0, 600),
)
def test_any_table_answers_as_its_naive_twin(bins: list[list[float]], value: int, prompt: int) -> None:
    begins = [100 * i for i in range(len(bins))]
    lengths = table(LengthClass("", begins, [q for quantiles in bins for q in quantiles], 4))
    actual = lengths.draw(value, prompt)
    # Two ways to write the same interpolation may round to different sides of one half.
    assert abs(actual - output_tokens(begins, bins, value, prompt)) <= 1
    assert 1 <= actual <= max(max(quantiles) for quantiles in bins) + 0.5
