"""The experts of a MoE layer: moe.csv, and how many of them a step reaches.

moe.csv times the whole block (router, experts, sum) of one rank over (tokens, activated experts), with the routing
forced. Newer tables have a column `ep`: one table for each size of the expert-parallel group, of a rank that holds an
ep-th of the experts and sees all tokens of the group. Which experts a step reaches is not in the step: tokens are taken
to choose evenly and independently.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from oracle_server.errors import InvalidArgument
from oracle_server.sampling.answer import KNOWLEDGE_EXTRAPOLATED, KNOWLEDGE_MODELLED
from oracle_server.sampling.grids import OPERATOR_AXES
from profiler.llmservingsim_csv import coordinate_of, rows_of, time_us_of
from profiler.model_config import ModelConfig
from profiler.operators import Operator

_COLUMNS = ("tokens", "activated_experts", "time_us")
# Neighbouring points of a published axis are at most twice as far from 0 as the one before.
_LARGEST_STEP = 2
# Tokens -> activated experts -> microseconds.
Table = Mapping[int, Mapping[int, float]]


def expected_experts(experts: int, per_token: int, ranks: int, tokens: int) -> float:
    """Distinct experts of one rank that `tokens` tokens reach, each choosing `per_token` of all experts evenly."""
    return round(experts / ranks * (1.0 - (1.0 - per_token / experts) ** tokens), 9)


def expert_operator(
    path: Path, model: ModelConfig, *, tensor_parallel: int, data_parallel: int, most_tokens: int = 0
) -> Operator:
    """`moe`: the blocks of all MoE layers of one rank at every number of its tokens, the other ranks as busy.

    A table without a column `ep` is of one rank with all experts; a rank with a p-th of them does a p-th of the
    group's work, so it is read at a p-th of the tokens.
    """
    ranks = tensor_parallel * data_parallel
    table, is_of_group = _table(path, model, ranks, most_tokens)
    axis = sorted(table)
    share = 1.0 if is_of_group else 1.0 / ranks
    last = int(axis[-1] / share) // data_parallel
    if last < 2:
        raise InvalidArgument(
            f"{path.name} ends at {axis[-1]} tokens, less than two for each of {data_parallel} data-parallel ranks",
            field=path.name,
        )
    tokens = tuple(range(1, last + 1))
    values, known = [], []
    for count in tokens:
        gathered = data_parallel * count
        reached = expected_experts(model.num_experts, model.experts_per_token, ranks, gathered)
        cost_us, is_outside = table_value(table, axis, gathered * share, reached)
        values.append(1e3 * model.num_moe_layers * cost_us)
        known.append(KNOWLEDGE_EXTRAPOLATED if is_outside else KNOWLEDGE_MODELLED)
    return Operator("moe", OPERATOR_AXES["moe"], "experts", (tokens,), np.array(values), np.array(known, dtype=np.int8))


def table_value(table: Table, axis: Sequence[int], tokens: float, experts: float) -> tuple[float, bool]:
    """Microseconds at (tokens, experts), and whether that lies outside what was measured.

    Linear in experts within the rows around `tokens`, then linear between the rows. Above a row or the table the line
    of the last two points goes on and never falls; below the first point its value holds.
    """
    at = min(max(bisect_right(axis, tokens) - 1, 0), len(axis) - 1)
    low, outside = _row_value(table[axis[at]], experts)
    if tokens <= axis[at]:
        return low, outside or tokens < axis[at]
    other = at + 1 if at + 1 < len(axis) else at - 1
    value, other_outside = _row_value(table[axis[other]], experts)
    slope = (value - low) / (axis[other] - axis[at])
    if other > at:
        return low + slope * (tokens - axis[at]), outside or other_outside
    return low + max(slope, 0.0) * (tokens - axis[at]), True


def _row_value(row: Mapping[int, float], experts: float) -> tuple[float, bool]:
    points = sorted(row)
    if experts <= points[0] or len(points) == 1:
        return row[points[0]], experts != points[0]
    at = min(bisect_right(points, experts) - 1, len(points) - 2)
    slope = (row[points[at + 1]] - row[points[at]]) / (points[at + 1] - points[at])
    if experts > points[-1]:
        return row[points[-1]] + max(slope, 0.0) * (experts - points[-1]), True
    return row[points[at]] + slope * (experts - points[at]), False


def _table(path: Path, model: ModelConfig, ranks: int, most_tokens: int) -> tuple[Table, bool]:
    """The checked table, and whether it is of a rank of a group of that size."""
    found = rows_of(path, _COLUMNS)
    has_ep = "ep" in found[0][1]
    group = ranks if has_ep else 1
    held = model.num_experts // group
    table: dict[int, dict[int, float]] = {}
    lines: dict[tuple[int, int, int], int] = {}
    sizes: set[int] = set()
    for line, row in found:
        where = f"{path.name}, line {line}"
        size = coordinate_of(where, "ep", row["ep"] or "") if has_ep else 1
        tokens, experts = (coordinate_of(where, name, row[name]) for name in _COLUMNS[:2])
        cost_us = time_us_of(where, "time_us", row["time_us"])
        what = f"{f'ep={size}, ' if has_ep else ''}tokens={tokens}, activated_experts={experts}"
        sizes.add(size)
        if size < 1 or tokens < 1 or experts < 1:
            raise InvalidArgument(f"{where}: {what} is no batch", field=path.name)
        if experts * size > model.num_experts:
            raise InvalidArgument(
                f"{where}: {what}, but a rank holds {model.num_experts // size} of the {model.num_experts} experts of "
                f"{model.directory.name}'s config",
                field=path.name,
            )
        if experts > tokens * model.experts_per_token:
            raise InvalidArgument(
                f"{where}: {what}, but {tokens} tokens choose {model.experts_per_token} experts each", field=path.name
            )
        if (size, tokens, experts) in lines:
            raise InvalidArgument(
                f"{where}: {what} is given twice, first in line {lines[size, tokens, experts]}", field=path.name
            )
        lines[size, tokens, experts] = line
        if size == group:
            table.setdefault(tokens, {})[experts] = cost_us
    if group not in sizes:
        raise InvalidArgument(
            f"{path.name} was profiled for expert parallel {', '.join(map(str, sorted(sizes)))}, not for --ep {group}",
            field="ep",
        )
    _check_full(path, table, max(1, model.experts_per_token // group), held, most_tokens)
    return table, has_ep


def _check_full(path: Path, table: Table, per_token: int, held: int, most_tokens: int) -> None:
    """Every row has the experts its tokens can reach, `per_token` each; the axes have no holes and no missing end.

    Where a token chooses less than one expert of a rank, the profiler forces one.
    """
    tokens = sorted(table)
    experts = sorted(set().union(*table.values()))
    for name, axis in (("tokens", tokens), ("activated_experts", experts)):
        for one, other in pairwise(axis):
            if other > _LARGEST_STEP * one:
                raise InvalidArgument(
                    f"{path.name} has no rows between {name}={one} and {name}={other}: the grid has a gap",
                    field=path.name,
                )
    if tokens[0] > 1:
        raise InvalidArgument(f"{path.name} begins at {tokens[0]} tokens; rows for 1 are missing", field=path.name)
    if tokens[-1] * _LARGEST_STEP <= most_tokens or experts[-1] * _LARGEST_STEP <= held:
        raise InvalidArgument(
            f"{path.name} ends at {tokens[-1]} tokens and {experts[-1]} experts; meta.yaml says up to {most_tokens} "
            f"tokens and the config {held} experts a rank, so rows are missing",
            field=path.name,
        )
    for count in tokens:
        for needed in experts:
            if needed <= count * per_token and needed not in table[count]:
                raise InvalidArgument(
                    f"{path.name} has no row for tokens={count}, activated_experts={needed}: the grid has a gap",
                    field=path.name,
                )
