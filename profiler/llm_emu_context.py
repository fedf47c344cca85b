"""Context tokens of LLM-Emu samples: which cell of a 3-D table each sample of the 2-D table is from.

Both tables hold the same samples in the order of capture, the 2-D one in cells of (tokens, concurrency), the 3-D one in
cells of (tokens, concurrency, KV tokens). A 2-D cell is therefore an interleaving of its 3-D cells, and equal samples
(0.1 us resolution) are what makes it ambiguous; any interleaving that fits gives the same samples in the same buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

# Open interleavings of one cell. Two cells with a common run of samples open two until the run ends.
_MOST_OPEN = 64


def interleave(whole: Sequence[float], parts: Sequence[Sequence[float]]) -> list[int] | None:
    """The part each item of `whole` is from, so that every part is read from begin to end; None: `parts` do not make
    up `whole` (or only in a way that was given up among more than 64)."""
    if sum(map(len, parts)) != len(whole):
        return None
    # Per item: positions after it -> (positions before it, part taken).
    steps: list[dict[tuple[int, ...], tuple[tuple[int, ...], int]]] = []
    open_states: Sequence[tuple[int, ...]] = [(0,) * len(parts)]
    for item in whole:
        reached: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
        for state in open_states:
            for number, part in enumerate(parts):
                at = state[number]
                if at < len(part) and part[at] == item:
                    reached.setdefault((*state[:number], at + 1, *state[number + 1 :]), (state, number))
        if not reached:
            return None
        open_states = list(reached)[:_MOST_OPEN]
        steps.append(reached)
    taken = []
    state = open_states[0]
    for reached in reversed(steps):
        state, number = reached[state]
        taken.append(number)
    return taken[::-1]
