"""Splits, overlays, roll back, shadow packs and reports do what they say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guarantees.contract_tests import row_of_tests
from guarantees.row import Guarantee, Row


@dataclass(frozen=True)
class Sizes:
    """The tests have sizes of their own, which are those of the guarantees."""

    split_alone: bool = False


LONG = Sizes()
QUICK = Sizes(split_alone=True)


def run(_: Path, sizes: Sizes) -> list[Row]:
    split = row_of_tests(
        "a rule of one half splits within its binomial bound, and stably",
        "2,000 servers, ranks, a restart by kill -9, other bindings; watchers that hop",
        "1,000 +- 112; no change missed",
        "test_split.py",
        prints=r"\d+ of 2000 servers in the arm of one half",
    )
    if sizes.split_alone:
        return [split]
    overlays = "test_overlays.py::"
    return [
        split,
        row_of_tests(
            "a factor on three of ten engines is theirs alone",
            "300 steps of each before and after",
            "1 % on three, 0 on seven",
            f"{overlays}test_a_factor_on_three_of_ten_engines_is_recovered_on_those_and_nobody_else_moves",
        ),
        row_of_tests(
            "roll back restores answers that recompute",
            "overlays activated and rolled back; 1,600 answers under overlays recomputed",
            "0 differences",
            f"{overlays}test_rolled_back_overlays_are_gone_and_the_answers_are_those_of_before",
            f"{overlays}test_every_answer_under_overlays_recomputes",
        ),
        row_of_tests(
            "a shadow pack's differences equal an offline evaluation",
            "400 steps of two engines, two pairs of packs, overlays included",
            "equal to the nanosecond",
            "test_shadow.py::test_the_differences_equal_an_offline_evaluation",
        ),
        row_of_tests(
            "a report of two arms finds a known difference of 10 %",
            "14 engines in two arms",
            "the interval holds 10 %, not 0",
            "test_experiment_report.py::test_two_packs_split_by_a_rule_are_compared",
        ),
    ]


GUARANTEE = Guarantee(run, LONG, QUICK)
