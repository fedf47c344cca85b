"""The points a composed pack stores: dense where a cost bends, since the oracle interpolates linearly between them."""

from __future__ import annotations

from collections.abc import Iterable


def token_grid(limit: int, measured: Iterable[int] = ()) -> list[int]:
    """Total tokens 1 ... `limit`: all to 64, every 8 to 512 with the first token of each tile of 64, every 128 beyond.

    `measured` adds the points of a source's own table, so that its own straight pieces are ours.
    """
    points = set(range(1, 65)) | set(range(72, 513, 8)) | set(range(65, 513, 64)) | set(range(640, limit + 1, 128))
    return sorted(point for point in points | {limit} | set(measured) if point <= limit)


def row_grid(limit: int, measured: Iterable[int] = ()) -> list[int]:
    """Rows that need logits, 1 ... `limit`: as `token_grid`, which is finer than four per octave up to 1,024."""
    return token_grid(limit, measured)


def request_grid(limit: int, measured: Iterable[int] = ()) -> list[int]:
    """Decode requests 1 ... `limit`: all to 16, then four per octave."""
    return sorted(point for point in {*range(1, 17), *octaves(16, limit, 4), limit, *measured} if 1 <= point <= limit)


def context_grid(limit: int, measured: Iterable[int] = (), *, first: int = 1) -> list[int]:
    """KV tokens `first` ... `limit`: four per octave, with 0 in front where `first` is 0."""
    points = {first, *octaves(1, limit, 4), limit, *measured}
    return sorted(point for point in points if first <= point <= limit)


def octaves(start: int, limit: int, per_octave: float) -> list[int]:
    """Integers from `start` to `limit`, `per_octave` to each doubling, evenly spaced in the logarithm."""
    points: list[int] = []
    index = 0
    while (value := round(start * 2 ** (index / per_octave))) <= limit:
        if not points or value > points[-1]:
            points.append(value)
        index += 1
    return points
