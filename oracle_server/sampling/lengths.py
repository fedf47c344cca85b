"""How many tokens a request will generate, drawn from quantiles given its prompt length and class."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from oracle_server.errors import InvalidArgument

DEFAULT_CLASS: Final = ""


class LengthClass(NamedTuple):
    """LengthClass of experiment.proto: quantiles of all bins concatenated, `quantiles_per_bin` values each."""

    name: str
    prompt_bin_begin: Sequence[int]
    quantile_tokens: Sequence[float]
    quantiles_per_bin: int


class LengthTables:
    """Immutable once built. `draw` is a pure function."""

    __slots__ = ("_classes",)

    def __init__(self, classes: Iterable[LengthClass]) -> None:
        self._classes: dict[str, tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]] = {}
        for item in classes:
            if item.name in self._classes:
                raise InvalidArgument(f"length class {item.name!r} is given twice", field="length_table.classes")
            self._classes[item.name] = _bins(item)
        if DEFAULT_CLASS not in self._classes:
            raise InvalidArgument(
                "the length table has no default class; give one class the empty name", field="length_table.classes"
            )

    def draw(self, value: int, prompt_tokens: int, length_class: str = DEFAULT_CLASS) -> int:
        """Output tokens, at least 1.

        `value` is an unsigned 64-bit draw (`draws.request_draw`); quantiles are interpolated linearly and rounded half
        up. A class the table does not hold is answered from the default class: the name comes from a client of vLLM,
        and a spelling error there must not end the engine.
        """
        begins, bins = self._classes.get(length_class) or self._classes[DEFAULT_CLASS]
        quantiles = bins[max(bisect_right(begins, prompt_tokens) - 1, 0)]
        position = (value >> 11) * 2.0**-53 * (len(quantiles) - 1)
        left = int(position)
        right = min(left + 1, len(quantiles) - 1)
        tokens = quantiles[left] + (quantiles[right] - quantiles[left]) * (position - left)
        return max(1, math.floor(tokens + 0.5))

    def has_class(self, name: str) -> bool:
        """Whether the table holds a class of that name."""
        return name in self._classes


def _bins(item: LengthClass) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
    where = f"length_table.classes[{item.name!r}]"
    begins = tuple(item.prompt_bin_begin)
    size = item.quantiles_per_bin
    if not begins or begins[0] != 0 or any(b <= a for a, b in pairwise(begins)):
        raise InvalidArgument(
            f"{where}.prompt_bin_begin is {list(begins)[:8]}; it has to start at 0 and ascend", field=where
        )
    if size < 1 or len(item.quantile_tokens) != size * len(begins):
        raise InvalidArgument(
            f"{where} has {len(item.quantile_tokens)} quantiles, not {len(begins)} bins of {size}",
            field=where,
        )
    bins = tuple(tuple(float(q) for q in item.quantile_tokens[i * size : (i + 1) * size]) for i in range(len(begins)))
    for begin, quantiles in zip(begins, bins, strict=True):
        # Written so that NaN fails too.
        if not (all(1.0 <= q <= 2.0**31 for q in quantiles) and all(a <= b for a, b in pairwise(quantiles))):
            raise InvalidArgument(
                f"{where}, bin from {begin} prompt tokens: quantiles have to ascend and lie between 1 and 2^31",
                field=where,
            )
    return begins, bins
